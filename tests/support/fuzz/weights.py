"""Weights, references and tokenizers as inputs."""

from __future__ import annotations

import gzip
import io
import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.support.fuzz.reader import DEPTHS, WrongSilence, refused
from tests.support.places import FIXTURES

# Weights


def read_weight_file(folder: Path, data: bytes) -> dict[str, list]:
    from icar_jax.convert.files.tensors import read_weights

    (folder / "x.bin").write_bytes(data)
    found = {name: tensor.load() for name, tensor in read_weights(folder / "x.bin").tensors.items()}
    return {name: array.tolist() for name, array in found.items() if array.size < 20 and array.dtype.kind in "fiub"}


def safetensors_seeds(folder: Path) -> list[bytes]:
    return [save({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.int64)}, {"format": "pt"})]


def with_header(length: int) -> bytes:
    data = save({"a": np.ones(3, np.float32)})
    short = int.from_bytes(data[:8], "little")
    return struct.pack("<Q", length) + data[8 : 8 + short] + b" " * (length - short) + data[8 + short :]


def headed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def handmade_safetensors() -> dict[str, tuple[bytes, Any]]:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    lengths = {f"header of {n}": (with_header(n), {"a": [1.0] * 3}) for n in (640, 1_152, 15_392, 23_328, 31_520, 35_615)}
    return lengths | refused(
        nested=headed(b'{"a":' + DEPTHS + b"}"), list=headed([]),
        many=headed({"a": {**one, "shape": [2**40, 2**40]}}, bytes(4)),
        negative=headed({"a": {**one, "shape": [-1]}}, bytes(4)), outside=headed({"a": {**one, "data_offsets": [0, 2**60]}}),
        backwards=headed({"a": {**one, "data_offsets": [4, 0]}}, bytes(4)), text=headed({"a": {**one, "shape": "x"}}, bytes(4)),
        long=struct.pack("<Q", 99_999_999) + b"{", twice=headed(b'{"a":{},"a":{}}'), number=headed({"a": 3}),
        gap=headed({"a": {**one, "data_offsets": [4, 8]}}, bytes(8)),
    )  # fmt: skip


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0000X\3\0\0\0cpuK\6tQK\0(K\2K\3t(K\3K\1t"
    b"\x89ccollections\nOrderedDict\n)RtR"
)
STATE = b"}(X\1\0\0\0w" + TENSOR + b"u"


def torch_zip(pickle: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in {"data.pkl": pickle, "data/0": bytes(24), **members}.items():
            archive.writestr(f"a/{name}", data)
    return out.getvalue()


def handmade_torch() -> dict[str, tuple[bytes, Any]]:
    zeros = {"w": [[0.0] * 3] * 2}
    return {
        "good": (torch_zip(b"\x80\2" + STATE + b"."), zeros),
        "compressed": (torch_zip(b"\x80\2" + STATE + b".", zipfile.ZIP_DEFLATED), zeros),
    } | refused(
        copies=torch_zip(b"\x80\2](" + b"N" * 1_000_000 + b"eq\x010(" + b"cbuiltins\nset\nh\1\x85R" * 2000 + b"t."),
        key=torch_zip(b"\x80\2)q\0" + b"h\0h\0\x86q\0" * 200 + b"}h\0K\1s."),
        bomb=torch_zip(b"\x80\2" + STATE + b".", zipfile.ZIP_DEFLATED, byteorder=bytes(300 << 20)),
        swollen=torch_zip(b"\x80\2" + STATE + b".", zipfile.ZIP_DEFLATED, **{"data/1": bytes(300 << 20)}),
        lzma=torch_zip(b"\x80\2" + STATE + b".", zipfile.ZIP_LZMA),
        system=torch_zip(b"\x80\2cos\nsystem\nX\4\0\0\0trueR."), reduce=torch_zip(b"\x80\2" + b"(" * 100_000 + b"."),
        memo=torch_zip(b"\x80\2Nr\xff\xff\xff\x7f."), integer=torch_zip(b"\x80\2\x8b\xff\xff\xff\x7f"),
        self_reference=torch_zip(b"\x80\2]q\0h\0a."), no_pickle=b"PK\5\6" + bytes(18),
    )  # fmt: skip


def torch_seeds(names: tuple[str, ...], folder: Path) -> list[bytes]:
    return [(FIXTURES / "torch" / name).read_bytes() for name in names]


def npz_seeds(folder: Path) -> list[bytes]:
    out = []
    for save_npz in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save_npz(
            stream, images=np.zeros((1, 4, 4, 3), np.float32), features=np.ones((1, 5), np.float32), meta='{"layout": "x"}'
        )
        out.append(stream.getvalue())
    return out


def read_npz_file(folder: Path, data: bytes) -> None:
    from icar_jax.convert.parity.verify import read_reference

    (folder / "x.npz").write_bytes(data)
    read_reference(folder / "x.npz")


def lying_npz(shape: tuple) -> bytes:
    header = (repr({"descr": "<f4", "fortran_order": False, "shape": shape}) + "\n").encode()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header)
    return out.getvalue()


def handmade_npz() -> dict[str, tuple[bytes, Any]]:
    return refused(lie=lying_npz((10**12,)), negative=lying_npz((-1,)), text=lying_npz(("a",)), deep=lying_npz((1,) * 50))


# Tokenizers


def tokenizer_seeds(folder: Path) -> list[bytes]:
    from icar_jax.data.tokenizer import Tokenizer

    return [Tokenizer.train(["a red ball", "two blue dogs"] * 3, 280).to_json().encode()]


def read_tokenizer(name: str, folder: Path, data: bytes) -> None:
    from icar_jax.data.tokenizer import Tokenizer

    (folder / name).write_bytes(data)
    tokenizer = Tokenizer.from_file(folder / name)
    ids, _ = tokenizer.encode(["a red ball", "", "\u00e9 \U0001f600"], 12)
    if ids.shape != (3, 12) or ids.min() < 0:
        raise WrongSilence(f"ids of shape {ids.shape}, the least is {ids.min()}")


def merges_seeds(folder: Path) -> list[bytes]:
    from tests.support.tokenizers import MERGES

    text = ("#version: 0.2\n" + "\n".join([*MERGES[:-1], "t o</w>", MERGES[-1]]) + "\n").encode()
    return [text, gzip.compress(text, mtime=0)]


def handmade_merges() -> dict[str, tuple[bytes, Any]]:
    return refused(
        bomb=gzip.compress(bytes(200 << 20), mtime=0), no_merges=b"#version: 0.2\n", cut=gzip.compress(b"#version")[:9]
    )


def sentencepiece_seeds(folder: Path) -> list[bytes]:
    from tests.support.tokenizers import sentencepiece_model

    return [sentencepiece_model()]


def read_sentencepiece(folder: Path, data: bytes) -> None:
    from icar_jax.convert.tokenizers import sentencepiece

    (folder / "spiece.model").write_bytes(data)
    sentencepiece.backend(folder / "spiece.model").encode("the dog \u00e9")


def vocab_seeds(folder: Path) -> list[bytes]:
    return ["\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "##s"]).encode()]


def read_vocab(folder: Path, data: bytes) -> None:
    from icar_jax.convert.fields import Fields
    from icar_jax.convert.tokenizers import wordpiece

    (folder / "vocab.txt").write_bytes(data)
    wordpiece.backend(folder / "vocab.txt", Fields("tokenizer_config.json")).encode("the dogs")

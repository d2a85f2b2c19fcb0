"""Every reader of files and settings, with valid inputs to change and handmade ones whose answer is known."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import io
import json
import math
import random
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from tests.support import odd_images, ratedfiles, shardfiles
from tests.support.fuzz.mutations import VALUES, change_bytes, change_json, change_lines
from tests.support.fuzz.reader import Reader, WrongSilence
from tests.support.image_folders import put_images, put_karpathy
from tests.support.places import FIXTURES

REFUSED = None
DEPTHS = b"[" * 200_000
NOT_OBJECTS = {"list": b"[]", "null": b"null", "number": b"3", "nested": DEPTHS, "empty": b"", "half": b'{"a": '}


def refused(**inputs: bytes) -> dict[str, tuple[bytes, Any]]:
    return {name: (data, REFUSED) for name, data in inputs.items()}


# Images


def read_image(folder: Path, data: bytes) -> tuple[int, int]:
    from icar_jax.data.images import decode

    (folder / "x.jpg").write_bytes(data)
    image = decode(folder / "x.jpg", at_least=64)
    if image.mode != "RGB" or image.tobytes() and len(image.tobytes()) != 3 * image.width * image.height:
        raise WrongSilence(f"decoded as {image.mode} {image.size}")
    return image.size


def image_seeds(folder: Path) -> list[bytes]:
    plain = odd_images.noise()
    made = [odd_images.saved(plain, name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]
    made += [odd_images.saved(plain, "JPEG", progressive=True), odd_images.saved(plain.convert("RGBA"), "PNG")]
    made += [odd_images.jpeg_with_exif(odd_images.exif_block([odd_images.turned(6)]), plain)]
    made += [odd_images.tiff(np.full((8, 8), 4000, np.uint16), 16, maximum=4095)]
    return made


def handmade_images() -> dict[str, tuple[bytes, Any]]:
    plain = odd_images.noise()
    jpeg = odd_images.saved(plain, "JPEG", quality=95)
    odd = {f"tag {name}": (odd_images.jpeg_with_exif(odd_images.exif_block([tag]), plain), (64, 48))
           for name, tag in odd_images.ODD_TAGS.items()}  # fmt: skip
    turned = odd_images.jpeg_with_exif(odd_images.exif_block([odd_images.turned(6)]), plain)
    return odd | refused(
        eps=odd_images.EPS, claim=odd_images.claiming(jpeg, 13_000, 13_000), scans=odd_images.many_scans(256, 2_000),
        tiff=odd_images.tiff_sharing(300, 20_000), cut=jpeg[: len(jpeg) // 2], empty=b"", svg=b"<svg/>",
        tall=odd_images.flat_png(1, 200_000_000 // 8, 8, 0)[:200],
    ) | {"turned": (turned, (48, 64))}  # fmt: skip


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


# Checkpoints of this package


def small_clip(folder: Path) -> Path:
    from tests.support import runs
    from tests.support.small_clip import ARCH

    return runs.random_clip(folder, dataclasses.replace(ARCH.vision, embed_dim=24, depth=2, exits=(1,)))


def small_scorer(folder: Path) -> Path:
    from icar_jax import checkpoint
    from icar_jax.data.images import Preprocess
    from icar_jax.models.complexity import ComplexityArch, ComplexityModel
    from icar_jax.models.convnext import ConvNeXtArch
    from tests.support import drawn

    arch = ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), "regression", 32)
    about = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    return checkpoint.write(folder, "complexity", about, drawn.params(ComplexityModel.graph(arch).shapes, 0))


def bundle_file(file: str, folder: Path) -> list[bytes]:
    """Writes a bundle, and returns the content of one of its files."""
    from icar_jax import checkpoint

    if not (folder / "bundle").exists():
        parts = small_clip(folder / "clip"), small_scorer(folder / "scorer")
        routing = {"exits": [1, 2], "thresholds": [0.5], "found": {"cost": 0.7}}
        checkpoint.write_bundle(folder / "bundle", {"routing": routing}, *parts)
    return [(folder / "bundle" / file).read_bytes()]


def read_bundle(file: str, folder: Path, data: bytes) -> None:
    from icar_jax.evaluation.routing.calibration import bundle_costs
    from icar_jax.inference.loading import load
    from icar_jax.inference.text_model import TextModel

    (folder / "bundle" / file).write_bytes(data)
    load(folder / "bundle")
    bundle_costs(folder / "bundle")
    TextModel.open(folder / "bundle" / "clip", batch_size=4, dtype="float32")


ABSURD = json.dumps({"format": 1, "kind": "clip", "arch": {"vision": {"depth": 10**9}}, "preprocess": {}}).encode()


def corpus_seeds(folder: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from icar_jax.inference.files.corpus import SCHEMA

    np.save(folder / "000000.npy", np.ones((2, 4), np.float16))
    row = {"path": "a.jpg", "sha256": "0", "complexity": 0.5, "exit": 1, "milliseconds": 1.0}
    pq.write_table(pa.Table.from_pylist([row, row], SCHEMA), folder / "000000.parquet")
    about = {"format": 1, "model": {"clip": "x"}, "encoding": {"exit": None}, "embed_dim": 4, "shard_rows": 2, "complete": True}
    return [json.dumps(about).encode()]


def read_corpus(folder: Path, data: bytes) -> list[int]:
    from icar_jax.inference.files.corpus import open_corpus

    (folder / "corpus.json").write_bytes(data)
    corpus = open_corpus(folder)
    return [len(corpus), corpus[:2].shape[1], corpus.rows().num_rows]


def shard_seeds(folder: Path) -> list[bytes]:
    (folder / "corpus.json").write_bytes(corpus_seeds(folder)[0])
    return [(folder / "000000.npy").read_bytes()]


def read_shard(folder: Path, data: bytes) -> None:
    from icar_jax.inference.files.corpus import open_corpus

    (folder / "000000.npy").write_bytes(data)
    corpus = open_corpus(folder)
    corpus[: len(corpus)]


# Configurations


def run_seeds(folder: Path) -> list[bytes]:
    from icar_jax.config import to_json
    from tests.support.runs import tiny_config

    return [to_json(tiny_config()).encode(), to_json(tiny_config("complexity")).encode()]


def read_run(folder: Path, data: bytes) -> None:
    from icar_jax.config import validate
    from icar_jax.workdir import load_config

    (folder / "config.json").write_bytes(data)
    validate(load_config(folder))


def setting_seeds(folder: Path) -> list[bytes]:
    return [b'["config.optim.lr", 0.001]']


def change_setting(rng: random.Random, seeds: list[bytes]) -> tuple[bytes, str]:
    names = [name for name, _ in settings()]
    hostile = [math.inf, -math.inf, math.nan, 1e300, -1e300, 10**24, -(10**24), 2**63, 99_999_999_999]
    value = rng.choice(hostile if rng.random() < 0.5 else VALUES)
    return json.dumps([rng.choice(names), [value] if rng.random() < 0.2 else value]).encode(), "setting"


@functools.cache
def settings() -> list[tuple[str, Any]]:
    """(name, default) of every field."""
    from icar_jax.config import ExperimentConfig

    def below(node: Any, prefix: str) -> list[tuple[str, Any]]:
        pairs = [(f"{prefix}.{f.name}", getattr(node, f.name)) for f in dataclasses.fields(node)]
        return [
            each
            for name, value in pairs
            for each in (below(value, name) if dataclasses.is_dataclass(value) else [(name, value)])
        ]

    return below(ExperimentConfig(), "config")


def read_setting(folder: Path, data: bytes) -> None:
    from icar_jax.config import ExperimentConfig, validate

    name, value = json.loads(data)
    config = node = ExperimentConfig()
    *groups, field = name.split(".")[1:]
    for group in groups:
        node = getattr(node, group)
    setattr(node, field, tuple(value) if isinstance(value, list) else value)
    validate(config)
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
    if any(not abs(number) <= 1e12 for number in numbers):
        raise WrongSilence(f"{name}={value} is accepted")


# Captions, ratings, labels, shards


def captions(kind: str, folder: Path) -> list[bytes]:
    put_images(folder / "images", ["a.png", "b.png", "c.png"])
    if kind == "json":
        put_karpathy(folder, [("a.png", "train", ["one"], {}), ("b.png", "val", ["two", "zwei"], {"filepath": ""})])
        return [(folder / "dataset_tiny.json").read_bytes()]
    if kind == "csv":
        return [b'file,caption,split\na.png,one,train\nb.png,"two, or so",val\n']
    return [b'{"file": "a.png", "caption": "one"}\n{"file": "b.png", "caption": ["two", "zwei"], "split": "val"}\n']


def read_captions(file: str, folder: Path, data: bytes) -> list:
    from icar_jax.data.sources.folders import open_folder

    (folder / file).write_bytes(data)
    source = open_folder(folder, None)
    return [[record.name, list(record.captions), record.image().size] for record in map(source.__getitem__, range(len(source)))]


def rating_seeds(kind: str, folder: Path) -> list[bytes]:
    ratedfiles.images(folder / "images", 3)
    if kind == "json":
        return [b'{"0 a.jpg": 0.1, "1 a.jpg": 0.5, "2 a.jpg": 0.9}', b'{"0 a.jpg": 0, "1 a.jpg": 1, "2 a.jpg": -1}']
    if kind == "csv":
        return [b"file,score\n0 a.jpg,0.1\n1 a.jpg,0.5\n2 a.jpg,0.9\n"]
    return [b"0 a.jpg  0.1\n1 a.jpg  0.5\n2 a.jpg  0.9\n"]


def read_rating_file(file: str, folder: Path, data: bytes) -> None:
    from icar_jax.data.ratings.table import read_ratings

    (folder / file).write_bytes(data)
    found = read_ratings(folder / file)
    if any(not 0 <= score <= 1 for score in found.scores.values()):
        raise WrongSilence(f"scores {found.scores}")


def read_label_file(folder: Path, data: bytes) -> None:
    from icar_jax.data.ratings.labels import read_labels

    (folder / "labels.json").write_bytes(data)
    read_labels(folder / "labels.json")


def label_seeds(folder: Path) -> list[bytes]:
    return [b'{"a.jpg": ["cat", "dog"], "b.jpg": {"categories": ["cat"]}, "c.jpg": []}']


def tar_seeds(folder: Path) -> list[bytes]:
    return [shardfiles.write_shards(folder / "shards", 1, 3).joinpath("00000.tar").read_bytes()]


def read_tar(folder: Path, data: bytes) -> None:
    from icar_jax.data.sources.webdataset import WebDataset

    for index in (folder / "shards").glob(".icar_index_*"):
        index.unlink()
    (folder / "shards" / "00000.tar").write_bytes(data)
    source = WebDataset(str(folder / "shards"))
    for i in range(len(source)):
        source[i].image()


def parquet_seeds(folder: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    stream = io.BytesIO()
    rows = [{"image": shardfiles.picture(n), "caption": f"picture {n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), stream)
    (folder / "rows").mkdir(exist_ok=True)
    return [stream.getvalue()]


def read_parquet(folder: Path, data: bytes) -> None:
    from icar_jax.data.sources.parquet import Parquet

    (folder / "rows" / "0.parquet").write_bytes(data)
    source = Parquet(str(folder / "rows"))
    for i in range(min(len(source), 10)):
        source[i].image()


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

    text = ("#version: 0.2\n" + "\n".join(MERGES) + "\n").encode()
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


# Weights of other libraries with their configuration

SOURCES = {
    "hf_gelu": ("config.json", "preprocessor_config.json"), "siglip": ("config.json", "preprocessor_config.json"),
    "open_clip_gelu": ("open_clip_config.json",), "timm_vit": ("config.json",), "hf_dinov2": ("config.json",),
    "bert": ("config.json",),
}  # fmt: skip


def source_seeds(case: str, file: str, folder: Path) -> list[bytes]:
    from tests.support import parity_cases

    parity_cases.write_source(parity_cases.load(case), folder / "source")
    found = folder / "source" / file
    return [found.read_bytes()]


def read_source(case: str, file: str, folder: Path, data: bytes) -> None:
    from icar_jax.convert import convert
    from tests.support import parity_cases

    (folder / "source" / file).write_bytes(data)
    convert.in_memory(folder / "source", convert.Options(**parity_cases.load(case).options))


def _sources() -> list[Reader]:
    return [
        Reader(f"{case} {file}", functools.partial(source_seeds, case, file), functools.partial(read_source, case, file),
               change_json, make_handmade=functools.partial(refused, **NOT_OBJECTS))
        for case, files in SOURCES.items() for file in files
    ]  # fmt: skip


# Filters of searches


def filter_seeds(folder: Path) -> list[bytes]:
    return [b"path LIKE '%.jpg' AND (complexity > 0.5 OR exit IN (3, 6))", b"sha256 = 'ab''c'"]


def read_filter(folder: Path, data: bytes) -> None:
    from icar_jax.search import filters

    filters.fault_of(data.decode("utf-8", "replace"))


def make_readers() -> list[Reader]:
    p = functools.partial
    json_faults = p(refused, **NOT_OBJECTS)
    bundle = [
        Reader(
            f"bundle {file}", p(bundle_file, file), p(read_bundle, file), change, refuses_changes=hashed, make_handmade=cases
        )
        for file, change, hashed, cases in (
            ("icar.json", change_json, False, p(refused, **NOT_OBJECTS, depth=ABSURD)),
            ("clip/icar.json", change_json, False, p(refused, **NOT_OBJECTS, depth=ABSURD)),
            ("complexity/icar.json", change_json, False, p(refused, **NOT_OBJECTS, depth=ABSURD)),
            ("clip/params.safetensors", change_bytes, True, dict),
            ("clip/tokenizer.json", change_json, True, dict),
        )
    ]
    torch = ("zip.pt", "legacy.bin", "nested.pt", "nested_legacy.bin", "untyped.pt", "script.pt", "trace.pt")
    return [
        Reader("images", image_seeds, read_image, change_bytes, 1_700, refuses_cut=True, make_handmade=handmade_images),
        Reader("safetensors", safetensors_seeds, read_weight_file, change_bytes, refuses_cut=True,
               make_handmade=handmade_safetensors),
        Reader("torch", p(_torch_seeds, torch), read_weight_file, change_bytes, 512, refuses_cut=True,
               make_handmade=handmade_torch),
        Reader("npz", npz_seeds, read_npz_file, change_bytes, refuses_cut=True,
               make_handmade=handmade_npz),
        *bundle,
        Reader("corpus.json", corpus_seeds, read_corpus, change_json, make_handmade=json_faults),
        Reader("corpus shard", shard_seeds, read_shard, change_bytes, refuses_cut=True),
        Reader("config.json", run_seeds, read_run, change_json, make_handmade=json_faults),
        Reader("settings", setting_seeds, read_setting, change_setting),
        Reader("captions.json", p(captions, "json"), p(read_captions, "dataset_tiny.json"), change_json,
               make_handmade=json_faults),
        Reader("captions.csv", p(captions, "csv"), p(read_captions, "captions.csv"), change_lines),
        Reader("captions.jsonl", p(captions, "jsonl"), p(read_captions, "captions.jsonl"), change_lines,
               make_handmade=p(refused, nested=DEPTHS, list=b"[]")),
        *(Reader(f"ratings.{kind}", p(rating_seeds, kind), p(read_rating_file, f"labels.{kind}"), change)
          for kind, change in (("json", change_json), ("csv", change_lines), ("txt", change_lines))),
        Reader("labels", label_seeds, read_label_file, change_json,
               make_handmade=p(refused, list=b"[]", nested=DEPTHS, number=b"3")),
        Reader("tar", tar_seeds, read_tar, change_bytes, 1_700),
        Reader("parquet", parquet_seeds, read_parquet, change_bytes, 1_700, refuses_cut=True),
        Reader("tokenizer.json", tokenizer_seeds, p(read_tokenizer, "tokenizer.json"), change_json, 512),
        Reader("merges", merges_seeds, p(read_tokenizer, "merges.txt.gz"), change_bytes, 512,
               make_handmade=handmade_merges),
        Reader("sentencepiece", sentencepiece_seeds, read_sentencepiece, change_bytes),
        Reader("vocab.txt", vocab_seeds, read_vocab, change_lines),
        *_sources(),
        Reader("filters", filter_seeds, read_filter, change_bytes),
    ]  # fmt: skip


def _torch_seeds(names: tuple[str, ...], folder: Path) -> list[bytes]:
    return [(FIXTURES / "torch" / name).read_bytes() for name in names]


READERS = {reader.name: reader for reader in make_readers()}

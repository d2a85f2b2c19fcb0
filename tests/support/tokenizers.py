"""Small tokenizers and sources of the tests."""

import gzip
import struct
import tempfile
from pathlib import Path

from icar_jax.convert.files.tensors import Weights
from icar_jax.convert.layouts.base import Source
from icar_jax.data.tokenizer import Tokenizer

MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "Ã ©</w>", "r e", "re d</w>", "d o", "do g</w>", "p h", "ph o", "pho to</w>"]


def clip_tokenizer():
    """A tokenizer of CLIP's kind with a few merges."""
    merges = [*MERGES[:-1], "t o</w>", "pho to</w>"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bpe_simple_vocab_16e6.txt.gz"
        file.write_bytes(gzip.compress(b'"bpe_simple_vocab_16e6.txt#version: 0.2\n' + "\n".join(merges).encode() + b"\n"))
        return Tokenizer.from_file(file)


def source_of(folder, text_cfg):
    """A source without weights beside an OpenCLIP config with this text_cfg."""
    configs = {"open_clip_config.json": {"model_cfg": {"text_cfg": text_cfg}}}
    return Source(folder, "open_clip", Weights(folder / "model.bin", "torch", {}, {}), configs)


PIECES = [
    ("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("\u2581", -3, 1), ("\u2581the", -2, 1), ("\u2581d", -4, 1),
    ("og", -4.5, 1), ("\u2581dog", -8.8, 1), ("t", -6, 1), ("h", -6, 1), ("e", -5, 1), ("d", -6, 1), ("o", -6, 1),
    ("g", -6, 1), ("he", -7, 1),
]  # fmt: skip


def varint(number):
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_model(pieces=PIECES, kind=1, **normalizer):
    """A SentencePiece model as the library would write it."""
    made = b"".join(
        field(1, field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, type))
        for text, score, type in pieces
    )
    spec = b"".join(field({"dummy_prefix": 3, "trims": 4}[name], int(value)) for name, value in normalizer.items())
    return made + field(2, field(3, kind)) + field(3, spec)


def model_file(path, *args, **options):
    """Writes `sentencepiece_model`; returns the path."""
    path.write_bytes(sentencepiece_model(*args, **options))
    return path

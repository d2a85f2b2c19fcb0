"""Small tokenizers and sources of the tests."""

import gzip
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

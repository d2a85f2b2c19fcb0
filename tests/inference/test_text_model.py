"""The text side of a CLIP alone, from its traced program."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

import icar_jax
from icar_jax import cli
from icar_jax.inference import ahead
from icar_jax.inference.text_model import TextModel
from icar_jax.search.model_process import FACTS, ModelProcess

TEXTS = ["a cat", "a", "word " * 100]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ICAR_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def same(text_model, folder):
    model = icar_jax.load(folder, batch_size=4)
    for name in FACTS:
        assert getattr(text_model, name) == getattr(model, name), name
    np.testing.assert_allclose(text_model.encode_text(TEXTS, warn=False), model.encode_text(TEXTS, warn=False), atol=1e-6)
    assert (
        [text_model.is_too_long(text) for text in TEXTS] == [model.is_too_long(text) for text in TEXTS] == [False, False, True]
    )
    assert text_model.encode_text([]).shape == (0, model.embed_dim)


def test_one_search_keeps_the_program_for_the_next(clip_folder, cache, monkeypatch):
    assert TextModel.open(clip_folder, batch_size=4, dtype="float32") is None
    with ModelProcess() as process:
        process.load(clip_folder, batch_size=4, dtype="float32")
        whole = process.encode_text(TEXTS, warn=False)
    assert len(list((cache / "programs").glob("*/text-*.stablehlo"))) == 1
    alone = TextModel.open(clip_folder, batch_size=4, dtype="float32")
    same(alone, clip_folder)
    np.testing.assert_allclose(alone.encode_text(TEXTS, warn=False), whole, atol=1e-6)
    assert TextModel.open(clip_folder, batch_size=4, dtype="bfloat16") is None, "another dtype has another program"
    code = (
        "import sys; from pathlib import Path; from icar_jax.inference.text_model import TextModel\n"
        f"model = TextModel.open(Path({str(clip_folder)!r}), batch_size=4, dtype='float32')\n"
        "print(model.encode_text(['a cat']).shape, 'flax' in sys.modules, 'PIL' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[0] == "(1, 24) False False"
    image = np.zeros((40, 40, 3), np.uint8)
    with ModelProcess() as process:  # the vision tower is loaded when an image comes
        process.load(clip_folder, batch_size=4, dtype="float32")
        expected = icar_jax.load(clip_folder, batch_size=4).encode_image([image], exit=3)
        np.testing.assert_allclose(process.encode_image([image], exit=3), expected, atol=1e-6)


def test_a_kept_program_is_replaced_where_it_is_damaged_or_the_code_has_changed(clip_folder, cache, monkeypatch):
    def search():
        with ModelProcess() as process:
            return process.load(clip_folder, batch_size=4, dtype="float32").encode_text(TEXTS, warn=False)

    expected = search()
    (kept,) = (cache / "programs").glob("*/text-*.stablehlo")
    content = kept.read_bytes()
    middle = len(content) // 2
    for damaged in (content[:middle] + bytes(60) + content[middle + 60 :], b"nothing", b""):
        kept.write_bytes(damaged)
        np.testing.assert_allclose(search(), expected, atol=1e-6)
        assert kept.read_bytes() != damaged, "the next search has a good one"
        assert TextModel.open(clip_folder, batch_size=4, dtype="float32") is not None
    monkeypatch.setattr(ahead, "_sources", lambda: "other code")
    assert TextModel.open(clip_folder, batch_size=4, dtype="float32") is None


def test_the_program_of_icar_compile_is_used(clip_folder, tmp_path):
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    assert TextModel.open(folder, batch_size=4, dtype="float32") is None
    cli.main(["compile", str(folder), "--platforms", "cpu"])
    same(TextModel.open(folder, batch_size=4, dtype="float32"), folder)


@pytest.mark.parametrize("damage", ["weights", "description", "program", "tokenizer", "kind"])
def test_what_is_unusual_is_left_to_the_whole_model(damage, clip_folder, complexity_folder, tmp_path, cache):
    if damage == "kind":
        assert TextModel.open(complexity_folder, batch_size=4, dtype="float32") is None
        return
    folder = shutil.copytree(clip_folder, tmp_path / "clip")
    cli.main(["compile", str(folder), "--platforms", "cpu"])
    if damage == "description":
        file = folder / "icar.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "arch": {}}))
    elif damage == "program":
        (folder / "programs" / "text.stablehlo").write_bytes(b"nothing")
    elif damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    else:
        weights = folder / "params.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert TextModel.open(folder, batch_size=4, dtype="float32") is None

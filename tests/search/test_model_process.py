"""A model in a process of its own answers as one in this process."""

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax.checkpoint import CheckpointError
from icar_jax.errors import ModelError
from icar_jax.search.model_process import FACTS, ModelProcess


@pytest.fixture(scope="module")
def process(clip_folder):
    with ModelProcess() as started:
        yield started.load(clip_folder, batch_size=4, dtype="float32")


def test_it_answers_as_the_model_itself(process, clip_folder):
    model = icar_jax.load(clip_folder, batch_size=4)
    for name in FACTS:
        assert getattr(process, name) == getattr(model, name), name
    texts = ["a cat", "two dogs on a red sofa"]
    np.testing.assert_allclose(process.encode_text(texts), model.encode_text(texts), atol=1e-6)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    np.testing.assert_allclose(process.encode_image([image], exit=3), model.encode_image([image], exit=3), atol=1e-6)
    long = "word " * 200
    assert process.is_too_long(long) and not process.is_too_long("a cat")
    assert model.is_too_long(long) and not model.is_too_long("a cat")


def test_its_errors_are_those_of_the_model(process, tmp_path):
    with pytest.raises(CheckpointError, match="no-such"):
        process.load(tmp_path / "no-such", batch_size=4, dtype="float32")
    with pytest.raises(FileNotFoundError):
        process.encode_image([tmp_path / "none.png"])
    with pytest.raises(RuntimeError, match=r"(?s)in the process that runs the model:.*Traceback.*TypeError"):
        process.encode_text([3])
    assert process.encode_text(["it goes on"]).shape == (1, 24)


def test_a_process_that_is_killed_is_named():
    with ModelProcess() as process:
        process._process.kill()
        with pytest.raises(ModelError, match=r"ended with status -9 \(out of memory\?\)"):
            process.encode_text(["a cat"])
    assert process._process.returncode == -9


def test_it_ends_with_its_caller():
    with ModelProcess() as process:
        child = process._process
        assert child.poll() is None
    assert child.poll() is not None


def test_it_imports_nothing_from_the_current_folder(clip_folder, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise SystemExit('the current folder')")
    monkeypatch.chdir(tmp_path)
    with ModelProcess() as process:
        assert process.load(clip_folder, batch_size=4, dtype="float32").exits == (1, 2, 3)

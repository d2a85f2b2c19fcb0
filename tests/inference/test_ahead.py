"""Programs written by `icar compile`."""

import json
import shutil

import jax
import numpy as np
import pytest

import icar_jax
from icar_jax import cli
from icar_jax.inference import ahead
from icar_jax.models.clip import Clip
from tests.support.places import ROOT

IMAGES = list(np.random.default_rng(0).integers(0, 256, (5, 40, 50, 3), np.uint8))
TEXTS = ["a cat", "two dogs on a red sofa"]


@pytest.fixture(scope="module", params=["bundle_complexity", "bundle_blocks"])
def written(request, tmp_path_factory):
    """A bundle with its programs."""
    folder = tmp_path_factory.mktemp("ahead") / "bundle"
    shutil.copytree(ROOT / "tests" / "fixtures" / "format_1" / request.param, folder)
    cli.main(["compile", str(folder)])
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def outputs(model):
    routed = model.route(IMAGES)
    first = model.encode_image(IMAGES, exit=model.exits[0])
    return [model.encode_text(TEXTS), first, routed.embeddings, routed.scores, model.score(IMAGES)]


def same(model, other):
    for a, b in zip(outputs(model), outputs(other), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)


def test_they_give_the_same_outputs_without_tracing_the_model(written, monkeypatch):
    plain = icar_jax.load(written, batch_size=8, programs=ahead.Programs())
    expected = outputs(plain)

    def traced(*_, **__):
        raise AssertionError("the model was traced")

    monkeypatch.setattr(Clip, "encode_text", traced)
    monkeypatch.setattr(Clip, "encode_image", traced)
    monkeypatch.setattr(Clip, "encode_tokens", traced)
    model = icar_jax.load(written, batch_size=8)
    for found, wanted in zip(outputs(model), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_the_clip_of_a_bundle_uses_the_programs_of_the_bundle(written, monkeypatch):
    monkeypatch.setattr(Clip, "encode_text", None)
    model = icar_jax.load(written / "clip")
    assert isinstance(model._programs, ahead.WrittenPrograms) and model.encode_text(TEXTS).shape == (2, model.embed_dim)


@pytest.mark.parametrize("change, why", [
    ({"version": "0.0.1"}, "made by icar_jax 0.0.1"), ({"identity": {"clip": "x"}}, "made for other weights"),
    ({"code": "x"}, "traced with other code"), ({"dtype": "bfloat16"}, "compute in bfloat16, not in float32"),
    ({"platforms": ["tpu"]}, "made for tpu, and this is cpu"),
    ({"platforms": None}, "cannot be read"), ([], "cannot be read"),
])  # fmt: skip
def test_programs_that_do_not_fit_are_ignored_with_a_note(copy, change, why, caplog):
    file = copy / "programs" / "programs.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change if change else change))
    model = icar_jax.load(copy, batch_size=8)
    assert type(model._programs) is ahead.Programs
    assert why in caplog.text and "`icar compile` makes them again" in caplog.text
    assert model.encode_text(TEXTS).shape == (2, model.embed_dim)


def test_a_damaged_or_missing_program_is_traced(copy, caplog):
    plain = icar_jax.load(copy, batch_size=8, programs=ahead.Programs())
    (copy / "programs" / "text.stablehlo").write_bytes(b"nothing")
    for file in (copy / "programs").glob("image_*"):
        file.unlink()
    same(icar_jax.load(copy, batch_size=8), plain)
    assert "text.stablehlo is not used: it cannot be read" in caplog.text


def test_a_changed_module_is_traced(copy):
    model = icar_jax.load(copy / "clip", batch_size=8)
    before = model.encode_text(TEXTS)
    kernel = model.clip.text.blocks[0].mlp.fc1.kernel
    kernel[...] = jax.random.normal(jax.random.key(0), kernel.shape)
    assert np.abs(model.encode_text(TEXTS) - before).max() > 0.01


def test_they_are_written_again_as_a_whole(copy, capsys):
    (copy / "programs" / "image_99.stablehlo").write_bytes(b"old")
    cli.main(["compile", str(copy), "--platforms", "cpu", "--dtype", "bfloat16"])
    assert "for cpu" in capsys.readouterr().out
    assert not (copy / "programs" / "image_99.stablehlo").exists() and not list(copy.glob(".programs*"))
    model = icar_jax.load(copy, batch_size=8, dtype="bfloat16")
    assert isinstance(model._programs, ahead.WrittenPrograms)
    same(model, icar_jax.load(copy, batch_size=8, dtype="bfloat16", programs=ahead.Programs()))
    with pytest.raises(SystemExit):
        cli.main(["compile", str(copy), "--platforms", "gpu"])
    assert "--platforms gpu: expected some of cpu, cuda" in capsys.readouterr().err

"""The self-describing checkpoint: whole or not at all, damage is named, strings stay in order."""

import json
import os
import shutil

import numpy as np
import pytest

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import CheckpointError

PARAMS = {"blocks": {str(i): {"w": np.full((2, 3), float(i), np.float32)} for i in range(12)}, "scale": np.float32(3)}


@pytest.fixture
def folder(tmp_path):
    return checkpoint.write(tmp_path / "model", "clip", {"arch": {"depth": 12}}, PARAMS, tokenizer="{}")


def test_round_trip_with_twelve_blocks(folder):
    loaded = checkpoint.read(folder, "clip")
    assert loaded.description["arch"] == {"depth": 12} and loaded.tokenizer == "{}"
    assert list(loaded.params["blocks"]) == [str(i) for i in range(12)]
    for path, leaf in pytree.flatten(PARAMS).items():
        found = pytree.flatten(loaded.params)[path]
        assert found.shape == np.shape(leaf)
        np.testing.assert_array_equal(found, leaf)


def test_non_finite_parameters_are_refused_and_the_old_checkpoint_stays(folder):
    before = checkpoint.sha256(folder / checkpoint.WEIGHTS)
    broken = {**PARAMS, "scale": np.float32("nan")}
    with pytest.raises(ValueError, match="not finite: scale"):
        checkpoint.write(folder, "clip", {}, broken)
    assert checkpoint.sha256(folder / checkpoint.WEIGHTS) == before
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.tensorfile, "write", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.write(tmp_path / "model", "clip", {}, PARAMS)
    assert list(tmp_path.iterdir()) == []


def test_rewriting_replaces_the_whole_folder(folder):
    checkpoint.write(folder, "clip", {"arch": {"depth": 1}}, {"scale": np.float32(1)})
    loaded = checkpoint.read(folder, "clip")
    assert loaded.tokenizer is None and list(loaded.params) == ["scale"]


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        checkpoint.write(tmp_path / "photos", "clip", {}, PARAMS)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_checkpoint_of_another_kind_is_not_overwritten(folder):
    before = checkpoint.sha256(folder / checkpoint.WEIGHTS)
    with pytest.raises(CheckpointError, match="is a checkpoint of kind 'clip', not 'complexity'"):
        checkpoint.write(folder, "complexity", {}, PARAMS)
    with pytest.raises(CheckpointError, match="not 'bundle'"):
        checkpoint.write_bundle(folder, {}, folder, folder)
    assert checkpoint.sha256(folder / checkpoint.WEIGHTS) == before


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_permissions_follow_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        checkpoint.write(tmp_path / "model", "clip", {}, PARAMS)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model", *(tmp_path / "model").iterdir())}
    assert modes == {name: (0o777 if name == "model" else 0o666) & ~mask for name in modes} and len(modes) == 3


def test_damage_is_named(folder):
    data = (folder / checkpoint.WEIGHTS).read_bytes()
    (folder / checkpoint.WEIGHTS).write_bytes(data[:-4])
    with pytest.raises(CheckpointError, match="params.safetensors is damaged"):
        checkpoint.read(folder, "clip")
    (folder / checkpoint.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="has no params.safetensors"):
        checkpoint.read(folder, "clip")


@pytest.mark.parametrize("text", ["not json", json.dumps({"format": 99, "kind": "clip"}), json.dumps({"format": 1})])
def test_unreadable_descriptions(folder, text):
    (folder / checkpoint.DESCRIPTION).write_text(text)
    with pytest.raises(CheckpointError, match="icar.json"):
        checkpoint.read(folder, "clip")


def test_wrong_kind(folder):
    with pytest.raises(CheckpointError, match="of kind 'clip', expected 'complexity'"):
        checkpoint.read(folder, "complexity")


def test_find_accepts_a_checkpoint_a_workdir_and_prefers_the_bundle(folder, tmp_path):
    assert checkpoint.find(folder) == folder
    assert checkpoint.find(tmp_path) == folder
    with pytest.raises(CheckpointError, match=r"no checkpoint of kind complexity .* found .*model \(clip\)"):
        checkpoint.find(tmp_path, ("complexity",))
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    bundle = checkpoint.write_bundle(tmp_path / "bundle", {"routing": {}}, folder, other)
    assert checkpoint.find(tmp_path) == bundle
    assert checkpoint.find(tmp_path, ("clip",)) == folder


def test_find_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        checkpoint.find(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no icar.json"):
        checkpoint.find(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="is not finished"):
        checkpoint.find(tmp_path)


def test_the_best_model_of_a_finished_complexity_run_goes_first(tmp_path):
    best = checkpoint.write(tmp_path / "best", "complexity", {}, PARAMS)
    with pytest.raises(CheckpointError):
        checkpoint.find(tmp_path)  # not finished
    model = checkpoint.write(tmp_path / "model", "complexity", {}, PARAMS)
    assert checkpoint.find(tmp_path) == best and checkpoint.find(model) == model
    assert checkpoint.find(best) == best


def test_the_best_model_of_a_clip_run_is_asked_for_by_name(tmp_path):
    best = checkpoint.write(tmp_path / "best", "clip", {}, PARAMS)
    model = checkpoint.write(tmp_path / "model", "clip", {}, PARAMS)
    assert checkpoint.find(tmp_path) == model and checkpoint.find(best) == best

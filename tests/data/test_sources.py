"""Training, calibration and evaluation never share an image."""

import json

import numpy as np
import pytest
from PIL import Image

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data import configured


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    images = []
    for i in range(30):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
        split = "val" if i % 3 == 0 else "train"
        images.append({"filename": f"{i}.png", "split": split, "sentences": [{"raw": f"picture {i}"}, {"raw": "any"}]})
    (tmp_path / "dataset_small.json").write_text(json.dumps({"images": images, "dataset": "small"}))
    return tmp_path


def names(source):
    return {source[i].name for i in range(len(source))}


@pytest.mark.parametrize("kind", ["scenes", "folder"])
def test_the_three_parts_are_disjoint_and_stable(kind, folder):
    data = DataConfig(source=kind, root=str(folder), calibration_size=5, scenes_size=50)
    held_out = EvalConfig(split="val", size=20)
    parts = [
        names(configured.train_source(data)),
        names(configured.calibration_source(data)),
        names(configured.eval_source(data, held_out)),
    ]
    assert len(parts[1]) == 5 and all(parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert names(configured.calibration_source(data)) == parts[1]
    if kind == "folder":
        assert len(parts[0] | parts[1]) == 20 and len(parts[2]) == 10


def test_scenes_of_the_parts_differ_in_content(folder):
    """Names do not identify rendered scenes, so contents are compared: no scene is in two parts."""
    data = DataConfig(source="scenes", calibration_size=100, scenes_size=300)
    held_out = configured.eval_source(data, EvalConfig(size=100))
    all_parts = [configured.train_source(data), configured.calibration_source(data), held_out]
    pictures = [{np.asarray(part[i].image()).tobytes() for i in range(len(part))} for part in all_parts]
    assert not pictures[0] & pictures[1] and not pictures[0] & pictures[2] and not pictures[1] & pictures[2]


@pytest.mark.parametrize(
    "train, split",
    [("train", "train"), ("train", "calibration"), ("train+val", "val"), ("train", "train+val"), ("train", "val+train")],
)
def test_evaluating_on_what_was_trained_on_is_refused(train, split, folder):
    data = DataConfig(source="folder", root=str(folder), train_split=train)
    with pytest.raises(ConfigError, match="not held out"):
        configured.eval_source(data, EvalConfig(split=split))


def test_captions_without_splits_are_split_by_name(tmp_path):
    rows = ["file,caption"]
    for i in range(60):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(tmp_path / f"{i}.png")
        rows.append(f"{i}.png,picture {i}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    data = DataConfig(source="folder", root=str(tmp_path), calibration_size=5)
    parts = [configured.train_source(data), configured.calibration_source(data), configured.eval_source(data, EvalConfig())]
    found = [names(part) for part in parts]
    assert sum(map(len, found)) == 60 == len(set.union(*found)) and all(found)


def test_the_fingerprint_follows_the_images(folder):
    data = DataConfig(source="folder", root=str(folder), calibration_size=5)
    before = configured.fingerprint(configured.train_source(data))
    assert before == configured.fingerprint(configured.train_source(data)) and before["images"] == 15
    for i in (1, 2):  # at most one of two neighbours in 'train' is a calibration image, which does not count
        (folder / "images" / f"{i}.png").unlink()
    assert configured.fingerprint(configured.train_source(data)) != before
    scenes = DataConfig(source="scenes", scenes_size=10)
    assert configured.fingerprint(configured.train_source(scenes))["images"] == 10


def test_a_calibration_size_of_everything_is_refused(folder):
    data = DataConfig(source="folder", root=str(folder), calibration_size=20)
    with pytest.raises(ConfigError, match="calibration_size=20 leaves nothing to train on: .* 20 images"):
        configured.train_source(data)

"""Training, calibration and evaluation never share an image."""

import json

import numpy as np
import pytest
from PIL import Image

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data import sources


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


@pytest.mark.parametrize("kind", ["scenes", "karpathy"])
def test_the_three_parts_are_disjoint_and_stable(kind, folder):
    data = DataConfig(source=kind, root=str(folder), calibration_size=5, scenes_size=50)
    held_out = EvalConfig(split="val", size=20)
    parts = [
        names(sources.train_source(data)),
        names(sources.calibration_source(data)),
        names(sources.eval_source(data, held_out)),
    ]
    assert len(parts[1]) == 5 and all(parts)
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert names(sources.calibration_source(data)) == parts[1]
    if kind == "karpathy":
        assert len(parts[0] | parts[1]) == 20 and len(parts[2]) == 10


def test_scenes_of_the_parts_differ_in_content(folder):
    """Names say little where pictures are drawn: no scene of one part is drawn again in another."""
    data = DataConfig(source="scenes", calibration_size=100, scenes_size=300)
    all_parts = [sources.train_source(data), sources.calibration_source(data), sources.eval_source(data, EvalConfig(size=100))]
    pictures = [{np.asarray(part[i].image()).tobytes() for i in range(len(part))} for part in all_parts]
    assert not pictures[0] & pictures[1] and not pictures[0] & pictures[2] and not pictures[1] & pictures[2]


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_evaluating_on_what_was_trained_on_is_refused(split, folder):
    with pytest.raises(ConfigError, match="not held out"):
        sources.eval_source(DataConfig(source="karpathy", root=str(folder)), EvalConfig(split=split))


def test_a_calibration_part_that_takes_everything_is_refused(folder):
    data = DataConfig(source="karpathy", root=str(folder), calibration_size=20)
    with pytest.raises(ConfigError, match="calibration_size=20 leaves nothing to train on: .* 20 images"):
        sources.train_source(data)

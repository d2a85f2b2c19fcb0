"""experiments/retention/shaded_scenes.py: photograph-textured scenes, and the image sets of the study."""

import numpy as np
import pytest
from PIL import Image

from experiments.retention import (
    recipes,
    rows,
    shaded_scenes,
)
from icar_jax.config import ConfigError
from icar_jax.data.records import record_names
from icar_jax.data.scenes import Scenes
from icar_jax.data.sources.folders import CaptionFolder
from tests.support.image_folders import put_images, put_karpathy
from tests.support.runs import tiny_config


@pytest.fixture
def photos(tmp_path):
    """Six training photographs and one held-out photograph of 12 by 8 pixels."""
    names = [f"{i}.png" for i in range(7)]
    put_images(tmp_path / "photos" / "images", names)
    entries = [(name, "val" if i == 6 else "train", ["Two dogs run .", "Dogs."], {}) for i, name in enumerate(names)]
    put_karpathy(tmp_path / "photos", entries)
    return tmp_path / "photos"


def test_each_photograph_textures_scenes_of_one_split(photos, tmp_path):
    folder = tmp_path / "shaded"
    shaded_scenes.write_scenes(photos, folder, 64, queries=6, distractors=7)
    parts = {split: CaptionFolder(str(folder), split) for split in shaded_scenes.TIMES}
    # The `val` photograph and one of `train` make the queries, two make the distractors, three the training images.
    assert {split: len(part) for split, part in parts.items()} == {"train": 30, "test": 7, "val": 6}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos", "shaded"]  # no temporary folders are left
    first, scene = parts["val"][0], Scenes("val", 2)[0]
    assert first.captions == scene.captions and first.image().size == (64, 64)
    assert first.image().tobytes() != scene.image().tobytes()
    before = (folder / shaded_scenes.FILE).stat().st_mtime_ns
    shaded_scenes.write_scenes(photos, folder, 64, queries=6, distractors=7)
    assert (folder / shaded_scenes.FILE).stat().st_mtime_ns == before


def test_the_brightness_map_of_a_photograph():
    shades = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    light = shaded_scenes.brightness_map(Image.fromarray(shades).convert("RGB"), 64)
    assert light.shape == (64, 64) and light.dtype == np.float32 and (np.diff(light, axis=1) >= 0).all()
    np.testing.assert_allclose([light.min(), light.max()], [shaded_scenes.DARKEST, shaded_scenes.BRIGHTEST], rtol=1e-6)


def test_scenes_from_other_photographs_are_refused(photos, tmp_path):
    shaded_scenes.write_scenes(photos, tmp_path / "shaded", 64, queries=6, distractors=7)
    put_images(tmp_path / "others" / "images", ["a.png", "b.png", "c.png", "d.png"])
    put_karpathy(tmp_path / "others", [(f"{n}.png", "val" if n == "d" else "train", ["Dogs."], {}) for n in "abcd"])
    with pytest.raises(ConfigError, match="use another --out"):
        shaded_scenes.write_scenes(tmp_path / "others", tmp_path / "shaded", 64, queries=6, distractors=7)
    with pytest.raises(ConfigError, match="3 photographs in `train` and 1 in `val` are too few"):
        shaded_scenes.write_scenes(tmp_path / "others", tmp_path / "more", 64, queries=6, distractors=7)
    assert not (tmp_path / "more").exists()


def test_distractors_come_from_test_if_only_calibration_images_are_held_out(photos, tmp_path):
    shaded_scenes.write_scenes(photos, tmp_path / "shaded", 64, queries=6, distractors=7)
    of_folder = {"data.source": "folder", "data.root": str(tmp_path / "shaded"), "data.calibration_size": 5}
    config = recipes.with_changes(tiny_config(), of_folder)
    images = rows.select_images(config, 5, 3)
    assert [len(part) for part in (images.queries, images.far, images.calibration)] == [6, 3, 5]
    assert set(record_names(images.far)) <= set(CaptionFolder(str(tmp_path / "shaded"), "test").names)
    cut = rows.select_images(config, 3, 2)  # two more than needed for thresholds
    assert [len(part) for part in (cut.far, cut.calibration)] == [2, 3]
    assert not set(record_names(cut.far)) & set(record_names(cut.calibration))

"""Cached scenes: the same images in all processes, and never damaged or outdated ones."""

import errno
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from icar_jax.config import ConfigError, DataConfig, ExperimentConfig, validate
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.batches import train_batches
from icar_jax.data.scenes import DrawnScenes, Scenes, dataset, drawn

SIZE, SIDE = 12, 32


def _scenes(size=SIZE):
    return Scenes("train", size, image_size=SIDE)


def _pixels(source):
    return np.stack([np.asarray(source[i].image()) for i in range(len(source))])


@pytest.fixture
def drawings(monkeypatch):
    """Counts how often scenes are drawn."""
    counted, draw = [], dataset.draw_scene
    monkeypatch.setattr(dataset, "draw_scene", lambda scene, size: counted.append(scene) or draw(scene, size))
    return counted


def test_records_are_those_of_the_scenes(tmp_path):
    plain, kept = _scenes(), DrawnScenes(_scenes(), tmp_path)
    assert len(kept) == len(plain) and kept.name == plain.name
    for _ in range(2):
        np.testing.assert_array_equal(_pixels(kept), _pixels(plain))
    for i in range(SIZE):
        a, b = plain[i], kept[i]
        assert (a.name, a.captions, a.complexity, a.labels) == (b.name, b.captions, b.complexity, b.labels)
    with pytest.raises(IndexError):
        kept[SIZE]


def test_a_later_run_draws_only_the_scenes_that_name_the_files(tmp_path, drawings):
    _pixels(DrawnScenes(_scenes(), tmp_path))
    drawings.clear()
    _pixels(DrawnScenes(_scenes(), tmp_path))
    assert len(drawings) == SIZE  # fewer scenes than are hashed into the file names


def test_damaged_and_partial_images_are_drawn_again(tmp_path):
    kept = DrawnScenes(_scenes(), tmp_path)
    right = _pixels(kept)
    (file,) = tmp_path.glob("*.u8")
    pixels = np.memmap(file, np.uint8, "r+", shape=right.shape)
    pixels[3, 5] ^= 255
    pixels[7] = 0
    np.testing.assert_array_equal(_pixels(DrawnScenes(_scenes(), tmp_path)), right)
    np.testing.assert_array_equal(pixels, right)


@pytest.mark.parametrize("broken", ["pread", "pwrite"])
def test_on_a_full_or_broken_disk_training_continues_with_the_same_images(tmp_path, monkeypatch, caplog, broken):
    kept = DrawnScenes(_scenes(), tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(drawn.os, broken, fail)
    batches = train_batches(kept, Preprocess(SIDE, "squash"), None, batch_size=4, seed=0, num_workers=0)
    plain = train_batches(_scenes(), Preprocess(SIDE, "squash"), None, batch_size=4, seed=0, num_workers=0)
    with batches, plain:
        for _ in range(3):
            ours, theirs = next(batches), next(plain)
            assert list(ours["name"]) == list(theirs["name"])
            np.testing.assert_array_equal(ours["image"], theirs["image"])
    said = "No space left on device; scenes are rendered and no longer cached there (config.data.scenes_kept)"
    assert caplog.text.count(said) == 1


def test_a_short_write_is_treated_as_a_full_disk(tmp_path, monkeypatch, caplog):
    kept = DrawnScenes(_scenes(), tmp_path)
    monkeypatch.setattr(drawn.os, "pwrite", lambda *_: 5)
    np.testing.assert_array_equal(_pixels(kept), _pixels(_scenes()))
    assert "No space left" in caplog.text


def test_another_renderer_gets_its_own_files(tmp_path, monkeypatch):
    _pixels(DrawnScenes(_scenes(), tmp_path))
    draw = dataset.draw_scene
    monkeypatch.setattr(dataset, "draw_scene", lambda scene, size: 255 - draw(scene, size))
    np.testing.assert_array_equal(_pixels(DrawnScenes(_scenes(), tmp_path)), _pixels(_scenes()))
    assert len(list(tmp_path.iterdir())) == 4


def test_sources_of_other_sizes_use_other_files(tmp_path):
    _pixels(DrawnScenes(_scenes(), tmp_path))
    np.testing.assert_array_equal(_pixels(DrawnScenes(_scenes(SIZE + 3), tmp_path)), _pixels(_scenes(SIZE + 3)))


def test_copies_for_worker_processes_and_threads_share_the_files(tmp_path):
    kept = DrawnScenes(_scenes(), tmp_path)
    right = _pixels(_scenes())
    copies = [pickle.loads(pickle.dumps(kept)) for _ in range(4)]
    assert len(pickle.dumps(kept)) < 2000
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(_pixels, copies):
            np.testing.assert_array_equal(found, right)


def test_training_reads_cached_scenes_and_its_split_is_unchanged(tmp_path):
    data = DataConfig(source="scenes", scenes_size=SIZE, scenes_pixels=SIDE)
    kept = configured.train_source(DataConfig(source="scenes", scenes_size=SIZE, scenes_pixels=SIDE, scenes_kept=str(tmp_path)))
    assert isinstance(kept, DrawnScenes)
    assert configured.fingerprint(kept) == configured.fingerprint(configured.train_source(data))
    np.testing.assert_array_equal(_pixels(kept), _pixels(configured.train_source(data)))


def test_only_scenes_are_cached():
    with pytest.raises(ConfigError, match="scenes_kept='x' but config.data.source='folder'"):
        validate(ExperimentConfig(data=DataConfig(source="folder", root="photos", scenes_kept="x")))

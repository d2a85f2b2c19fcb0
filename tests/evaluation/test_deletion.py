"""The deletion test deletes the intended pixels and distinguishes a correct map from a wrong one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icar_jax
from icar_jax.data.scenes import Scenes
from icar_jax.data.scenes.draw import draw_scene
from icar_jax.evaluation.complexity import deletion
from icar_jax.models.complexity import MAP_STAGE
from icar_jax.training.loop import train
from tests.support.runs import tiny_config

SIDE = 64


@pytest.fixture(scope="module")
def scenes():
    source = Scenes("val", 24, image_size=SIDE)
    return [source.scene(i) for i in range(24)]


@pytest.fixture(scope="module")
def pictures(scenes):
    return np.stack([draw_scene(scene, SIDE) for scene in scenes])


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_the_highest_pixels_and_no_others_are_replaced(seed, share):
    rng = np.random.default_rng(seed)
    pictures, filling = np.zeros((2, 6, 6, 3), np.uint8), np.full((2, 6, 6, 3), 255, np.uint8)
    ranks = rng.random((2, 6, 6))
    replaced = deletion.replace(pictures, filling, ranks, share)[..., 0] == 255
    count = round(share * 36)
    assert (replaced.sum(axis=(1, 2)) == count).all()
    for each, gone in zip(ranks, replaced, strict=True):
        assert not gone.any() or gone.all() or each[gone].min() > each[~gone].max()


def test_the_background_differs_only_where_objects_are(scenes, pictures):
    bare = deletion.fills(scenes, pictures, "background")
    for scene, picture, empty in zip(scenes, pictures, bare, strict=True):
        changed = np.abs(picture.astype(int) - empty).max(axis=-1) > 40
        # Contours and blur extend slightly beyond the circle around an item.
        outside = changed & ~deletion.object_mask(scene, SIDE)
        assert outside.sum() < 0.04 * SIDE**2
        assert changed.sum() > 20


def test_a_mask_of_items_lies_within_that_of_all_objects(scenes):
    for scene in scenes:
        items, objects = deletion.object_mask(scene, SIDE, confetti=False), deletion.object_mask(scene, SIDE)
        assert items.any() and not (items & ~objects).any()
        assert objects.sum() >= items.sum() + (len(scene.confetti) > 20)


def test_a_correct_map_passes_and_a_wrong_one_fails(scenes, pictures):
    """A score that counts object pixels has a known map: the object mask."""
    bare = deletion.fills(scenes, pictures, "background")
    differs = np.abs(pictures.astype(int) - bare).sum(axis=-1) > 0

    def score(images):
        return (np.abs(images.astype(int) - bare).sum(axis=-1) > 0).mean(axis=(1, 2))

    cells = differs.reshape(len(scenes), 8, SIDE // 8, 8, SIDE // 8).mean(axis=(2, 4))
    for maps, right in ((cells, True), (-cells, False)):
        ranks = deletion.rankings(maps, SIDE, seed=0)
        fallen = {order: deletion.drops(score, pictures, bare, each, 0.2) for order, each in ranks.items()}
        for other in ("random_cells", "random_pixels", "lowest"):
            found = deletion.mean_interval(fallen["highest"] - fallen[other])
            assert (found.low > 0) if right else (found.high < 0 or other != "lowest")
    inside, area = deletion.mass_inside(deletion.rankings(cells, SIDE, 0)["highest"], np.stack(
        [deletion.object_mask(scene, SIDE) for scene in scenes]))  # fmt: skip
    assert deletion.mean_interval(inside - area).low > 0


def test_mass_of_a_flat_map_is_the_share_of_the_area():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, :2] = masks[1, :, :4] = True
    inside, area = deletion.mass_inside(np.ones((2, 8, 8), np.float32), masks)
    np.testing.assert_allclose(inside, [0.25, 0.5])
    np.testing.assert_allclose(area, [0.25, 0.5])
    inside, _ = deletion.mass_inside(-np.ones((2, 8, 8), np.float32), masks)
    assert (inside == 0).all(), "a map without positive mass points at nothing"


def test_intervals_against_the_normal_approximation():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = deletion.mean_interval(values)
    half = 1.96 * values.std() / 20
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_unknown_fill(scenes, pictures):
    with pytest.raises(ValueError, match="'zeros' must be one of"):
        deletion.fills(scenes, pictures, "zeros")


@pytest.mark.check
def test_maps_of_a_trained_model_highlight_pixels_that_raise_its_score(tmp_path):
    """After a minute of training, deleting the highest-ranked pixels lowers the score more than deleting others, and the map
    mass inside objects exceeds their share of the area."""
    config = tiny_config("complexity", steps=250, batch_size=32, checkpoint_every=250)
    config.complexity.image_size = SIDE
    config.data.scenes_size = 20_000
    config.optim.lr, config.optim.warmup_steps = 2e-3, 30
    train(config, tmp_path)
    found = deletion.deletion_test(icar_jax.load(tmp_path), images=128, stages=(MAP_STAGE,))["stages"][str(MAP_STAGE)]
    for fill in deletion.FILLS:
        fallen = found["deletion"][fill]["0.2"]
        assert all(fallen[f"highest_minus_{order}"]["low"] > 0 for order in deletion.ORDERS[1:]), fallen
    for objects in found["mass"].values():
        assert objects["inside_minus_area"]["low"] > 0, objects

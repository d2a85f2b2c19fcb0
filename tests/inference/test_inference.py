"""Routing and the loaded model: order, static shapes, compilation counts and errors."""

import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint
from icar_jax.checkpoint import CheckpointError
from icar_jax.evaluation.routing.calibration import full_shares, make_bundle, thresholds_for_shares
from icar_jax.inference.forward import bucket_sizes, count_compilations, split_batch
from icar_jax.inference.router import assign


@pytest.fixture(scope="module")
def bundle(clip_folder, complexity_folder, tmp_path_factory):
    scorer = icar_jax.load(complexity_folder)
    scores = scorer.score(pictures(60))
    thresholds = thresholds_for_shares(scores, (0.3, 0.3, 0.4))
    out = tmp_path_factory.mktemp("bundle") / "bundle"
    return make_bundle(clip_folder, complexity_folder, out, thresholds=thresholds)


@pytest.fixture(scope="module")
def model(bundle):
    return icar_jax.load(bundle, batch_size=8)


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    sides = rng.integers(20, 60, size=(n, 2))
    return [rng.integers(0, 256, size=(h, w, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 6)) for h, w in sides]


def test_assignment_is_strict_and_covers_every_exit():
    scores = np.array([0.0, 0.3, 0.300001, 0.7, 0.9], np.float32)
    assert assign(scores, (2, 4, 6), (0.3, 0.7)).tolist() == [2, 2, 4, 4, 6]
    assert assign(np.zeros(0), (2, 6), (0.5,)).shape == (0,)


@pytest.mark.parametrize("thresholds", [(0.5,), (0.7, 0.3), (0.3, float("nan"))])
def test_thresholds_that_do_not_fit(thresholds):
    with pytest.raises(ValueError, match="thresholds"):
        assign(np.zeros(3), (2, 4, 6), thresholds)


def test_scores_that_are_not_finite():
    with pytest.raises(ValueError, match="1 of 2 complexity scores are not finite"):
        assign(np.array([0.1, np.nan]), (2, 6), (0.5,))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 63, 64, 65, 130])
def test_cut_covers_every_row_once(n):
    buckets = bucket_sizes(64)
    pieces = split_batch(n, buckets)
    assert [start for start, _, _ in pieces] == list(np.cumsum([0] + [r for _, r, _ in pieces])[:-1])
    assert sum(rows for _, rows, _ in pieces) == n
    assert all(bucket in buckets and 1 <= rows <= bucket for _, rows, bucket in pieces)
    assert sum(bucket for _, _, bucket in pieces) < n + 64


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.2, 0.3, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_thresholds_meet_their_shares(shares):
    scores = np.random.default_rng(0).random(1000).astype(np.float32)
    exits = tuple(range(1, len(shares) + 1))
    reached = assign(scores, exits, thresholds_for_shares(scores, shares))
    assert [np.mean(reached == e) for e in exits] == pytest.approx(shares, abs=1e-3)


def test_a_share_of_none_or_all_holds_for_other_images_too():
    calibration, others = np.array([0.4, 0.5, 0.6]), np.array([0.0, 0.3, 0.7, 1.0], np.float32)
    assert assign(others, (2, 6), thresholds_for_shares(calibration, (0.0, 1.0))).tolist() == [6] * 4
    assert assign(others, (2, 6), thresholds_for_shares(calibration, (1.0, 0.0))).tolist() == [2] * 4


def test_shares_are_checked():
    assert full_shares((), (3, 6)) == (0.5, 0.5)
    assert full_shares((0.7,), (3, 6)) == pytest.approx((0.7, 0.3))
    with pytest.raises(ValueError, match="pass 1 numbers"):
        full_shares((0.7, 0.2), (3, 6))
    with pytest.raises(ValueError, match="pass 1 numbers"):
        full_shares((1.2,), (3, 6))


def test_routing_keeps_the_order_and_uses_the_exit_of_each_image(model):
    images = pictures(37, seed=3)
    routed = model.route(images)
    assert len(set(routed.exits.tolist())) == 3, "the fixture should reach every exit"
    np.testing.assert_array_equal(routed.exits, assign(routed.scores, model.exits, model.thresholds))
    for exit in model.exits:
        alone = model.encode_image(images, exit=exit)
        np.testing.assert_allclose(routed.embeddings[routed.exits == exit], alone[routed.exits == exit], atol=1e-5)
    np.testing.assert_allclose(model.encode_image(images), routed.embeddings, atol=1e-6)
    np.testing.assert_allclose(model.score(images), routed.scores, atol=1e-6)
    assert sum(routed.share(model.exits).values()) == pytest.approx(1.0)


def test_embeddings_are_unit_norm_float32_whatever_the_batch(model):
    images = pictures(11, seed=5)
    together = model.encode_image(images)
    assert together.dtype == np.float32 and together.shape == (11, model.embed_dim)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    single = np.concatenate([model.encode_image([image]) for image in images])
    np.testing.assert_allclose(single, together, atol=1e-5)
    text = model.encode_text(["a small red circle", ""])
    assert text.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(text, axis=1), 1, atol=1e-5)


def test_paths_pil_images_and_arrays_agree(model, tmp_path):
    array = pictures(1, seed=7)[0]
    picture = Image.fromarray(array)
    picture.save(tmp_path / "a.png")
    rows = model.encode_image([tmp_path / "a.png", str(tmp_path / "a.png"), picture, array])
    np.testing.assert_allclose(rows, np.repeat(rows[:1], 4, axis=0), atol=1e-5)


def test_nothing_compiles_after_warm_up_over_ragged_folders(model, tmp_path):
    model.warm_up()
    for n in (1, 3, 8, 9, 20, 41):
        folder = tmp_path / str(n)
        folder.mkdir()
        for i, array in enumerate(pictures(n, seed=n)):
            Image.fromarray(array).save(folder / f"{i}.png")
        with count_compilations() as compiled:
            model.encode_image(sorted(folder.iterdir()))
            model.encode_text([f"caption {i}" for i in range(n)])
            assert compiled() == 0, f"{n} images"


def test_compilations_are_counted(bundle):
    fresh = icar_jax.load(bundle, batch_size=8)
    with count_compilations() as compiled:
        fresh.encode_image(pictures(1), exit=1)
        assert compiled() >= 1


def test_empty_lists(model):
    assert model.encode_image([]).shape == (0, model.embed_dim)
    assert model.encode_text([]).shape == (0, model.embed_dim)
    assert model.score([]).shape == (0,)


def test_mistakes_end_in_clear_errors(model, clip_folder, complexity_folder, tmp_path):
    with pytest.raises(ValueError, match=r"exit=9 has no head.*\(1, 2, 3\)"):
        model.encode_image(pictures(1), exit=9)
    with pytest.raises(TypeError, match="must be a list or tuple of texts"):
        model.encode_text("one caption")
    for single in ("a.png", pictures(1)[0], Image.fromarray(pictures(1)[0])):
        with pytest.raises(TypeError, match="list of images"):
            model.encode_image(single)
    with pytest.raises(FileNotFoundError, match="nowhere.png"):
        model.encode_image([tmp_path / "nowhere.png"])
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="broken.jpg"):
        model.encode_image([tmp_path / "broken.jpg"])
    with pytest.raises(CheckpointError, match="icar bundle"):
        icar_jax.load(clip_folder).score(pictures(1))
    with pytest.raises(CheckpointError, match="needs a CLIP;"):
        icar_jax.load(complexity_folder).encode_text(["a"])
    with pytest.raises(CheckpointError, match="needs thresholds|make a bundle"):
        icar_jax.load(clip_folder).route(pictures(1))


def test_a_plain_clip_runs_full_depth(clip_folder):
    model = icar_jax.load(clip_folder, batch_size=8)
    images = pictures(5)
    np.testing.assert_array_equal(model.encode_image(images), model.encode_image(images, exit=3))


def test_a_bundle_whose_exits_differ_is_refused(bundle, tmp_path):
    import json
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    description = json.loads((copy / checkpoint.DESCRIPTION).read_text())
    description["routing"]["exits"] = [1, 3]
    (copy / checkpoint.DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match="calibrate the bundle again"):
        icar_jax.load(copy)


def test_two_checkpoints_of_one_kind_do_not_make_a_bundle(clip_folder, tmp_path):
    with pytest.raises(CheckpointError, match="kind complexity"):
        make_bundle(clip_folder, clip_folder, tmp_path / "out", thresholds=(0.1, 0.2))
    assert not (tmp_path / "out").exists()

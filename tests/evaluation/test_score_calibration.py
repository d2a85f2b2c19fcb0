"""Score calibration compared with brute force, and its effect in a gallery with offset exits."""

import dataclasses
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import icar_jax
from icar_jax import workdir
from icar_jax.config import DistractorConfig
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.evaluate import evaluate
from icar_jax.evaluation.metrics.retrieval import Distractors, ranks, recall
from icar_jax.evaluation.records.plain import plain
from icar_jax.evaluation.routing.assignments import take_exits
from icar_jax.evaluation.routing.gallery import embed_source
from icar_jax.evaluation.routing.score_calibration import Affine, ScoreCalibration, bias, fit
from tests.support.keys import require_known_keys
from tests.support.runs import tiny_config


def unit(z):
    return (z / np.linalg.norm(z, axis=-1, keepdims=True)).astype(np.float32)


def gallery(seed, n=40, width=6, early=(3, 6)):
    """Captions close to their image; early exits have noise and a common direction that shifts all their cosines."""
    rng = np.random.default_rng(seed)
    common = 0.6 * unit(np.random.default_rng(99).normal(size=width))
    full = unit(unit(rng.normal(size=(n, width))) + common)
    owner = np.concatenate([np.arange(n), rng.integers(0, n, n)])
    texts = unit(full[owner] + 0.8 * unit(rng.normal(size=(2 * n, width))) + common)
    by_exit = {e: unit(full + 0.4 * unit(rng.normal(size=full.shape)) - common * 3 / e) for e in early} | {12: full}
    return by_exit, texts, owner, rng.choice([*early, 12], n)


def plain_loss(affine, by_exit, texts, owner, exits, scale):
    total = 0.0
    for t, i in zip(texts.astype(np.float64), owner):
        logits = []
        for k, e in enumerate(exits.tolist()):
            cosine = by_exit[e][k].astype(np.float64) @ t
            logits.append(scale * (affine[e].slope * cosine + affine[e].offset))
        total += np.log(np.exp(np.array(logits)).sum()) - logits[i]
    return total / len(texts)


@pytest.mark.parametrize("early", [(3,), (3, 6)])
@pytest.mark.parametrize("seed", range(3))
def test_fit_equals_a_search_over_the_plain_loss(seed, early):
    by_exit, texts, owner, exits = gallery(seed, n=12, early=early)
    scale = 8.0
    found = fit(by_exit, texts, owner, exits, scale)
    identity = {e: Affine() for e in by_exit}
    assert found.exits[12] == Affine(1.0, 0.0)
    assert found.loss_before == pytest.approx(plain_loss(identity, by_exit, texts, owner, exits, scale), abs=1e-5)
    assert found.loss_after == pytest.approx(plain_loss(found.exits, by_exit, texts, owner, exits, scale), abs=1e-5)

    def plain(x):
        affine = {e: Affine(x[2 * i], x[2 * i + 1]) for i, e in enumerate(early)} | {12: Affine()}
        return plain_loss(affine, by_exit, texts, owner, exits, scale)

    limits = [(0.05, None), (None, None)] * len(early)
    searched = minimize(plain, [1.0, 0.0] * len(early), method="L-BFGS-B", bounds=limits)
    assert found.loss_after == pytest.approx(searched.fun, abs=1e-4) and found.loss_after < found.loss_before
    assert np.ravel([dataclasses.astuple(found.exits[e]) for e in early]) == pytest.approx(searched.x, abs=0.02)


def test_unused_exits_and_single_exit_galleries_are_not_calibrated():
    by_exit, texts, owner, exits = gallery(0)
    identity = {3: Affine(), 6: Affine(), 12: Affine()}
    for one in (3, 12):
        found = fit(by_exit, texts, owner, np.full_like(exits, one), 8.0)
        assert found.exits == identity and found.loss_before == found.loss_after
    found = fit(by_exit, texts, owner, np.where(exits == 3, 12, exits), 8.0)
    assert found.exits[3] == Affine() != found.exits[6]
    with pytest.raises(ValueError, match=r"exits \[5\]"):
        fit(by_exit, texts, owner, np.full_like(exits, 5), 8.0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 3), st.floats(-1, 1))
def test_longer_vectors_give_the_calibrated_scores_and_keep_the_order_of_captions(seed, slope, offset):
    by_exit, texts, owner, exits = gallery(seed, n=9)
    calibration = ScoreCalibration({3: Affine(slope, offset), 6: Affine(1.0, -offset), 12: Affine()}, 0.0, 0.0)
    rows = take_exits(by_exit, exits)
    slopes, offsets = np.transpose([dataclasses.astuple(calibration.exits[e]) for e in exits.tolist()])
    wanted = slopes * (texts @ rows.T) + offsets
    np.testing.assert_allclose(calibration.map_texts(texts) @ calibration.map_images(rows, exits).T, wanted, atol=1e-5)
    before, after = texts @ rows.T, wanted
    for k in range(len(rows)):
        apart = np.abs(np.subtract.outer(before[:, k], before[:, k])) > 1e-4
        same = np.sign(np.subtract.outer(before[:, k], before[:, k])) == np.sign(np.subtract.outer(after[:, k], after[:, k]))
        assert same[apart].all()
    with pytest.raises(ValueError, match=r"exits \[5\]; calibrated exits: \[3, 6, 12\]"):
        calibration.map_images(rows, np.full_like(exits, 5))


def test_an_offset_between_exits_is_corrected():
    by_exit, texts, owner, exits = gallery(1, n=200, width=24)
    held, held_texts, held_owner, held_exits = gallery(2, n=200, width=24)
    found = fit(by_exit, texts, owner, exits, 10.0)

    def r5(rows, texts):
        return recall(ranks(rows, texts, held_owner), 5)

    rows = take_exits(held, held_exits)
    plain = r5(rows, held_texts)
    calibrated = r5(found.map_images(rows, held_exits), found.map_texts(held_texts))
    assert calibrated["text_to_image"] > plain["text_to_image"] + 10
    assert calibrated["image_to_text"] == pytest.approx(plain["image_to_text"], abs=1.0)
    low = bias({3: held[3]}, held_texts, held_owner)[3].other
    assert found.exits[3].slope * low + found.exits[3].offset > low, "the early exit's cosines lie lower"


def test_bias_is_the_mean_of_each_kind_of_pair():
    by_exit, texts, owner, _ = gallery(3, n=7)
    for exit, found in bias(by_exit, texts, owner).items():
        scores = texts.astype(np.float64) @ by_exit[exit].T.astype(np.float64)
        own = np.zeros_like(scores, bool)
        own[np.arange(len(owner)), owner] = True
        assert found.matching == pytest.approx(scores[own].mean(), abs=1e-6)
        assert found.other == pytest.approx(scores[~own].mean(), abs=1e-6)
    single = bias({2: texts[:1]}, texts[:1], np.zeros(1, int))
    assert np.isnan(single[2].other)


@pytest.mark.check
def test_an_evaluation_ranks_the_routed_gallery_by_calibrated_scores_too(clip_folder, complexity_folder, tmp_path, capsys):
    config = tiny_config("clip")
    workdir.save_config(tmp_path, config)
    shutil.copytree(clip_folder, tmp_path / "model")
    config.eval.complexity, config.eval.score_calibration = str(complexity_folder), "affine"
    config.eval.distractors = DistractorConfig("scenes", split="test", size=15)
    found = evaluate(config, tmp_path)
    require_known_keys(plain(found), "retrieval")
    routed, affine = found.runs["routed"], found.runs["routed_affine"]
    for name in ("flops_per_image", "images_per_s", "share"):
        assert getattr(affine, name) == getattr(routed, name)
    told = found.score_calibration
    assert told.calibration == "scenes/calibration" and told.images == 40 and told.loss_after <= told.loss_before
    assert told.exits[3] == Affine() and set(told.bias) == {1, 2, 3}
    bundle = icar_jax.load(tmp_path / "bundle", batch_size=8)
    own, far = (embed_source(bundle, Scenes(split, size, image_size=64)) for split, size in (("val", 30), ("test", 15)))
    rows, away = (told.map_images(g.routed, g.exits) for g in (own, far))
    others = Distractors(away, told.map_texts(far.texts), far.caption_image, far.labels)
    expected = recall(ranks(rows, told.map_texts(own.texts), own.caption_image, distractors=others), 5)
    assert {d: affine.metrics(d)["r5"] for d in expected} == pytest.approx(expected, abs=4.0)
    assert "routed_affine_minus_routed" in found.comparisons
    assert "routed, per-exit calibrated scores" in (tmp_path / "report" / "index.html").read_text()
    assert "per-exit score calibration:" in " ".join(capsys.readouterr().out.split())

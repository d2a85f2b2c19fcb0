"""Pooled runs of several seeds, compared with loops over drawn images and seeds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.evaluation.metrics import seeds
from icar_jax.evaluation.metrics.bootstrap import Hits, resample_counts, retention
from icar_jax.evaluation.metrics.retrieval import RECALL_AT, Ranks, recall


def ranks_of(rng, images=12, worst=30):
    owner = np.sort(np.concatenate([np.arange(images), rng.integers(0, images, 9)]))
    return Ranks(rng.integers(1, worst, len(owner)), rng.integers(1, worst, images), owner)


def same_captions(rng, found, worst=30):
    return Ranks(rng.integers(1, worst, len(found.caption_image)), rng.integers(1, worst, len(found.image_to_text)),
                 found.caption_image)  # fmt: skip


def test_mean_recall_is_the_mean_of_recalls():
    found = ranks_of(np.random.default_rng(0))
    whole = seeds.resampled({"a": seeds.mean_recall_hits(found)}, n=1)["a"][0]
    expected = np.mean([list(recall(found, k).values()) for k in RECALL_AT])
    np.testing.assert_allclose(whole, expected, rtol=1e-12)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_resamples_are_those_of_queries_drawn_one_by_one(seed):
    rng = np.random.default_rng(seed)
    a = ranks_of(rng)
    values = seeds.resampled({"a": seeds.mean_recall_hits(a)}, n=5, seed=3)["a"]
    for row, counts in enumerate(np.concatenate(list(resample_counts(12, 5, 3)))):
        t, i = [], []
        for image, times in enumerate(counts.astype(int)):
            t += list(a.text_to_image[a.caption_image == image]) * times
            i += [a.image_to_text[image]] * times
        expected = np.mean([[100 * np.mean(np.array(x) <= k) for x in (t, i)] for k in RECALL_AT])
        np.testing.assert_allclose(values[row + 1], expected, rtol=1e-12)


def test_one_seed_agrees_with_the_intervals_of_one_evaluation():
    rng = np.random.default_rng(1)
    a = ranks_of(rng, worst=12)
    b = same_captions(rng, a, worst=8)
    run, full = seeds.mean_recall_hits(a), seeds.mean_recall_hits(b)
    values = seeds.resampled({"run": run, "full": full}, n=200)
    expected = retention(run, full, n=200).percent()
    found = seeds.retention(values["run"][None], values["full"][None])
    np.testing.assert_allclose((found.value, found.low, found.high), (expected.value, expected.low, expected.high))


def test_the_baseline_retains_100_percent_with_zero_width():
    rng = np.random.default_rng(2)
    first = ranks_of(rng)
    found = seeds.resampled({s: seeds.mean_recall_hits(same_captions(rng, first)) for s in range(3)}, n=50)
    values = np.stack([found[s] for s in range(3)])
    kept, delta = seeds.retention(values, values), seeds.difference(values, values)
    assert (kept.value, kept.low, kept.high) == (100.0, 100.0, 100.0)
    assert (delta.value, delta.low, delta.high) == (0.0, 0.0, 0.0) and delta.includes_zero


def test_pooling_averages_seeds_and_resamples_whole_seeds():
    values = np.tile(np.array([[0.0], [10.0], [100.0]]), (1, 4001))
    found = seeds.pooled(values)
    assert found[0] == pytest.approx(110 / 3)
    possible = {round(sum(each) / 3, 6) for each in itertools.product((0, 10, 100), repeat=3)}
    assert {round(v, 6) for v in found[1:]} == possible
    np.testing.assert_allclose(found[1:].mean(), 110 / 3, rtol=0.03)


def test_seeds_widen_an_interval_that_images_leave_narrow():
    rng = np.random.default_rng(3)
    noise = 0.01 * rng.standard_normal((3, 501))
    apart = seeds.interval(np.array([[90.0], [95.0], [100.0]]) + noise)
    together = seeds.interval(np.array([[95.0], [95.0], [95.0]]) + noise)
    assert apart.high - apart.low > 5 > 1 > together.high - together.low


def test_seeds_of_compared_runs_are_drawn_together():
    base = np.array([[50.0], [70.0], [90.0]]) * np.ones((1, 300))
    found = seeds.difference(base + 1, base)
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


def test_captured_is_zero_for_random_routing_and_100_for_the_oracle():
    rng = np.random.default_rng(4)
    random, oracle = 60 + rng.standard_normal((3, 101)), 70 + rng.standard_normal((3, 101))
    assert seeds.captured(random, random, oracle).value == 0
    assert seeds.captured(oracle, random, oracle).low == pytest.approx(100)
    assert seeds.captured((random + oracle) / 2, random, oracle).value == pytest.approx(50)
    assert seeds.captured(oracle, random, random) is None


def test_runs_without_hits_have_no_ratio():
    assert seeds.retention(np.ones((1, 5)), np.array([[1.0, 1.0, 0.0, 1.0, 1.0]])) is None


def test_other_galleries_are_refused():
    a, b = Hits(5, np.ones(3), np.ones(3), np.ones(3)), Hits(5, np.ones(4), np.ones(4), np.ones(4))
    with pytest.raises(ValueError, match="same gallery"):
        seeds.resampled({"a": a, "b": b}, n=2)
    with pytest.raises(ValueError, match="at least one seed"):
        seeds.pooled(np.zeros((0, 5)))

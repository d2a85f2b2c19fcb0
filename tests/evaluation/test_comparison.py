"""Intervals of every metric equal a plain resampling loop with numpy's mean and median; they are paired and reproducible."""

from dataclasses import astuple

import numpy as np
import pytest

from icar_jax.evaluation.metrics import bootstrap, category, retrieval
from icar_jax.evaluation.metrics.bootstrap import Interval, resample_indices
from icar_jax.evaluation.metrics.category import Precisions
from icar_jax.evaluation.metrics.comparison import collect, intervals, mean_run
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, Ranks

NAMES = {"r1", "r5", "r10", "median_rank", "mean_rank", "map10", "map10_standard"}


def made_up(seed, n_images=40, quality=8.0):
    """(ranks, precisions) of images with one to five captions each, in shuffled order, a few without labels."""
    rng = np.random.default_rng(seed)
    captions = np.random.default_rng(0).integers(1, 6, n_images)
    owner = np.random.default_rng(1).permutation(np.repeat(np.arange(n_images), captions))
    ranks = Ranks(rng.geometric(1 / quality, len(owner)), rng.geometric(1.5 / quality, n_images), owner)
    values = {}
    for direction in DIRECTIONS:
        ap = rng.random(n_images)
        ap[::9] = 0.0
        values[direction] = {"official": {10: ap}, "standard": {10: np.where(np.arange(n_images) % 9, ap / 2, np.nan)}}
    return ranks, Precisions(values)


def looped(ranks, precisions, images):
    """direction -> metric -> value of one resample, query by query."""
    captions = np.concatenate([np.flatnonzero(ranks.caption_image == i) for i in images])
    found = {}
    for direction, asked in (("text_to_image", ranks.text_to_image[captions]), ("image_to_text", ranks.image_to_text[images])):
        ap = precisions.values[direction]
        found[direction] = {f"r{k}": 100 * np.mean(asked <= k) for k in (1, 5, 10)}
        found[direction] |= {"median_rank": np.median(asked), "mean_rank": np.mean(asked)}
        found[direction] |= {"map10": 100 * np.mean(ap["official"][10][images])}
        found[direction] |= {"map10_standard": 100 * np.nanmean(ap["standard"][10][images])}
    first, second = (found[d] for d in DIRECTIONS)
    return found | {"mean": {m: (first[m] + second[m]) / 2 for m in first}}


def test_equals_a_plain_loop_on_the_same_indices():
    run, full = made_up(2, quality=9), made_up(3, quality=6)
    indices = np.concatenate(list(resample_indices(40, 150, seed=5)))
    a, b = ([looped(*case, images) for images in indices] for case in (run, full))
    whole_a, whole_b = (looped(*case, np.arange(40)) for case in (run, full))
    found = intervals({"run": collect(*run), "full": collect(*full)}, n=150, seed=5)["run"]
    assert set(found) == {*DIRECTIONS, "mean"}
    for direction, by_metric in found.items():
        assert set(by_metric) == NAMES
        for metric, got in by_metric.items():
            va, vb = (np.array([sample[direction][metric] for sample in values]) for values in (a, b))
            pa, pb = whole_a[direction][metric], whole_b[direction][metric]
            expected = [(got.value, pa, va), (got.difference, pa - pb, va - vb)]
            if metric.endswith("_rank"):
                assert got.retention is None
            else:
                expected.append((got.retention, 100 * pa / pb, 100 * va / vb))
            for interval, point, values in expected:
                bounds = [point, *np.quantile(values, [0.025, 0.975])]
                np.testing.assert_allclose([interval.value, interval.low, interval.high], bounds, rtol=1e-9, atol=1e-9)


def test_point_values_are_the_summaries():
    ranks, precisions = made_up(4)
    found = intervals({"full": collect(ranks, precisions)}, n=20)["full"]
    expected = retrieval.summarise(ranks), category.summarise(precisions)
    for direction in DIRECTIONS:
        for metric, value in (expected[0][direction] | expected[1][direction]).items():
            assert found[direction][metric].value.value == pytest.approx(value)


@pytest.mark.parametrize("spread", [1, 50, 5000])
def test_medians_far_from_the_overall_median_are_found(spread):
    """Few images with widely spread ranks: medians of resamples are far from the overall median."""
    rng = np.random.default_rng(spread)
    ranks = Ranks(rng.integers(1, 1 + spread, 300), rng.integers(1, 1 + spread, 6), np.arange(300) % 6)
    ranks.text_to_image[ranks.caption_image == 0] += 10 * spread
    ranks.text_to_image[ranks.caption_image == 1] += 20 * spread
    found = intervals({"full": collect(ranks)}, n=100)["full"]["text_to_image"]["median_rank"].value
    indices = np.concatenate(list(resample_indices(6, 100, seed=0)))
    values = [np.median(np.concatenate([ranks.text_to_image[ranks.caption_image == i] for i in row])) for row in indices]
    np.testing.assert_allclose([found.low, found.high], np.quantile(values, [0.025, 0.975]))


def test_identical_runs_have_zero_width_intervals():
    found = intervals({"full": collect(*made_up(6)), "twin": collect(*made_up(6))}, n=300)["twin"]
    for by_metric in found.values():
        for got in by_metric.values():
            assert got.difference == Interval(0.0, 0.0, 0.0)
            assert got.retention is None or got.retention == Interval(100.0, 100.0, 100.0)


def test_mean_run_averages_draws():
    draws = [collect(*made_up(seed)) for seed in (6, 7, 8)]
    mean = intervals({"full": mean_run(draws)}, n=30)["full"]
    each = [intervals({"full": draw}, n=30)["full"] for draw in draws]
    for direction in mean:
        for metric, got in mean[direction].items():
            assert got.value.value == pytest.approx(np.mean([one[direction][metric].value.value for one in each]))


def test_result_depends_on_the_seed_but_not_on_chunking(monkeypatch):
    runs = {"full": collect(*made_up(10)), "run": collect(*made_up(11))}
    first = intervals(runs, n=100, seed=1)["run"]["mean"]["map10"]
    assert intervals(runs, n=100, seed=2)["run"]["mean"]["map10"] != first
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 7 * 40)
    again = intervals(runs, n=100, seed=1)["run"]["mean"]["map10"]
    np.testing.assert_allclose(np.ravel(astuple(again)), np.ravel(astuple(first)), rtol=1e-12)


def test_what_is_undefined_is_none():
    ranks, precisions = made_up(12)
    never = Ranks(ranks.text_to_image + 99, ranks.image_to_text + 99, ranks.caption_image)
    for direction in DIRECTIONS:  # one labelled query: most resamples have none
        precisions.values[direction]["standard"][10][1:] = np.nan
        precisions.values[direction]["standard"][10][0] = 0.5
    found = intervals({"full": collect(never, precisions), "run": collect(ranks, precisions)}, n=50)["run"]["mean"]
    assert found["r5"].retention is None and found["r5"].difference.low > 0
    assert found["map10_standard"].value is None and found["map10_standard"].difference is None


def test_unpaired_runs_are_refused():
    run = collect(*made_up(13))
    with pytest.raises(ValueError, match="'full' and 'run' differ.*40 images .*30 with"):
        intervals({"full": run, "run": collect(*made_up(13, n_images=30))})
    with pytest.raises(ValueError, match="'full', which is not among"):
        intervals({"run": run})
    with pytest.raises(ValueError, match="n=0"):
        intervals({"full": run}, n=0)
    with pytest.raises(ValueError, match="at least one draw"):
        mean_run([])

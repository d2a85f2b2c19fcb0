"""Bootstrap intervals equal a plain resampling loop, are paired and reproducible, and have the nominal coverage."""

from dataclasses import astuple

import numpy as np
import pytest

from icar_jax.evaluation.metrics import bootstrap
from icar_jax.evaluation.metrics.bootstrap import (
    Hits,
    Interval,
    difference,
    hits_at,
    interval,
    mean_hits,
    resample_indices,
    retention,
)
from icar_jax.evaluation.metrics.retrieval import Ranks, recall


def made_up_ranks(seed, n_images=40, quality=8.0):
    """Images with one to five captions each, in shuffled order."""
    rng = np.random.default_rng(seed)
    captions = np.random.default_rng(0).integers(1, 6, n_images)
    owner = np.random.default_rng(1).permutation(np.repeat(np.arange(n_images), captions))
    return Ranks(
        text_to_image=1 + rng.geometric(1 / quality, len(owner)),
        image_to_text=1 + rng.geometric(1 / quality, n_images),
        caption_image=owner,
    )


def looped_mean_recall(ranks, images, k):
    """Returns the recall of one resample, counted caption by caption."""
    caption_hits = [ranks.text_to_image[c] <= k for i in images for c in np.flatnonzero(ranks.caption_image == i)]
    return 100 * (np.mean(caption_hits) + np.mean([ranks.image_to_text[i] <= k for i in images])) / 2


def test_equals_a_plain_loop_on_the_same_indices():
    run, full = made_up_ranks(2, quality=9), made_up_ranks(3, quality=6)
    indices = np.concatenate(list(resample_indices(40, 200, seed=5)))
    run_values = np.array([looped_mean_recall(run, images, 5) for images in indices])
    full_values = np.array([looped_mean_recall(full, images, 5) for images in indices])

    kept = retention(hits_at(run, 5), hits_at(full, 5), n=200, seed=5)
    low, high = np.quantile(run_values / full_values, [0.025, 0.975])
    whole = looped_mean_recall(run, range(40), 5) / looped_mean_recall(full, range(40), 5)
    np.testing.assert_allclose([kept.value, kept.low, kept.high], [whole, low, high], rtol=1e-12)

    delta = difference(hits_at(run, 5), hits_at(full, 5), n=200, seed=5, level=0.8)
    low, high = np.quantile(run_values - full_values, [0.1, 0.9])
    np.testing.assert_allclose([delta.low, delta.high], [low, high], rtol=1e-10)
    assert delta.value < 0


def test_point_value_is_the_recall_of_the_gallery():
    ranks = made_up_ranks(4)
    for direction in ("text_to_image", "image_to_text"):
        found = interval(lambda r, d=direction: getattr(r, d), [hits_at(ranks, 3)], n=50)
        assert found.value == pytest.approx(recall(ranks, 3)[direction])
        assert found.low < found.value < found.high


def test_identical_runs_have_zero_width_intervals():
    for hits in (hits_at(made_up_ranks(6), 5), mean_hits([hits_at(made_up_ranks(s), 5) for s in (6, 7, 8)])):
        twin = Hits(hits.k, hits.text_to_image.copy(), hits.captions.copy(), hits.image_to_text.copy())
        assert retention(hits, twin, n=300) == Interval(1.0, 1.0, 1.0)
        assert retention(hits, twin, n=300).percent() == Interval(100.0, 100.0, 100.0)
        delta = difference(hits, twin, n=300)
        assert delta == Interval(0.0, 0.0, 0.0)
        assert delta.includes_zero


def test_pairing_narrows_the_interval():
    full = made_up_ranks(9, n_images=300)
    worse = full.image_to_text.copy()
    worse[:6] = 10_000
    run = Ranks(full.text_to_image, worse, full.caption_image)
    paired = difference(hits_at(run, 5), hits_at(full, 5))
    alone = interval(lambda r: r.mean, [hits_at(full, 5)])
    assert paired.high - paired.low < (alone.high - alone.low) / 3


def test_result_depends_on_the_seed_but_not_on_chunking(monkeypatch):
    run, full = hits_at(made_up_ranks(10), 5), hits_at(made_up_ranks(11), 5)
    first = retention(run, full, n=300, seed=1)
    assert retention(run, full, n=300, seed=1) == first
    assert retention(run, full, n=300, seed=2) != first
    monkeypatch.setattr(bootstrap, "_CHUNK_ELEMENTS", 7 * 40)
    assert len(list(resample_indices(40, 300, seed=1))) > 40
    again = retention(run, full, n=300, seed=1)
    np.testing.assert_allclose(astuple(again), astuple(first), rtol=1e-12)


def test_mean_hits_averages_draws():
    draws = [hits_at(made_up_ranks(seed), 5) for seed in range(4)]
    mean = mean_hits(draws)
    np.testing.assert_allclose(mean.image_to_text, np.mean([d.image_to_text for d in draws], axis=0))
    value = interval(lambda r: r.mean, [mean], n=10).value
    assert value == pytest.approx(np.mean([interval(lambda r: r.mean, [d], n=10).value for d in draws]))


def test_coverage_with_correlated_captions():
    """The 95% interval holds the true recall in about 95% of galleries, even though captions of an image are correlated."""
    rng = np.random.default_rng(0)
    n_images, captions, trials, covered = 150, 5, 300, 0
    owner = np.repeat(np.arange(n_images), captions)
    for trial in range(trials):
        easy = rng.random(n_images) < 0.5
        caption_hit = rng.random(len(owner)) < np.where(easy[owner], 0.8, 0.2)
        image_hit = rng.random(n_images) < np.where(easy, 0.8, 0.2)
        ranks = Ranks(np.where(caption_hit, 1, 99), np.where(image_hit, 1, 99), owner)
        found = interval(lambda r: r.mean, [hits_at(ranks, 5)], n=300, seed=trial)
        covered += found.low <= 50.0 <= found.high
    assert 0.90 <= covered / trials <= 0.99


def test_retention_without_enough_hits_is_undefined():
    full = made_up_ranks(12)
    never = Ranks(full.text_to_image + 99, full.image_to_text + 99, full.caption_image)
    assert retention(hits_at(full, 5), hits_at(never, 5), n=50) is None
    once = Ranks(never.text_to_image, never.image_to_text.copy(), full.caption_image)
    once.image_to_text[0] = 1
    assert retention(hits_at(full, 5), hits_at(once, 5), n=50) is None
    assert retention(hits_at(never, 5), hits_at(full, 5), n=50).value == 0.0
    with pytest.raises(ValueError, match="not finite"), np.errstate(all="ignore"):
        interval(lambda a, b: a.mean / b.mean, [hits_at(full, 5), hits_at(never, 5)], n=50)


def test_unpaired_runs_are_refused():
    hits = hits_at(made_up_ranks(13), 5)
    with pytest.raises(ValueError, match="k=5 .* k=1"):
        difference(hits, hits_at(made_up_ranks(13), 1))
    with pytest.raises(ValueError, match="40 images .* 30 with"):
        difference(hits, hits_at(made_up_ranks(13, n_images=30), 5))
    with pytest.raises(ValueError, match="found none"):
        mean_hits([])
    with pytest.raises(ValueError, match="n=0"):
        difference(hits, hits, n=0)

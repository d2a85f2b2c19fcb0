"""Runs of several training seeds, pooled: the mean over seeds, with intervals over the images and the seeds.

The same recipe trained with other seeds is evaluated on the same images. A resample draws images with replacement, each with
all its captions, and the same images for every run and seed; it also draws as many seeds as there are, with replacement, and
the same ones for all runs that are compared. The statistic is the mean over the seeds drawn. So an interval holds what other
images and other seeds would change (a two-way bootstrap: Owen 2007, "The pigeonhole bootstrap"). Few seeds say little about
seeds: three have ten different resamples, and with one the interval is of the images alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from icar_jax.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Hits, Interval, bounds, hits_at, resample_counts
from icar_jax.evaluation.metrics.retrieval import RECALL_AT, Ranks

_BAR_DELAY_S = 3.0
_SEEDS_SEED = 1  # of the seeds' draws: another stream than that of the images
MEAN_K = 0  # in place of k: hits averaged over several

Key = TypeVar("Key", bound=Hashable)


def mean_recall_hits(ranks: Ranks) -> Hits:
    """Hits whose recall is the mean of R@1, R@5 and R@10."""
    return average([hits_at(ranks, k) for k in RECALL_AT])


def average(by_k: Sequence[Hits]) -> Hits:
    """Hits of one run at several k -> hits whose recall is the mean of theirs: recall is linear in hits."""
    return Hits(
        k=MEAN_K,
        text_to_image=np.mean([hits.text_to_image for hits in by_k], axis=0),
        captions=by_k[0].captions,
        image_to_text=np.mean([hits.image_to_text for hits in by_k], axis=0),
    )


def resampled(runs: Mapping[Key, Hits], *, n: int = RESAMPLES, seed: int = 0) -> dict[Key, np.ndarray]:
    """Run -> float64 [1 + n]: recall in percent, mean of both directions, of the whole gallery and of n resamples of images.

    All runs see the same resamples. Raises ValueError for runs of different images or captions.
    """
    if not runs:
        return {}
    (first, some), *others = runs.items()
    for name, hits in others:
        if hits.k != some.k or not np.array_equal(hits.captions, some.captions):
            raise ValueError(
                f"{first} and {name} differ in k ({some.k}, {hits.k}) or in their images ({len(some.captions)} with "
                f"{some.captions.sum():.0f} captions, {len(hits.captions)} with {hits.captions.sum():.0f}): pooled runs are "
                "evaluated in the same gallery"
            )
    images = len(some.captions)
    whole = np.ones((1, images))
    found: dict[Key, list[np.ndarray]] = {name: [_recall(hits, whole, some.captions)] for name, hits in runs.items()}
    with tqdm(total=n, desc="bootstrap", unit="resample", delay=_BAR_DELAY_S, leave=False) as bar:
        for counts in resample_counts(images, n, seed):
            for name, hits in runs.items():
                found[name].append(_recall(hits, counts, some.captions))
            bar.update(len(counts))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def pooled(values: np.ndarray) -> np.ndarray:
    """[S, 1 + R] a statistic of S seeds -> [1 + R]: its mean over seeds, of the resamples over as many seeds drawn anew."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"expected [seeds, 1 + resamples] of at least one seed, found shape {list(values.shape)}")
    seeds, columns = values.shape
    drawn = np.random.default_rng(_SEEDS_SEED).integers(0, seeds, (seeds, columns))
    drawn[:, 0] = np.arange(seeds)
    return np.take_along_axis(values, drawn, axis=0).mean(axis=0)


def interval(values: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """[S, 1 + R] -> the pooled value with its percentile interval; None where a value is not finite."""
    found = pooled(values)
    return bounds(float(found[0]), found[1:], level) if np.isfinite(found).all() else None


def retention(run: np.ndarray, baseline: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """Recall kept in percent of the baseline's of the same seed: two arrays [S, 1 + R] of `resampled`.

    None where a baseline has no hit in a resample.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(100.0 * (np.asarray(run) / np.asarray(baseline)), level=level)


def difference(run: np.ndarray, other: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """Recall of a run minus another's of the same seed, in percentage points: two arrays [S, 1 + R]."""
    return interval(np.asarray(run) - np.asarray(other), level=level)


def captured(run: np.ndarray, random: np.ndarray, oracle: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """Percent of what an oracle gains over random routing at the same share that a router gains: three arrays [S, 1 + R].

    The ratio of the pooled gains, not the mean of ratios, since the gain of a single seed may be near zero. None where an
    oracle gains nothing in some resample.
    """
    gained = pooled(np.asarray(run) - np.asarray(random))
    possible = pooled(np.asarray(oracle) - np.asarray(random))
    if not (possible > 0).all():
        return None
    share = 100.0 * gained / possible
    return bounds(float(share[0]), share[1:], level)


def _recall(hits: Hits, counts: np.ndarray, captions: np.ndarray) -> np.ndarray:
    # One product a run, never one stacked product: identical runs must give identical numbers to the last bit.
    text_to_image = (counts @ hits.text_to_image) / (counts @ captions)
    image_to_text = (counts @ hits.image_to_text) / counts.sum(axis=1)
    return 50.0 * (text_to_image + image_to_text)

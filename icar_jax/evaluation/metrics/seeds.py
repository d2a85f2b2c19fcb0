"""Mean recall over training seeds, with bootstrap intervals over both images and seeds.

A recipe trained with several seeds is evaluated on the same images. Each resample draws images (with all their captions) and
seeds, both with replacement; all compared runs share the same draws. The statistic is the mean over the drawn seeds, so the
interval covers the variance from images and from seeds (a two-way bootstrap: Owen 2007, "The pigeonhole bootstrap"). Few
seeds say little about seed variance: three seeds have only ten distinct resamples; with one, the interval covers images only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from icar_jax.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Hits, Interval, bounds, hits_at, resample_counts
from icar_jax.evaluation.metrics.retrieval import RECALL_AT, Ranks

_BAR_DELAY_S = 3.0
_SEEDS_SEED = 1  # random stream for drawing seeds, distinct from the stream for images
MEAN_K = 0  # value of `Hits.k` for hits averaged over several k

Key = TypeVar("Key", bound=Hashable)


def mean_recall_hits(ranks: Ranks) -> Hits:
    """Returns hits whose recall is the mean of R@1, R@5 and R@10."""
    return average([hits_at(ranks, k) for k in RECALL_AT])


def average(by_k: Sequence[Hits]) -> Hits:
    """Averages one run's hits at several k; since recall is linear in hits, the result's recall is the mean recall."""
    return Hits(
        k=MEAN_K,
        text_to_image=np.mean([hits.text_to_image for hits in by_k], axis=0),
        captions=by_k[0].captions,
        image_to_text=np.mean([hits.image_to_text for hits in by_k], axis=0),
    )


def resampled(runs: Mapping[Key, Hits], *, n: int = RESAMPLES, seed: int = 0) -> dict[Key, np.ndarray]:
    """Returns run -> float64 [1 + n]: recall in percent (mean of both directions) of the full gallery, then of n resamples.

    All runs share the same resamples of images. Raises ValueError for runs with different k, images or captions.
    """
    if not runs:
        return {}
    (first, some), *others = runs.items()
    for name, hits in others:
        if hits.k != some.k or not np.array_equal(hits.captions, some.captions):
            raise ValueError(
                f"{first} and {name} differ in k ({some.k}, {hits.k}) or in their images ({len(some.captions)} with "
                f"{some.captions.sum():.0f} captions, {len(hits.captions)} with {hits.captions.sum():.0f}): pooled runs must "
                "be evaluated in the same gallery"
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
    """Averages a statistic [S, 1 + R] over seeds -> [1 + R]; each resample averages S seeds drawn with replacement."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not len(values):
        raise ValueError(f"expected [seeds, 1 + resamples] of at least one seed, found shape {list(values.shape)}")
    seeds, columns = values.shape
    drawn = np.random.default_rng(_SEEDS_SEED).integers(0, seeds, (seeds, columns))
    drawn[:, 0] = np.arange(seeds)
    return np.take_along_axis(values, drawn, axis=0).mean(axis=0)


def interval(values: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """Returns the pooled value of a statistic [S, 1 + R] with its percentile interval; None if any value is not finite."""
    found = pooled(values)
    return bounds(float(found[0]), found[1:], level) if np.isfinite(found).all() else None


def retention(run: np.ndarray, baseline: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """Returns a run's recall in percent of the same seed's baseline recall, from two arrays [S, 1 + R] of `resampled`.

    Returns None if a baseline has no hit in some resample.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return interval(100.0 * (np.asarray(run) / np.asarray(baseline)), level=level)


def difference(run: np.ndarray, other: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """Returns the difference in recall of two runs, paired by seed, in percentage points, from two arrays [S, 1 + R]."""
    return interval(np.asarray(run) - np.asarray(other), level=level)


def captured(run: np.ndarray, random: np.ndarray, oracle: np.ndarray, *, level: float = LEVEL) -> Interval | None:
    """Returns the router's gain over random routing in percent of the oracle's gain at the same exit shares.

    The arguments are arrays [S, 1 + R]. It is the ratio of pooled gains, not the mean of ratios, because a single seed's
    oracle gain may be near zero. Returns None if the oracle gains nothing in some resample.
    """
    gained = pooled(np.asarray(run) - np.asarray(random))
    possible = pooled(np.asarray(oracle) - np.asarray(random))
    if not (possible > 0).all():
        return None
    share = 100.0 * gained / possible
    return bounds(float(share[0]), share[1:], level)


def _recall(hits: Hits, counts: np.ndarray, captions: np.ndarray) -> np.ndarray:
    # One matrix product per run, not a stacked one, so that identical runs give bit-identical numbers.
    text_to_image = (counts @ hits.text_to_image) / (counts @ captions)
    image_to_text = (counts @ hits.image_to_text) / counts.sum(axis=1)
    return 50.0 * (text_to_image + image_to_text)

"""Bootstrap intervals for recall: images are resampled together with all their captions, paired between runs.

The captions of an image are not independent, so the image is the unit of resampling. Each resample is a vector of
counts over the images, and recall is a weighted sum. Compared runs share the same counts, which cancels the
difficulty of the drawn images. Intervals are percentile intervals (Efron and Tibshirani 1993, ch. 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from icar_jax.evaluation.metrics.retrieval import Ranks

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK_ELEMENTS = 2_000_000  # counts in memory at once: 16 MB as float64


@dataclass(frozen=True)
class Hits:
    """Hits at k of one run per image, which is all that resampling needs. Float64, so draws can be averaged.

    k: the k of recall at k.
    text_to_image: [N] number of the image's captions that retrieve it among the top k images.
    captions: [N] number of captions of the image.
    image_to_text: [N] 1 if one of the top k captions belongs to the image, else 0.
    """

    k: int
    text_to_image: np.ndarray
    captions: np.ndarray
    image_to_text: np.ndarray


@dataclass(frozen=True)
class Recalls:
    """Recall at k of one run over R resamples, in percent; two arrays [R]."""

    text_to_image: np.ndarray
    image_to_text: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Mean of both directions, [R]."""
        return (self.text_to_image + self.image_to_text) / 2


@dataclass(frozen=True)
class Interval:
    """A statistic of the full gallery with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        return self.low <= 0.0 <= self.high

    def percent(self) -> Interval:
        """Returns the interval multiplied by 100, for a ratio shown in percent."""
        return Interval(100.0 * self.value, 100.0 * self.low, 100.0 * self.high)


def hits_at(ranks: Ranks, k: int) -> Hits:
    """Returns the hits at k of a run from its ranks. Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"hits need k >= 1, found {k}")
    n = len(ranks.image_to_text)
    return Hits(
        k=k,
        text_to_image=np.bincount(ranks.caption_image, weights=ranks.text_to_image <= k, minlength=n),
        captions=np.bincount(ranks.caption_image, minlength=n).astype(np.float64),
        image_to_text=(ranks.image_to_text <= k).astype(np.float64),
    )


def mean_hits(draws: Sequence[Hits]) -> Hits:
    """Averages the hits of several draws of a random run (such as random routing) on the same gallery."""
    _check_paired(draws)
    return Hits(
        k=draws[0].k,
        text_to_image=np.mean([d.text_to_image for d in draws], axis=0),
        captions=draws[0].captions,
        image_to_text=np.mean([d.image_to_text for d in draws], axis=0),
    )


def resample_indices(n_images: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """Yields chunks [r, n_images] of image indices drawn with replacement, n rows in all."""
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK_ELEMENTS // n_images)
    for start in range(0, n, rows):
        yield rng.integers(0, n_images, size=(min(rows, n - start), n_images))


def resample_counts(n_images: int, n: int, seed: int) -> Iterator[np.ndarray]:
    """Yields chunks [r, n_images] float64, n rows in all: how often each image was drawn in a resample."""
    for indices in resample_indices(n_images, n, seed):
        yield _counts(indices)


def interval(
    statistic: Callable[..., np.ndarray],
    hits: Sequence[Hits],
    *,
    n: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Returns the percentile interval of `statistic(*recalls)`, with one `Recalls` per entry of `hits` on shared resamples.

    statistic: maps R resamples to [R] values, for example `lambda run, full: run.mean - full.mean`.
    Raises ValueError for runs on different galleries or different k, and if the statistic is not finite.
    """
    point, values = _sample(statistic, hits, n=n, seed=seed, level=level)
    bad = int(np.count_nonzero(~np.isfinite(values))) + (not np.isfinite(point))
    if bad:
        raise ValueError(
            f"the statistic is not finite for {bad} of {n + 1} samples, so it has no interval; a ratio needs hits in "
            "every resample (see `retention`)"
        )
    return bounds(point, values, level)


def retention(run: Hits, full: Hits, *, n: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval | None:
    """Returns the ratio run / full of mean recall over both directions (1.0: no loss), with its paired interval.

    Returns None if the full run has no hit in the gallery or in some resample: with so few hits a ratio is meaningless
    (with about 15 hit images this does not happen).
    """
    point, values = _sample(_ratio, [run, full], n=n, seed=seed, level=level)
    if not np.isfinite(point) or not np.isfinite(values).all():
        return None
    return bounds(point, values, level)


def difference(run_a: Hits, run_b: Hits, *, n: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """Returns run_a - run_b in mean recall over both directions, in percentage points, with its paired interval."""
    return interval(lambda a, b: a.mean - b.mean, [run_a, run_b], n=n, seed=seed, level=level)


def _ratio(run: Recalls, full: Recalls) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return run.mean / full.mean


def _sample(
    statistic: Callable[..., np.ndarray], hits: Sequence[Hits], *, n: int, seed: int, level: float
) -> tuple[float, np.ndarray]:
    if n < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"an interval needs n >= 1 resamples and 0 < level < 1, found n={n}, level={level}")
    _check_paired(hits)
    n_images = len(hits[0].captions)
    point = statistic(*(_recalls(h, np.ones((1, n_images))) for h in hits))
    values = []
    for counts in resample_counts(n_images, n, seed):
        values.append(statistic(*(_recalls(h, counts) for h in hits)))
    return float(point[0]), np.concatenate(values)


def _counts(indices: np.ndarray) -> np.ndarray:
    """Converts indices [R, N] of drawn images to float64 counts [R, N] of how often each image was drawn."""
    rows, n_images = indices.shape
    flat = (indices + n_images * np.arange(rows)[:, None]).ravel()
    return np.bincount(flat, minlength=rows * n_images).reshape(rows, n_images).astype(np.float64)


def _recalls(hits: Hits, counts: np.ndarray) -> Recalls:
    # One matrix product per run, not a stacked one, so that identical runs give bit-identical numbers.
    return Recalls(
        text_to_image=100.0 * (counts @ hits.text_to_image) / (counts @ hits.captions),
        image_to_text=100.0 * (counts @ hits.image_to_text) / counts.sum(axis=1),
    )


def bounds(point: float, values: np.ndarray, level: float) -> Interval:
    """Returns the percentile interval of resampled values [R], with `point` as the value of the full gallery."""
    low, high = np.quantile(values, [(1.0 - level) / 2, (1.0 + level) / 2])
    return Interval(point, float(low), float(high))


def _check_paired(hits: Sequence[Hits]) -> None:
    if not hits:
        raise ValueError("expected the hits of at least one run, found none")
    first = hits[0]
    if len(first.captions) == 0:
        raise ValueError("the gallery is empty: there are no images to resample")
    for position, other in enumerate(hits[1:], start=1):
        if other.k != first.k:
            raise ValueError(f"runs must be compared at the same k, found k={first.k} (run 0), k={other.k} (run {position})")
        if not np.array_equal(other.captions, first.captions):
            raise ValueError(
                f"runs 0 and {position} differ in their gallery ({len(first.captions)} images with "
                f"{first.captions.sum():.0f} captions, {len(other.captions)} with {other.captions.sum():.0f}): a "
                "paired interval needs the same images with the same captions in the same order"
            )

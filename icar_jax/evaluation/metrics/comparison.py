"""Paired bootstrap intervals of all retrieval metrics of several runs; all runs and metrics share the same resamples.

A resample draws images with replacement, each with all its captions. Its metrics are those of the drawn queries, with their
ranks in the full gallery; the gallery is not resampled. Means are ratios of weighted sums. The median rank of a resample is
the usual median (the mean of the two middle ranks for an even count). It is found without sorting, by counting only the ranks
near the overall median.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from icar_jax.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Interval, bounds, resample_counts
from icar_jax.evaluation.metrics.category import Precisions
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT, Ranks

BOTH = "mean"  # mean over both directions
_BAR_DELAY_S = 3.0
_FIRST_WINDOW = 64  # distinct ranks searched for the medians; doubled until it covers the medians of all resamples


@dataclass(frozen=True)
class Queries:
    """The queries of one direction in one draw: ranks [Q] int64 and the image index [Q] of each query."""

    ranks: np.ndarray
    image: np.ndarray


@dataclass(frozen=True)
class RunMetrics:
    """The metrics of a run per image (N images), ready for resampling.

    means: direction -> metric -> (total [N], count [N]), float64; the metric is sum(total) / sum(count).
    queries: direction -> one `Queries` per draw; the median rank is the mean of their medians.
    """

    means: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
    queries: dict[str, tuple[Queries, ...]]

    @property
    def images(self) -> int:
        return len(next(iter(self.means[DIRECTIONS[0]].values()))[0])


@dataclass(frozen=True)
class Comparison:
    """One metric of one run compared with a reference run. A field is None if the metric is undefined in some resample.

    value: percent for recall and mAP, ranks for median and mean rank.
    difference: run - reference, in percentage points or ranks.
    retention: run / reference, in percent; None for ranks.
    """

    value: Interval | None
    difference: Interval | None
    retention: Interval | None


def collect(ranks: Ranks, precisions: Precisions | None = None) -> RunMetrics:
    """Returns the metrics of `retrieval.summarise`, and of `category.summarise` given precisions, per image of a run."""
    n = len(ranks.image_to_text)
    every = np.arange(n)
    found: dict[str, Queries] = {
        "text_to_image": Queries(ranks.text_to_image, ranks.caption_image),
        "image_to_text": Queries(ranks.image_to_text, every),
    }
    means: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for direction, queries in found.items():
        count = np.bincount(queries.image, minlength=n).astype(np.float64)
        values = {f"r{k}": 100.0 * (queries.ranks <= k) for k in RECALL_AT} | {"mean_rank": queries.ranks}
        means[direction] = {
            name: (np.bincount(queries.image, weights=value, minlength=n), count) for name, value in values.items()
        }
        if precisions is not None:
            for denominator, by_k in precisions.values[direction].items():
                for k, ap in by_k.items():
                    name = f"map{k}" if denominator == "official" else f"map{k}_{denominator}"
                    means[direction][name] = (100.0 * np.nan_to_num(ap), np.isfinite(ap).astype(np.float64))
    return RunMetrics(means, {direction: (queries,) for direction, queries in found.items()})


def mean_run(draws: Sequence[RunMetrics]) -> RunMetrics:
    """Averages several draws of a random run (such as random routing) on the same images.

    A metric that only some draws have, such as average precision, is averaged over those.
    """
    if not draws:
        raise ValueError("mean_run needs at least one draw, found none")
    _require_paired({f"draw {i}": draw for i, draw in enumerate(draws)})
    means = {
        direction: {
            name: (np.mean([d.means[direction][name][0] for d in draws if name in d.means[direction]], axis=0), count)
            for name, (_, count) in by_name.items()
        }
        for direction, by_name in draws[0].means.items()
    }
    return RunMetrics(means, {d: tuple(q for draw in draws for q in draw.queries[d]) for d in DIRECTIONS})


def intervals(
    runs: Mapping[str, RunMetrics], against: str = "full", *, n: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> dict[str, dict[str, dict[str, Comparison]]]:
    """Returns run -> 'text_to_image' | 'image_to_text' | 'mean' (of both) -> metric -> `Comparison` with the run `against`.

    Metrics: 'r1', 'r5', 'r10', 'median_rank', 'mean_rank' and, if collected, 'map10', ..., 'map10_standard', ...
    Raises ValueError for runs with different images or captions, and if `against` is missing.
    """
    if n < 1 or not 0.0 < level < 1.0:
        raise ValueError(f"an interval needs n >= 1 resamples and 0 < level < 1, found n={n}, level={level}")
    if against not in runs:
        raise ValueError(f"runs are compared with {against!r}, which is not among {sorted(runs)}")
    _require_paired(runs)
    images = runs[against].images
    point = {name: _metrics(run, np.ones((1, images))) for name, run in runs.items()}
    samples: dict[str, list[dict]] = {name: [] for name in runs}
    with tqdm(total=n, desc="bootstrap", unit="resample", delay=_BAR_DELAY_S, leave=False) as bar:
        for counts in resample_counts(images, n, seed):
            for name, run in runs.items():
                samples[name].append(_metrics(run, counts))
            bar.update(len(counts))
    joined = {
        name: {d: {m: np.concatenate([part[d][m] for part in parts]) for m in parts[0][d]} for d in parts[0]}
        for name, parts in samples.items()
    }

    def bounded(value: np.ndarray, values: np.ndarray) -> Interval | None:
        whole = float(value[0])
        return bounds(whole, values, level) if np.isfinite(whole) and np.isfinite(values).all() else None

    def compared(name: str, direction: str, metric: str) -> Comparison:
        (a, many), (b, other) = ((point[run][direction][metric], joined[run][direction][metric]) for run in (name, against))
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = None if metric.endswith("_rank") else bounded(100.0 * (a / b), 100.0 * (many / other))
        return Comparison(bounded(a, many), bounded(a - b, many - other), kept)

    return {
        name: {d: {m: compared(name, d, m) for m in by_metric if m in point[against][d]} for d, by_metric in found.items()}
        for name, found in point.items()
    }


def mean_of_folds(
    folds: Sequence[RunMetrics], *, n: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> dict[str, dict[str, Interval]]:
    """Returns 'text_to_image' | 'image_to_text' | 'mean' (of both) -> metric -> its mean over folds of different images.

    Images are drawn within each fold, independently of the others. Raises ValueError without folds.
    """
    if not folds:
        raise ValueError("mean_of_folds needs at least one fold, found none")
    whole = [_metrics(run, np.ones((1, run.images))) for run in folds]
    drawn = []
    for number, run in enumerate(folds):
        parts = [_metrics(run, counts) for counts in resample_counts(run.images, n, seed + number)]
        drawn.append({d: {m: np.concatenate([part[d][m] for part in parts]) for m in parts[0][d]} for d in parts[0]})
    return {
        d: {
            m: bounds(float(np.mean([w[d][m] for w in whole])), np.mean([f[d][m] for f in drawn], axis=0), level)
            for m in by_metric
        }
        for d, by_metric in whole[0].items()
    }


def _metrics(run: RunMetrics, counts: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """Returns direction or 'mean' -> metric -> [R], for counts [R, N] of how often each image was drawn."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for direction, by_name in run.means.items():
        # One matrix product per run, not one for all runs, so that identical runs give bit-identical numbers.
        totals, numbers = (counts @ np.stack([pair[i] for pair in by_name.values()], axis=1) for i in (0, 1))
        with np.errstate(divide="ignore", invalid="ignore"):
            found[direction] = dict(zip(by_name, (totals / numbers).T))
        found[direction]["median_rank"] = np.mean([_medians(q, counts) for q in run.queries[direction]], axis=0)
    first, second = (found[direction] for direction in DIRECTIONS)
    found[BOTH] = {metric: (first[metric] + second[metric]) / 2 for metric in first}
    return found


def _medians(queries: Queries, counts: np.ndarray) -> np.ndarray:
    """Returns the median rank [R] of the queries, each weighted by how often its image was drawn."""
    n_images = counts.shape[1]
    distinct, place = np.unique(queries.ranks, return_inverse=True)
    drawn = counts @ np.bincount(queries.image, minlength=n_images).astype(np.float64)
    lower, upper = np.floor((drawn + 1) / 2), np.floor((drawn + 2) / 2)  # 1-based positions of the two middle queries
    middle, width = int(np.median(place)), _FIRST_WINDOW
    while True:
        begin = max(0, middle - width // 2)
        end = min(len(distinct), begin + width)
        # reached[r, w]: number of queries in resample r with rank <= distinct[begin + w - 1].
        inside = (place >= begin) & (place < end)
        cell = queries.image[inside] * (end - begin + 1) + place[inside] - begin + 1
        held = np.bincount(cell, minlength=n_images * (end - begin + 1)).reshape(n_images, -1)
        held[:, 0] = np.bincount(queries.image[place < begin], minlength=n_images)
        reached = counts @ np.cumsum(held, axis=1).astype(np.float64)
        if (reached[:, 0] < lower).all() and (reached[:, -1] >= upper).all():
            break
        width *= 2
    first, second = (distinct[begin - 1 + np.argmax(reached >= wanted[:, None], axis=1)] for wanted in (lower, upper))
    return (first + second) / 2


def _require_paired(runs: Mapping[str, RunMetrics]) -> None:
    (first, reference), *others = runs.items()
    for name, run in others:
        for direction, by_name in reference.means.items():
            for metric, (_, count) in by_name.items():
                given = run.means[direction].get(metric)
                if given is not None and not np.array_equal(given[1], count):
                    raise ValueError(
                        f"runs {first!r} and {name!r} differ in the queries of {metric} {direction} ({len(count)} images with "
                        f"{count.sum():.0f} queries, {len(given[1])} with {given[1].sum():.0f}): a paired interval needs the "
                        "same images with the same captions and labels in the same order"
                    )

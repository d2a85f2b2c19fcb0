"""Chooses thresholds from scores: for a classifier by a decision metric, for several exits by their shares.

An image goes deeper, or is classified as complex, only if its score is strictly *above* the threshold. Scores and thresholds
are compared as float32, as in the router.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icar_jax.config import ConfigError
from icar_jax.evaluation.metrics.ratings import OF_DECISIONS, rate
from icar_jax.inference.budgets import between, checked_scores

METRICS = OF_DECISIONS
GRID = np.arange(1001) / 1000


def threshold_grid(low: float, high: float, step: float) -> np.ndarray:
    """float64 [n]: low, low + step, ... up to high. Raises ConfigError unless 0 <= low < high <= 1 and the step fits."""
    if not (0 <= low < high <= 1 and 1e-6 <= step <= high - low):
        raise ConfigError(
            f"threshold grid {low:g} {high:g} {step:g}: expected 0 <= LOW < HIGH <= 1 and a STEP from 0.000001 to HIGH - LOW"
        )
    return np.round(low + step * np.arange(int((high - low) / step + 1e-6) + 1), 9)


def best_threshold(scores: np.ndarray, labels: np.ndarray, metric: str = "f1", grid: np.ndarray = GRID) -> tuple[float, float]:
    """Returns the threshold on a grid, by default 0, 0.001, ..., 1, that maximises the metric of `score > threshold`, and that
    maximum.

    scores: [N] in [0, 1]; labels: [N] of 0 (simple) or 1 (complex). Ties go to the highest threshold, and 0/0 rates count
    as 0, as in ICAR's own search. Raises ValueError for invalid metrics, scores or labels.
    """
    check_metric(metric)
    scores, labels = checked_scores(scores), np.asarray(labels)
    if labels.shape != scores.shape or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"a threshold needs one label (0 or 1) for each of {len(scores)} scores; found shape {labels.shape}")
    limits = np.asarray(grid, np.float32)
    complex_, simple = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    fn, tn = np.searchsorted(complex_, limits, side="right"), np.searchsorted(simple, limits, side="right")
    values = rate(metric, len(complex_) - fn, len(simple) - tn, tn, fn)
    # Equal fractions computed from different counts may differ by rounding.
    best = np.flatnonzero(values >= values.max() - 1e-12)[-1]
    return float(grid[best]), float(values[best])


def check_metric(metric: str) -> None:
    """Raises ConfigError unless `metric` names a decision metric."""
    if metric not in METRICS:
        raise ConfigError(f"metric {metric!r} cannot choose a threshold; use one of {', '.join(METRICS)}")


def full_shares(shares: Sequence[float], exits: Sequence[int]) -> tuple[float, ...]:
    """Returns one share per exit, full depth last; empty `shares` means equal shares. Raises ConfigError for invalid shares."""
    if not shares:
        return (1 / len(exits),) * len(exits)
    if len(shares) != len(exits) - 1 or min(shares) < 0 or sum(shares) > 1:
        raise ConfigError(
            f"early shares {tuple(shares)} do not match the exits {tuple(exits)}: pass {len(exits) - 1} numbers in [0, 1] "
            "that sum to at most 1, one for each exit before full depth"
        )
    return (*shares, 1 - sum(shares))


def thresholds_for_shares(scores: np.ndarray, shares: Sequence[float]) -> tuple[float, ...]:
    """Returns thresholds at quantiles of scores [N] for shares per exit (full depth last), one per exit but the last.

    Each threshold lies midway between two adjacent scores, so shares are met up to one image and ties. A share of 0 puts
    its threshold below every score.
    """
    ordered = np.sort(checked_scores(scores))
    return between(ordered, np.rint(np.cumsum(shares)[:-1] * len(ordered)).astype(int))

"""Thresholds from scores: of a classifier by a metric of its decisions, of several exits by shares or by a budget.

A score runs further, or is called complex, only where it is *above* the threshold. Scores and thresholds are compared as
float32, as the router does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icar_jax.config import ConfigError
from icar_jax.evaluation.metrics.ratings import OF_DECISIONS, rate
from icar_jax.inference.budgets import between, checked_scores

METRICS = OF_DECISIONS
GRID = np.arange(1001) / 1000


def best_threshold(scores: np.ndarray, labels: np.ndarray, metric: str = "f1") -> tuple[float, float]:
    """The threshold on the grid 0, 0.001, ..., 1 with the best metric of `score > threshold`, and that value.

    scores [N] in [0, 1]; labels [N] of 0 (simple) and 1 (complex). Of equal values the highest threshold is taken, and a
    rate without images (0/0) counts 0, as in ICAR's own search. Raises ValueError for other metrics, scores and labels.
    """
    check_metric(metric)
    scores, labels = checked_scores(scores), np.asarray(labels)
    if labels.shape != scores.shape or not np.isin(labels, (0, 1)).all():
        raise ValueError(f"a threshold needs one label, 0 or 1, for each of {len(scores)} scores; found {labels.shape}")
    grid = GRID.astype(np.float32)
    complex_, simple = np.sort(scores[labels == 1]), np.sort(scores[labels == 0])
    fn, tn = np.searchsorted(complex_, grid, side="right"), np.searchsorted(simple, grid, side="right")
    values = rate(metric, len(complex_) - fn, len(simple) - tn, tn, fn)
    # Equal fractions of different counts may differ by rounding.
    best = np.flatnonzero(values >= values.max() - 1e-12)[-1]
    return float(GRID[best]), float(values[best])


def check_metric(metric: str) -> None:
    """Raises ConfigError for the name of anything but a metric of decisions."""
    if metric not in METRICS:
        raise ConfigError(f"metric {metric!r} chooses no threshold; use one of {', '.join(METRICS)}")


def full_shares(shares: Sequence[float], exits: Sequence[int]) -> tuple[float, ...]:
    """One share for every exit, full depth last; empty `shares` divides equally. Raises ConfigError where they misfit."""
    if not shares:
        return (1 / len(exits),) * len(exits)
    if len(shares) != len(exits) - 1 or min(shares) < 0 or sum(shares) > 1:
        raise ConfigError(
            f"early shares {tuple(shares)} do not fit the exits {tuple(exits)}: give {len(exits) - 1} numbers in [0, 1] "
            "that sum to at most 1, one for each exit before full depth"
        )
    return (*shares, 1 - sum(shares))


def thresholds_for_shares(scores: np.ndarray, shares: Sequence[float]) -> tuple[float, ...]:
    """Thresholds at quantiles: scores [N], shares per exit (full depth last) -> one threshold per exit but the last.

    A threshold lies midway between two neighbouring scores, so that the shares are met exactly up to one image and
    ties. A share of 0 puts its threshold below every score.
    """
    ordered = np.sort(checked_scores(scores))
    return between(ordered, np.rint(np.cumsum(shares)[:-1] * len(ordered)).astype(int))

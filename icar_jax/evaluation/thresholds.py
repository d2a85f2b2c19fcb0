"""Thresholds from scores: of a classifier by a metric of its decisions, of several exits by shares or by a budget.

A score runs further, or is called complex, only where it is *above* the threshold. Scores and thresholds are compared as
float32, as the router does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from icar_jax.config import ConfigError
from icar_jax.evaluation.ratings_metrics import OF_DECISIONS, rate

METRICS = OF_DECISIONS
GRID = np.arange(1001) / 1000
BELOW_ALL, ABOVE_ALL = -1.0, 2.0  # scores lie in [0, 1]: these hold for every image, not only for those seen
_STEEPEST = 700.0  # exp() of it is finite


@dataclass(frozen=True)
class Costs:
    """Counted FLOPs of an image: `exits` maps executed blocks to the tower's, `router` comes on top for every image."""

    exits: dict[int, float]
    router: float

    @property
    def full(self) -> float:
        """Of full depth without a router: the unit of budgets."""
        return self.exits[max(self.exits)]

    @property
    def lowest_budget(self) -> float:
        """Every image at the first exit, router included, as a share of full depth."""
        return (self.exits[min(self.exits)] + self.router) / self.full

    def share_of_full(self, shares: dict[int, float]) -> float:
        """Mean cost of shares of the images per exit, router included, as a share of full depth."""
        return (sum(shares[e] * cost for e, cost in self.exits.items()) + self.router) / self.full


def best_threshold(scores: np.ndarray, labels: np.ndarray, metric: str = "f1") -> tuple[float, float]:
    """The threshold on the grid 0, 0.001, ..., 1 with the best metric of `score > threshold`, and that value.

    scores [N] in [0, 1]; labels [N] of 0 (simple) and 1 (complex). Of equal values the highest threshold is taken, and a
    rate without images (0/0) counts 0, as in ICAR's own search. Raises ValueError for other metrics, scores and labels.
    """
    check_metric(metric)
    scores, labels = _scores(scores), np.asarray(labels)
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
    ordered = np.sort(_scores(scores))
    return _at(ordered, np.rint(np.cumsum(shares)[:-1] * len(ordered)).astype(int))


def shares_for_budget(budget: float, costs: Costs) -> tuple[float, ...]:
    """The share of each exit, ascending, whose mean cost, router included, is `budget` times that of full depth.

    For two exits there is one answer. For more, the answer of greatest entropy, which is nearest to equal shares: shares
    proportional to exp(-slope x cost), with the one slope that meets the budget (Jaynes 1957). Scores say in which order
    images deserve depth, not how much an exit loses; without labels nothing favours one exit over another but its cost.
    Raises ConfigError for a budget that cannot be met, naming the lowest one, and above 1.
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"budget {budget} must lie in (0, 1]: a share of what every image costs at full depth")
    names = sorted(costs.exits)
    if budget < costs.lowest_budget:
        raise ConfigError(
            f"budget {budget:g} cannot be met: exit {names[0]} for every image costs {costs.lowest_budget:.4f} of full depth, "
            f"{costs.router / costs.full:.4f} of it for the complexity model; give a budget of at least "
            f"{np.ceil(costs.lowest_budget * 1e4) / 1e4:g}, an earlier exit or a cheaper complexity model"
        )
    cost = np.array([costs.exits[e] for e in names])
    depth = (cost - cost[0]) / (cost[-1] - cost[0])
    wanted = (budget * costs.full - costs.router - cost[0]) / (cost[-1] - cost[0])

    def over(slope: float) -> float:
        return softmax(-slope * depth) @ depth - wanted

    if over(_STEEPEST) >= 0:
        return (1.0, *[0.0] * (len(names) - 1))
    if over(-_STEEPEST) <= 0:
        return (*[0.0] * (len(names) - 1), 1.0)
    return tuple(softmax(-brentq(over, -_STEEPEST, _STEEPEST, xtol=1e-13, rtol=1e-13) * depth).tolist())


def thresholds_for_budget(scores: np.ndarray, budget: float, costs: Costs) -> tuple[float, ...]:
    """Ascending thresholds under which these scores [N] cost at most `budget`: one threshold per exit but the last.

    The shares are those of `shares_for_budget`, rounded to images so that none exceeds the budget: equal scores, which no
    threshold divides, stay together at the earlier exit. Raises ConfigError for a budget that cannot be met.
    """
    ordered = np.sort(_scores(scores))
    wanted = np.cumsum(shares_for_budget(budget, costs))[:-1] * len(ordered)
    early = np.ceil(wanted - 1e-9).astype(int)
    return _at(ordered, np.searchsorted(ordered, ordered[np.maximum(early, 1) - 1], side="right") * (early > 0))


def _at(ordered: np.ndarray, below: np.ndarray) -> tuple[float, ...]:
    """Thresholds with below[i] of the ordered scores at or under the i-th, up to ties."""
    middles = (ordered[:-1].astype(np.float64) + ordered[1:]) / 2
    edges = np.concatenate([[BELOW_ALL], middles, [ABOVE_ALL]])
    return tuple(float(edges[b]) for b in below)


def _scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all() or scores.min() < 0 or scores.max() > 1:
        raise ValueError(
            f"thresholds need finite scores in [0, 1] of at least one calibration image, found {len(scores)} scores"
            + (f" from {scores.min():g} to {scores.max():g}" if scores.size else "")
        )
    return scores

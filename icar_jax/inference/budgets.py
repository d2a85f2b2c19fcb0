"""Budgets: which thresholds make routing cost a given share of full depth.

A bundle carries the quantiles of its calibration scores, so that any budget can be met later without the calibration images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import softmax

from icar_jax.config import ConfigError
from icar_jax.errors import DataError
from icar_jax.models.clip import ClipArch
from icar_jax.models.flops import router_flops, vision_flops
from icar_jax.models.token_router import ScorerArch

BELOW_ALL, ABOVE_ALL = -1.0, 2.0  # scores lie in [0, 1]: these hold for every image, not only for those seen
_STEEPEST = 700.0  # exp() of it is finite
QUANTILES = 1001  # of the calibration scores: shares are met to a thousandth


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
    ordered = np.sort(checked_scores(scores))
    wanted = np.cumsum(shares_for_budget(budget, costs))[:-1] * len(ordered)
    early = np.ceil(wanted - 1e-9).astype(int)
    return between(ordered, np.searchsorted(ordered, ordered[np.maximum(early, 1) - 1], side="right") * (early > 0))


def counted_costs(clip: ClipArch, scorer: ScorerArch) -> Costs:
    """Counted FLOPs of the exits of a CLIP and of the complexity model that routes to them."""
    return Costs({e: float(vision_flops(clip.vision, e)) for e in clip.vision.all_exits}, float(router_flops(scorer)))


def pack_quantiles(scores: np.ndarray) -> str:
    """Calibration scores [N] -> their QUANTILES quantiles as text, for a bundle's description."""
    return " ".join(f"{q:.7g}" for q in np.quantile(checked_scores(scores), np.linspace(0, 1, QUANTILES)))


def unpack_quantiles(text: str) -> np.ndarray:
    """Inverse of `pack_quantiles`: float32 [QUANTILES], ascending."""
    return checked_scores(np.array(text.split(), np.float32))


def between(ordered: np.ndarray, below: np.ndarray) -> tuple[float, ...]:
    """Thresholds with below[i] of the ordered scores at or under the i-th, up to ties."""
    middles = (ordered[:-1].astype(np.float64) + ordered[1:]) / 2
    edges = np.concatenate([[BELOW_ALL], middles, [ABOVE_ALL]])
    return tuple(float(edges[b]) for b in below)


def checked_scores(scores: np.ndarray) -> np.ndarray:
    """float32 [N]. Raises DataError unless they are finite, in [0, 1] and at least one."""
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all() or scores.min() < 0 or scores.max() > 1:
        raise DataError(
            f"thresholds need finite scores in [0, 1] of at least one calibration image, found {len(scores)} scores"
            + (f" from {scores.min():g} to {scores.max():g}" if scores.size else "")
        )
    return scores

"""Budgets: thresholds at which routing costs a given fraction of full depth.

A bundle stores the quantiles of its calibration scores, so any budget can be applied later without the calibration images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from icar_jax.config import ConfigError
from icar_jax.errors import DataError
from icar_jax.models.clip import ClipArch
from icar_jax.models.flops import router_flops, vision_flops
from icar_jax.models.reduction.routes import in_cost_order
from icar_jax.models.token_router import ScorerArch

BELOW_ALL, ABOVE_ALL = -1.0, 2.0  # outside [0, 1], the range of scores, so they apply to every possible image
_STEEPEST = 700.0  # exp(700) is finite
QUANTILES = 1001  # of the calibration scores, so shares are accurate to 0.001


@dataclass(frozen=True)
class Costs:
    """Counted FLOPs per image: `exits` maps executed blocks, or routes ascending in cost, to FLOPs of the tower.

    `router` is added for every image.
    """

    exits: dict[int, float]
    router: float

    @property
    def full(self) -> float:
        """FLOPs of full depth without a router, the unit of budgets."""
        return self.exits[in_cost_order(self.exits)[-1]]

    @property
    def lowest_budget(self) -> float:
        """Cost with every image at the first exit, router included, as a fraction of full depth."""
        return (self.exits[in_cost_order(self.exits)[0]] + self.router) / self.full

    def share_of_full(self, shares: dict[int, float]) -> float:
        """Mean cost as a fraction of full depth, router included; `shares` maps exits to fractions of the images."""
        return (sum(shares[e] * cost for e, cost in self.exits.items()) + self.router) / self.full


def shares_for_budget(budget: float, costs: Costs) -> tuple[float, ...]:
    """Fraction of the images for each exit, ascending, whose mean cost (router included) is `budget` times full depth.

    Two exits have one solution. With more, the maximum-entropy solution is used, which is closest to equal shares: shares
    proportional to exp(-slope x cost), where the slope is solved for the budget (Jaynes 1957). Scores rank images by the
    depth they need but do not say how much recall an exit loses, so without labels exits differ only in cost.
    Raises ConfigError if `budget` exceeds 1 or cannot be met; the message names the lowest possible budget.
    """
    if not 0 < budget <= 1:
        raise ConfigError(f"budget {budget} must lie in (0, 1], as a fraction of the cost of full depth")
    names = in_cost_order(costs.exits)
    if budget < costs.lowest_budget:
        raise ConfigError(
            f"budget {budget:g} cannot be met: sending every image to exit {names[0]} costs {costs.lowest_budget:.4f} of full "
            f"depth, including {costs.router / costs.full:.4f} for the complexity model; use a budget of at least "
            f"{np.ceil(costs.lowest_budget * 1e4) / 1e4:g}, an earlier exit or a cheaper complexity model"
        )
    from scipy.optimize import brentq  # slow to import, and only needed where a budget is solved for
    from scipy.special import softmax

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
    """Ascending thresholds at which scores [N] cost at most `budget`; one threshold for every exit except the last.

    Shares come from `shares_for_budget`, rounded to whole images so that the budget is not exceeded. Equal scores all go to
    the earlier exit, since no threshold separates them. Raises ConfigError for a budget that cannot be met.
    """
    ordered = np.sort(checked_scores(scores))
    wanted = np.cumsum(shares_for_budget(budget, costs))[:-1] * len(ordered)
    early = np.ceil(wanted - 1e-9).astype(int)
    return between(ordered, np.searchsorted(ordered, ordered[np.maximum(early, 1) - 1], side="right") * (early > 0))


def counted_costs(clip: ClipArch, scorer: ScorerArch) -> Costs:
    """Counted FLOPs per image of each exit of a CLIP and of its complexity model."""
    return Costs({e: float(vision_flops(clip.vision, e)) for e in clip.vision.all_exits}, float(router_flops(scorer)))


def pack_quantiles(scores: np.ndarray) -> str:
    """The QUANTILES quantiles of calibration scores [N] as text, for a bundle's description."""
    return " ".join(f"{q:.7g}" for q in np.quantile(checked_scores(scores), np.linspace(0, 1, QUANTILES)))


def unpack_quantiles(text: str) -> np.ndarray:
    """Quantiles float32 [QUANTILES], ascending; the inverse of `pack_quantiles`."""
    try:
        return checked_scores(np.array(text.split(), np.float32))
    except (ValueError, OverflowError) as error:
        raise DataError(f"the calibration scores of the bundle are damaged ({error}); calibrate it again") from error


def between(ordered: np.ndarray, below: np.ndarray) -> tuple[float, ...]:
    """Thresholds such that below[i] of the sorted scores are at or below the i-th threshold, up to ties."""
    middles = (ordered[:-1].astype(np.float64) + ordered[1:]) / 2
    edges = np.concatenate([[BELOW_ALL], middles, [ABOVE_ALL]])
    return tuple(float(edges[b]) for b in below)


def checked_scores(scores: np.ndarray) -> np.ndarray:
    """The scores as float32 [N]. Raises DataError if there are none, or one is not finite or not in [0, 1]."""
    scores = np.asarray(scores, np.float32)
    if scores.ndim != 1 or not len(scores) or not np.isfinite(scores).all() or scores.min() < 0 or scores.max() > 1:
        raise DataError(
            f"thresholds need finite scores in [0, 1] for at least one calibration image, found {len(scores)} scores"
            + (f" from {scores.min():g} to {scores.max():g}" if scores.size else "")
        )
    return scores

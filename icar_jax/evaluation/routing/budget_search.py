"""The budget dial by recall and by measured cost: the cheapest thresholds that lose at most so much, on calibration images.

What is chosen on images looks better on them than on others, so the drop that is found here is optimistic; evaluate.py shows
that of the held-out split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icar_jax.config import ConfigError
from icar_jax.data.records import Source
from icar_jax.evaluation.metrics.bootstrap import difference, hits_at
from icar_jax.evaluation.metrics.ranking import local_mesh
from icar_jax.evaluation.routing import timing
from icar_jax.evaluation.routing.frontier import EXHAUSTIVE, RECALL_AT, Bench, Point, best_within, cheapest
from icar_jax.evaluation.routing.gallery import Gallery, embed
from icar_jax.inference.budgets import Costs, thresholds_for_budget
from icar_jax.inference.model import Model

KINDS = ("counted", "measured")


@dataclass(frozen=True)
class SearchedSettings:
    """The settings that a search tried, the one it chose, full depth, the kind of cost, and the bound: points or a share."""

    settings: tuple[Point, ...]
    chosen: Point
    full: Point
    cost: str
    max_drop: float | None
    budget: float | None


def check_cost(kind: str) -> None:
    """Raises ConfigError for anything but a kind of cost."""
    if kind not in KINDS:
        raise ConfigError(f"cost {kind!r} is unknown; use one of {', '.join(KINDS)}")


def check_drop(max_drop: float) -> None:
    """Raises ConfigError for a drop that is no number of points."""
    if not 0 <= max_drop <= 100:
        raise ConfigError(f"a recall drop of {max_drop} must lie in [0, 100]: points of mean R@{RECALL_AT}, such as 0.5")


def require_captions(gallery: Gallery, source: Source) -> None:
    """Raises ConfigError where recall cannot be measured."""
    if bare := sum(not captions for captions in gallery.captions):
        raise ConfigError(
            f"{bare} of {len(gallery.captions)} images of {source.name} have no caption, and recall needs them; pass --config, "
            "or a workdir whose calibration images have captions"
        )


def find(
    model: Model,
    source: Source,
    counted: Costs,
    *,
    max_drop: float | None = None,
    budget: float | None = None,
    cost: str = "measured",
    loading: Mapping[str, Any] | None = None,
    draw: Callable[[SearchedSettings], None] | None = None,
) -> tuple[Gallery, tuple[float, ...], dict[str, Any]]:
    """The cheapest thresholds whose mean R@5 is at most `max_drop` points below that of full depth, or those of the highest
    mean R@5 that cost at most `budget` times full depth, on the images of `source`. One of the two is given.

    counted: FLOPs of the exits and the router; cost: which one it goes by, 'counted' or 'measured' (seconds, of which the
    medians of repeated timings count, router included). draw: called with all settings tried.
    Returns the images with their scores, the thresholds, and how they were found: 'drop' with the 95% interval of that one
    setting (paired bootstrap), which does not know that the setting was chosen, 'recall', 'full_recall', 'settings' tried,
    'search', 'exit_alone' (a single exit that would do as well at less cost, or None), and 'measured', as of `describe_costs`.
    Raises ConfigError where images have no captions, and for a budget that cannot be met, naming the lowest one.
    """
    gallery = embed(model, source, loading)
    require_captions(gallery, source)
    measured = timing.measured_costs(model, gallery.sample)
    bench = Bench(
        gallery.by_exit, gallery.texts, gallery.caption_image, gallery.scores, {"counted": counted, "measured": measured},
        mesh=local_mesh(),
    )  # fmt: skip
    full = bench.full
    if budget is not None:
        thresholds_for_budget(np.zeros(1, np.float32), budget, bench.costs[cost])  # whether it can be met
        best, how = best_within(bench, budget, cost), {"method": "budget", "budget": budget, "chosen_by": "recall"}
        alone = _exit_alone(bench, best.recall, cost)
    else:
        best, how = cheapest(bench, max_drop, cost), {"method": "max_recall_drop", "max_recall_drop": max_drop}
        alone = _exit_alone(bench, full.recall - max_drop, cost)
    (found,) = bench.ranks([best.thresholds])
    (whole,) = bench.ranks([full.thresholds])
    # Where the interval runs past zero to below, the setting may be no worse than full depth at all.
    drop = difference(hits_at(whole, RECALL_AT), hits_at(found, RECALL_AT))
    if draw is not None:
        draw(SearchedSettings(tuple(bench.known), best, full, cost, max_drop, budget))
    return gallery, best.thresholds, {
        **how,
        "cost_by": cost,
        "drop": drop.as_dict(),
        "recall": best.recall,
        "full_recall": full.recall,
        "captions": len(gallery.texts),
        "settings": bench.tried,
        "search": "exhaustive" if len(model.exits) - 1 <= EXHAUSTIVE else "coordinates",
        "exit_alone": alone if alone is not None and alone["cost"] < best.cost[cost] else None,
        "measured": describe_costs(measured, best, len(gallery.sample.clip)),
    }  # fmt: skip


def _exit_alone(bench: Bench, lowest: float, cost: str) -> dict[str, Any] | None:
    """The first early exit that keeps the recall with every image at it, which needs no router."""
    early = len(bench.exits) - 1
    costs = bench.costs[cost]
    for place, exit in enumerate(bench.exits[:-1]):
        (point,) = bench.points([bench.thresholds([0.0] * place + [1.0] * (early - place))])
        if point.recall >= lowest - 1e-9:
            return {"exit": exit, "cost": costs.exits[exit] / costs.full, "recall": point.recall}
    return None


def measure_costs(model: Model, source: Source, loading: Mapping[str, Any] | None = None) -> tuple[Costs, int]:
    """Measured costs on the first images of a source that can be read, and how many these were."""
    made = timing.sample_of(model, source, loading=loading)
    return timing.measured_costs(model, made), len(made.clip)


def describe_costs(costs: Costs, setting: Point | Mapping[int, float], images: int) -> dict[str, Any]:
    """Measured costs for a description: 'cost' of a setting (or of shares per exit) as a share of full depth, and
    milliseconds per image of the router and of every exit."""
    share = setting.share if isinstance(setting, Point) else dict(setting)
    return {
        "cost": costs.share_of_full(share),
        "router_ms": 1e3 * costs.router,
        "exit_ms": {str(e): 1e3 * seconds for e, seconds in costs.exits.items()},
        "images": images,
        "repeats": timing.COST_REPEATS,
    }

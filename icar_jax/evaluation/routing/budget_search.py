"""Budget search: the cheapest thresholds within a recall drop, or the best recall within a budget, on calibration images.

The recall drop reported here is optimistic, because the thresholds were chosen on the same images; evaluate.py measures it on
the held-out split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from icar_jax.config import ConfigError
from icar_jax.data.records import Source
from icar_jax.evaluation.metrics.bootstrap import difference, hits_at
from icar_jax.evaluation.metrics.ranking import local_mesh
from icar_jax.evaluation.routing import timing
from icar_jax.evaluation.routing.frontier import EXHAUSTIVE, RECALL_AT, Bench, Point, best_within, cheapest
from icar_jax.evaluation.routing.gallery import Gallery, embed_source
from icar_jax.inference.budgets import Costs, thresholds_for_budget
from icar_jax.inference.model import Model

KINDS = ("counted", "measured")


@dataclass(frozen=True)
class SearchedSettings:
    """All settings a search tried, the chosen one, full depth, the kind of cost, and the bound: max_drop in percentage points
    or budget as a fraction of full depth."""

    settings: tuple[Point, ...]
    chosen: Point
    full: Point
    cost: str
    max_drop: float | None
    budget: float | None


def check_cost(kind: str) -> None:
    """Raises ConfigError unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise ConfigError(f"cost {kind!r} is unknown; use one of {', '.join(KINDS)}")


def check_drop(max_drop: float) -> None:
    """Raises ConfigError unless `max_drop` lies in [0, 100] percentage points."""
    if not 0 <= max_drop <= 100:
        raise ConfigError(f"a recall drop of {max_drop} must lie in [0, 100]: points of mean R@{RECALL_AT}, such as 0.5")


def require_captions(gallery: Gallery, source: Source) -> None:
    """Raises ConfigError if some images have no caption, since recall cannot be measured on them."""
    if bare := sum(not captions for captions in gallery.captions):
        raise ConfigError(
            f"{bare} of {len(gallery.captions)} images of {source.name} have no caption, but recall needs captions; pass "
            "--config, or a workdir whose calibration images have captions"
        )


def search_thresholds(
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
    """Searches for thresholds on the images of `source`, and returns (gallery, thresholds, record of the search).

    Exactly one bound is given: with `max_drop`, finds the cheapest thresholds whose mean R@5 is at most that many points below
    full depth; with `budget`, finds the highest mean R@5 that costs at most `budget` times full depth.

    counted: FLOPs of the exits and the router. cost: 'counted', or 'measured' (median seconds of repeated timings, router
    included). draw: called with all settings tried.
    The record holds 'drop' (with the 95% paired bootstrap interval of the chosen setting, not corrected for the selection),
    'recall', 'full_recall', 'settings' (number tried), 'search', 'exit_alone' (a single exit that meets the bound at lower
    cost, or None) and 'measured' (see `describe_costs`).
    Raises ConfigError if images have no captions, and for a budget that cannot be met, naming the lowest possible one.
    """
    gallery = embed_source(model, source, loading)
    require_captions(gallery, source)
    measured = timing.measured_costs(model, gallery.sample)
    bench = Bench(
        gallery.by_exit, gallery.texts, gallery.caption_image, gallery.scores, {"counted": counted, "measured": measured},
        mesh=local_mesh(),
    )  # fmt: skip
    full = bench.full
    if budget is not None:
        thresholds_for_budget(np.zeros(1, np.float32), budget, bench.costs[cost])  # raises if it cannot be met
        best, how = best_within(bench, budget, cost), {"method": "budget", "budget": budget, "chosen_by": "recall"}
        alone = _exit_alone(bench, best.recall, cost)
    else:
        best, how = cheapest(bench, max_drop, cost), {"method": "max_recall_drop", "max_recall_drop": max_drop}
        alone = _exit_alone(bench, full.recall - max_drop, cost)
    (found,) = bench.ranks([best.thresholds])
    (whole,) = bench.ranks([full.thresholds])
    # If the interval includes zero, the setting is not shown to be worse than full depth.
    drop = difference(hits_at(whole, RECALL_AT), hits_at(found, RECALL_AT))
    if draw is not None:
        draw(SearchedSettings(tuple(bench.known), best, full, cost, max_drop, budget))
    return gallery, best.thresholds, {
        **how,
        "cost_by": cost,
        "drop": asdict(drop),
        "recall": best.recall,
        "full_recall": full.recall,
        "captions": len(gallery.texts),
        "settings": bench.tried,
        "search": "exhaustive" if len(model.exits) - 1 <= EXHAUSTIVE else "coordinates",
        "exit_alone": alone if alone is not None and alone["cost"] < best.cost[cost] else None,
        "measured": describe_costs(measured, best, len(gallery.sample.clip)),
    }  # fmt: skip


def _exit_alone(bench: Bench, lowest: float, cost: str) -> dict[str, Any] | None:
    """Returns the first early exit that reaches recall `lowest` when used for all images (no router needed), or None."""
    early = len(bench.exits) - 1
    costs = bench.costs[cost]
    for place, exit in enumerate(bench.exits[:-1]):
        (point,) = bench.points([bench.thresholds([0.0] * place + [1.0] * (early - place))])
        if point.recall >= lowest - 1e-9:
            return {"exit": exit, "cost": costs.exits[exit] / costs.full, "recall": point.recall}
    return None


def measure_costs(model: Model, source: Source, loading: Mapping[str, Any] | None = None) -> tuple[Costs, int]:
    """Returns measured costs on the first readable images of a source, and the number of images."""
    made = timing.sample_of(model, source, loading=loading)
    return timing.measured_costs(model, made), len(made.clip)


def describe_costs(costs: Costs, setting: Point | Mapping[int, float], images: int) -> dict[str, Any]:
    """Returns measured costs for a description: 'cost' of a setting (or of shares per exit) as a fraction of full depth, and
    milliseconds per image of the router and of every exit."""
    share = setting.share if isinstance(setting, Point) else dict(setting)
    return {
        "cost": costs.share_of_full(share),
        "router_ms": 1e3 * costs.router,
        "exit_ms": {str(e): 1e3 * seconds for e, seconds in costs.exits.items()},
        "images": images,
        "repeats": timing.COST_REPEATS,
    }

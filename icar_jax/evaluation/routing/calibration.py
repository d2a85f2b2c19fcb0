"""Thresholds from calibration images, and the checkpoints that carry them.

Calibration images come from the training split and are never trained on; the evaluated split has no say. Whatever finds
thresholds records how, so that `icar describe` tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint
from icar_jax.config import ConfigError, from_dict
from icar_jax.data.configured import fingerprint
from icar_jax.data.loader.batches import BadFiles, eval_batches
from icar_jax.data.records import Source
from icar_jax.errors import DataError
from icar_jax.evaluation.metrics import ratings
from icar_jax.evaluation.routing import budget_search
from icar_jax.evaluation.routing.thresholds import best_threshold, check_metric, full_shares, thresholds_for_shares
from icar_jax.inference.budgets import Costs, counted_costs, pack_quantiles, thresholds_for_budget
from icar_jax.inference.loading import load, load_parts
from icar_jax.inference.model import Model
from icar_jax.inference.router import assign
from icar_jax.models.clip import ClipArch
from icar_jax.models.token_router import scorer_arch

CLASSIFICATION = "classification"


@dataclass(frozen=True)
class ScoredImages:
    """Every readable image of a source: scores and known complexity float32 [n] (nan where unknown), in order."""

    scores: np.ndarray
    complexity: np.ndarray
    bad: BadFiles
    source: Source

    def record(self) -> dict[str, Any]:
        """Which images these are, for a checkpoint's description."""
        names = {k: v for k, v in fingerprint(self.source).items() if k != "images"}
        return {
            "calibration": self.source.name,
            "images": len(self.scores),
            "unreadable": len(self.bad.reasons),
            **names,
        }


def score_source(model: Model, source: Source, title: str, loading: Mapping[str, Any] | None = None) -> ScoredImages:
    """Scores every readable image of a source. `loading` are keywords of `eval_batches`: workers, retries and the like.

    Raises DataError where none can be read.
    """
    pending, known, bad = [], [], BadFiles()
    batches = eval_batches(source, {"complexity": model.scorer.preprocess}, batch_size=model.batch_size, **(loading or {}))
    with batches:
        for batch in tqdm(batches, total=-(-len(source) // model.batch_size), desc=title, unit="batch"):
            bad.add(batch)
            if len(batch["index"]):
                pending.append(model.scorer.forward.submit(batch["images"]["complexity"]))
                known.append(batch["complexity"])
    if not pending:
        raise DataError(f"no image of {source.name} could be read:\n{bad.summary()}")
    return ScoredImages(np.concatenate([part.result() for part in pending]), np.concatenate(known), bad, source)


def costs_of(bundle: str | Path) -> Costs:
    """Counted FLOPs of a bundle's exits and of its router, from the descriptions alone."""
    bundle = Path(bundle)
    clip, scorer = (checkpoint.describe(bundle / part)["arch"] for part in ("clip", "complexity"))
    return costs(from_dict(clip, ClipArch, f"{bundle / 'clip'}: arch"), scorer_arch(scorer, f"{bundle / 'complexity'}: arch"))


def costs(clip: ClipArch, scorer: Any) -> Costs:
    """Counted FLOPs of the exits of a CLIP and of the complexity model that routes to them."""
    return counted_costs(clip, scorer)


def routing_of(
    scored: ScoredImages, exits: Sequence[int], costs: Costs, *, shares: Sequence[float] = (), budget: float | None = None
) -> dict[str, Any]:
    """Thresholds from a budget, or from shares of the early exits (empty: equal), as the 'routing' of a bundle.

    Returns {'exits', 'thresholds', 'found', 'scores'}. 'found' says how, on what, and what was reached: the shares of the
    exits and the counted cost, router included, as a share of full depth; 'scores' are quantiles, as of `pack_quantiles`.
    Raises ConfigError for what cannot be met.
    """
    if budget is not None:
        thresholds = thresholds_for_budget(scored.scores, budget, costs)
        found: dict[str, Any] = {"method": "budget", "budget": budget}
    else:
        wanted = full_shares(shares, exits)
        thresholds = thresholds_for_shares(scored.scores, wanted)
        found = {"method": "shares", "shares": dict(zip(map(str, exits), wanted))}
    routing = _routing(scored, exits, costs, thresholds, found)
    if budget is None:
        reached = routing["found"]["reached"]
        if any(abs(reached[str(e)] - share) > 0.05 for e, share in zip(exits, wanted)):
            logging.warning(
                "Many images have the same complexity score, so the shares %s were not met: reached %s.", wanted, reached
            )
    return routing


def _routing(
    scored: ScoredImages, exits: Sequence[int], costs: Costs, thresholds: Sequence[float], found: Mapping[str, Any]
) -> dict[str, Any]:
    taken = assign(scored.scores, exits, thresholds)
    reached = {e: float(np.mean(taken == e)) for e in exits}
    result = {"reached": {str(e): share for e, share in reached.items()}, "cost": costs.share_of_full(reached)}
    return {
        "exits": list(exits),
        "thresholds": [float(t) for t in thresholds],
        "found": {**found, **result, **scored.record()},
        "scores": pack_quantiles(scored.scores),
    }


def threshold_of(scored: ScoredImages, metric: str, boundary: float | None, *, resamples: int) -> tuple[float, dict[str, Any]]:
    """The threshold of a classifier, and how it was found, from images whose labels are known.

    `boundary` makes labels of ratings: a complexity above it is the class 'complex'. It may be None where all are 0 or 1.
    The interval is of the metric at the found threshold; its bounds are None where the images are too few for one.
    Raises ConfigError where labels are missing or of one class.
    """
    labels = labels_of(scored.complexity, boundary, scored.source.name)
    threshold, value = best_threshold(scored.scores, labels, metric)
    called = scored.scores > np.float32(threshold)
    try:
        reached = ratings.interval(metric, called, labels, n=resamples).as_dict()
    except ratings.MetricError:
        reached = {"value": value, "low": None, "high": None}
    return threshold, {
        "method": "metric",
        "metric": metric,
        **reached,
        **({} if boundary is None else {"boundary": boundary}),
        "complex": int(labels.sum()),
        "called_complex": int(called.sum()),
        **scored.record(),
    }


def labels_of(complexity: np.ndarray, boundary: float | None, where: str) -> np.ndarray:
    """Known complexity [n] -> labels int [n], 1 above `boundary`. Raises ConfigError where there is no telling."""
    if missing := int(np.isnan(complexity).sum()):
        raise ConfigError(f"{missing} of {len(complexity)} images of {where} have no label; pass --labels FILE --root FOLDER")
    if boundary is None and not np.isin(complexity, (0, 1)).all():
        other = complexity[~np.isin(complexity, (0, 1))][0]
        raise ConfigError(
            f"{where} holds ratings such as {other:g}, not labels 0 and 1; pass --boundary, the rating above which an image is "
            "complex"
        )
    labels = (complexity == 1 if boundary is None else complexity > boundary).astype(int)
    if labels.min() == labels.max():
        raise ConfigError(
            f"all {len(labels)} images of {where} are of class {'complex' if labels[0] else 'simple'}; "
            "a threshold needs images of both classes"
        )
    return labels


def calibrate(
    folder: str | Path,
    source: Source,
    *,
    budget: float | None = None,
    shares: Sequence[float] = (),
    metric: str | None = None,
    max_recall_drop: float | None = None,
    best_recall: bool = False,
    cost: str | None = None,
    boundary: float | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    loading: Mapping[str, Any] | None = None,
    resamples: int = ratings.RESAMPLES,
    draw: Callable[[budget_search.SearchedSettings], None] | None = None,
) -> dict[str, Any]:
    """Finds thresholds on `source` and writes them into the description of a bundle or of a classifier.

    Exactly one of `budget`, `shares`, `metric` and `max_recall_drop` is given. A bundle takes any of them, `metric` where it
    has one early exit; a classifier takes `metric`. Weights stay as they are. Returns the new description.
    best_recall: of a budget, the thresholds of the highest mean R@5, not those that spread it evenly: see `dial`.
    cost: of budgets (default 'counted'), of `best_recall` and of drops (default 'measured'), which are in points of mean R@5.
    draw: called with the settings that `max_recall_drop` or `best_recall` tried.
    Raises ConfigError for what does not fit the checkpoint or cannot be met, CheckpointError for another kind.
    """
    if sum((budget is not None, bool(shares), metric is not None, max_recall_drop is not None)) != 1:
        raise ConfigError(
            "thresholds are found by one of: a budget, a share for each early exit, a metric of labelled images, a recall drop"
        )
    if best_recall and budget is None:
        raise ConfigError("the best recall is looked for within a budget: give one")
    if cost is not None:
        budget_search.check_cost(cost)
        if budget is None and max_recall_drop is None:
            raise ConfigError(f"cost {cost!r} is for a budget or a recall drop; shares and metrics are found without costs")
    folder = checkpoint.find(folder, ("bundle", "complexity"))
    description = checkpoint.describe(folder)
    bundle = description["kind"] == "bundle"
    if metric is not None:
        check_metric(metric)
    _check_fits(folder, description, metric)
    if max_recall_drop is not None or best_recall:
        return _calibrate_recall(
            folder, source, max_recall_drop, budget, cost or "measured", draw, batch_size, dtype, loading
        )  # fmt: skip
    if bundle:
        exits = description["routing"]["exits"]
        counted = costs_of(folder)
        if budget is not None and cost != "measured":
            thresholds_for_budget(np.zeros(1, np.float32), budget, counted)  # known before the images are scored
        full_shares(shares, exits)
        if cost == "measured":
            whole = load(folder, batch_size=batch_size, dtype=dtype)
            measured = budget_search.measure_costs(whole, source, loading)
            thresholds_for_budget(np.zeros(1, np.float32), budget, measured[0])
    scored = score_source(load(folder / "complexity" if bundle else folder, batch_size=batch_size, dtype=dtype),
                          source, "calibrate", loading)  # fmt: skip
    if metric is not None:
        threshold, found = threshold_of(scored, metric, boundary, resamples=resamples)
        changes = {"threshold": threshold, "threshold_found": found}
        if bundle:
            changes = {"routing": _routing(scored, exits, counted, (threshold,), found)}
    elif cost == "measured":
        found = {"method": "budget", "budget": budget, "cost_by": cost}
        routing = _routing(scored, exits, counted, thresholds_for_budget(scored.scores, budget, measured[0]), found)
        reached = {int(e): share for e, share in routing["found"]["reached"].items()}
        routing["found"]["measured"] = budget_search.describe_costs(measured[0], reached, measured[1])
        changes = {"routing": routing}
    else:
        changes = {"routing": routing_of(scored, exits, counted, shares=shares, budget=budget)}
    checkpoint.amend(folder, changes)
    return checkpoint.describe(folder)


def _calibrate_recall(
    folder: Path, source: Source, max_drop: float | None, budget: float | None, cost: str,
    draw: Callable[[budget_search.SearchedSettings], None] | None, batch_size: int, dtype: str,
    loading: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    if max_drop is not None:
        budget_search.check_drop(max_drop)
    elif cost == "counted":
        thresholds_for_budget(np.zeros(1, np.float32), budget, costs_of(folder))  # known before the images are embedded
    model = load(folder, batch_size=batch_size, dtype=dtype)
    gallery, thresholds, found = budget_search.find(
        model, source, costs_of(folder), max_drop=max_drop, budget=budget, cost=cost, loading=loading, draw=draw
    )  # fmt: skip
    scored = ScoredImages(gallery.scores, np.full(len(gallery.scores), np.nan, np.float32), gallery.bad, source)
    checkpoint.amend(folder, {"routing": _routing(scored, model.exits, costs_of(folder), thresholds, found)})
    return checkpoint.describe(folder)


def _check_fits(folder: Path, description: Mapping[str, Any], metric: str | None) -> None:
    if description["kind"] == "bundle":
        exits = description["routing"]["exits"]
        if metric is not None and len(exits) != 2:
            raise ConfigError(
                f"{folder} has the exits {tuple(exits)}: a metric of labels finds one threshold, for one early exit and full "
                "depth; use --budget or --share"
            )
    elif metric is None:
        raise ConfigError(
            f"{folder} is a complexity model alone: budgets and shares are of a bundle's exits; `icar bundle` makes one. "
            "For the threshold of a classifier pass --metric"
        )
    elif description["arch"]["head"] != CLASSIFICATION:
        raise ConfigError(
            f"{folder} predicts ratings (head 'regression') and calls nothing complex, so it has no threshold of its own; "
            "calibrate a classifier, or the bundle that routes with it"
        )


def make_bundle(
    clip: str | Path,
    complexity: str | Path,
    out: str | Path,
    *,
    calibration: Source | None = None,
    shares: Sequence[float] = (),
    thresholds: Sequence[float] | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    loading: Mapping[str, Any] | None = None,
) -> Path:
    """Joins a CLIP and a complexity checkpoint with thresholds and writes the bundle to `out`.

    Either `thresholds` are given, or they are set on `calibration` so that each exit gets its share of those images. Without
    both, the threshold that a converted classifier brings along serves a CLIP with one early exit. `loading` are keywords of
    `eval_batches`: workers, retries and the like.
    The description records how they were found. Raises CheckpointError or ConfigError where the parts do not fit.
    """
    checkpoint.require_replaceable(out, "bundle")  # known before the calibration images are scored
    clip_model, scorer = load_parts(clip, complexity, batch_size=batch_size, dtype=dtype)
    exits = clip_model.exits
    if len(exits) < 2:
        raise ConfigError(
            f"{clip} has no early exit, so there is nothing to route; train it with config.clip.exits, or convert it again "
            "with `icar convert --exits`"
        )
    stored = scorer.description.get("threshold")
    if thresholds is not None:
        assign(np.zeros(0), exits, thresholds)
        routing = {"thresholds": [float(t) for t in thresholds], "found": {"method": "given"}}
    elif calibration is None and stored is not None and len(exits) == 2 and not shares:
        routing = {"thresholds": [float(stored)], "found": {"method": "stored with the complexity model"}}
    else:
        if calibration is None:
            raise ConfigError(
                "a bundle needs thresholds, or calibration images to set them on: pass --thresholds, or as --clip a workdir of "
                "train.py, which names its calibration images"
            )
        full_shares(shares, exits)
        scored = score_source(scorer, calibration, "calibrate", loading)
        routing = routing_of(scored, exits, costs(clip_model.arch, scorer.scorer.complexity.arch), shares=shares)
    routing = {"exits": list(exits), **routing}
    logging.info("Thresholds %s for exits %s.", routing["thresholds"], exits)
    return checkpoint.write_bundle(
        out, {"routing": routing}, checkpoint.find(clip, ("clip",)), checkpoint.find(complexity, ("complexity",))
    )

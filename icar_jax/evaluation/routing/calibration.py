"""Calibrates thresholds on calibration images and writes them into checkpoints.

Calibration images are held out from the training split: they are never trained on, and the evaluation split is never used. How
thresholds were found is recorded in the checkpoint and shown by `icar describe`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint
from icar_jax.config import ConfigError, from_dict
from icar_jax.data.configured import fingerprint
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.records import Source
from icar_jax.errors import DataError
from icar_jax.evaluation.metrics import ratings
from icar_jax.evaluation.routing import budget_search
from icar_jax.evaluation.routing.thresholds import (
    GRID,
    best_threshold,
    check_metric,
    full_shares,
    threshold_grid,
    thresholds_for_shares,
)
from icar_jax.inference.budgets import Costs, counted_costs, pack_quantiles, thresholds_for_budget
from icar_jax.inference.loading import load, load_parts
from icar_jax.inference.model import Model
from icar_jax.inference.router import assign
from icar_jax.models.clip import ClipArch
from icar_jax.models.token_router import scorer_arch

CLASSIFICATION = "classification"


@dataclass(frozen=True)
class ScoredImages:
    """Scores and known complexity of every readable image of a source, in order; float32 [n], nan if unknown."""

    scores: np.ndarray
    complexity: np.ndarray
    bad: BadFiles
    source: Source

    def record(self) -> dict[str, Any]:
        """Returns what identifies these images, for a checkpoint's description."""
        names = {k: v for k, v in fingerprint(self.source).items() if k != "images"}
        return {
            "calibration": self.source.name,
            "images": len(self.scores),
            "unreadable": len(self.bad.reasons),
            **names,
        }


def score_source(model: Model, source: Source, title: str, loading: Mapping[str, Any] | None = None) -> ScoredImages:
    """Scores every readable image of a source. loading: keyword arguments of `eval_batches` (workers, retries, ...).

    Raises DataError if no image can be read.
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


def bundle_costs(bundle: str | Path) -> Costs:
    """Returns counted FLOPs of a bundle's exits and router, reading only the descriptions."""
    bundle = Path(bundle)
    clip, scorer = (checkpoint.describe(bundle / part)["arch"] for part in ("clip", "complexity"))
    return model_costs(
        from_dict(clip, ClipArch, f"{bundle / 'clip'}: arch"), scorer_arch(scorer, f"{bundle / 'complexity'}: arch")
    )


def model_costs(clip: ClipArch, scorer: Any) -> Costs:
    """Returns counted FLOPs of a CLIP's exits and of the complexity model that routes to them."""
    return counted_costs(clip, scorer)


def routing_from_scores(
    scored: ScoredImages, exits: Sequence[int], costs: Costs, *, shares: Sequence[float] = (), budget: float | None = None
) -> dict[str, Any]:
    """Calibrates thresholds for a budget, or for shares of the early exits (empty: equal), and returns a bundle's 'routing'.

    Returns {'exits', 'thresholds', 'found', 'scores'}. 'found' records the method, the calibration images, the exit shares
    reached, and the counted cost as a fraction of full depth, router included. 'scores' are quantiles from `pack_quantiles`.
    Raises ConfigError for a budget or shares that cannot be met.
    """
    if budget is not None:
        thresholds = thresholds_for_budget(scored.scores, budget, costs)
        found: dict[str, Any] = {"method": "budget", "budget": budget}
    else:
        wanted = full_shares(shares, exits)
        thresholds = thresholds_for_shares(scored.scores, wanted)
        found = {"method": "shares", "shares": dict(zip(map(str, exits), wanted))}
    routing = _routing_record(scored, exits, costs, thresholds, found)
    if budget is None:
        reached = routing["found"]["reached"]
        if any(abs(reached[str(e)] - share) > 0.05 for e, share in zip(exits, wanted)):
            logging.warning(
                "The shares %s were not met, because many images have equal complexity scores; reached %s.", wanted, reached
            )
    return routing


def _routing_record(
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


def classifier_threshold(
    scored: ScoredImages, metric: str, boundary: float | None, *, resamples: int, grid: Sequence[float] = ()
) -> tuple[float, dict[str, Any]]:
    """Chooses a classifier's threshold on labelled images; returns (threshold, record of how it was found).

    boundary: ratings above it are labelled 'complex'; may be None if all ratings are 0 or 1. grid: (low, high, step) of the
    thresholds that are tried; empty: 0, 0.001, ..., 1. The record's interval is of the
    metric at the chosen threshold; its bounds are None if there are too few images. Raises ConfigError if labels are missing
    or all of one class.
    """
    labels = binary_labels(scored.complexity, boundary, scored.source.name)
    threshold, _ = best_threshold(scored.scores, labels, metric, threshold_grid(*grid) if grid else GRID)
    called = scored.scores > np.float32(threshold)
    return threshold, {
        "method": "metric",
        "metric": metric,
        **asdict(ratings.estimate(metric, called, labels, n=resamples)),
        **({} if boundary is None else {"boundary": boundary}),
        **({"grid": list(grid)} if grid else {}),
        "complex": int(labels.sum()),
        "called_complex": int(called.sum()),
        **scored.record(),
    }


def binary_labels(complexity: np.ndarray, boundary: float | None, where: str) -> np.ndarray:
    """Converts known complexity [n] to labels int [n], 1 above `boundary`. Raises ConfigError if labels cannot be derived."""
    if missing := int(np.isnan(complexity).sum()):
        raise ConfigError(f"{missing} of {len(complexity)} images of {where} have no label; pass --labels FILE --root FOLDER")
    if boundary is None and not np.isin(complexity, (0, 1)).all():
        other = complexity[~np.isin(complexity, (0, 1))][0]
        raise ConfigError(
            f"{where} holds ratings such as {other:g}, not labels 0 and 1; pass --boundary, the rating above which an image "
            "counts as complex"
        )
    labels = (complexity == 1 if boundary is None else complexity > boundary).astype(int)
    if labels.min() == labels.max():
        raise ConfigError(
            f"all {len(labels)} images of {where} belong to class {'complex' if labels[0] else 'simple'}; "
            "choosing a threshold needs images of both classes"
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
    grid: Sequence[float] = (),
    batch_size: int = 64,
    dtype: str = "float32",
    loading: Mapping[str, Any] | None = None,
    resamples: int = ratings.RESAMPLES,
    draw: Callable[[budget_search.SearchedSettings], None] | None = None,
) -> dict[str, Any]:
    """Calibrates thresholds on `source`, writes them into a bundle's or classifier's description and returns the description.

    Exactly one of `budget`, `shares`, `metric` and `max_recall_drop` must be given. A bundle accepts any of them (`metric` only
    with one early exit); a classifier accepts `metric`. Weights do not change.
    max_recall_drop: in percentage points of mean R@5.
    best_recall: with a budget, maximise mean R@5 instead of spreading the budget evenly; see `budget_search`.
    cost: 'counted' (default for budgets) or 'measured' (default for `best_recall` and `max_recall_drop`).
    boundary, grid: with a metric, as for `classifier_threshold`.
    draw: called with all settings that `max_recall_drop` or `best_recall` tried.
    Raises ConfigError for options that do not apply to the checkpoint or cannot be met, CheckpointError for another kind of
    checkpoint.
    """
    if sum((budget is not None, bool(shares), metric is not None, max_recall_drop is not None)) != 1:
        raise ConfigError(
            "pass exactly one of: a budget, a share for each early exit, a metric of labelled images, a maximum recall drop"
        )
    if best_recall and budget is None:
        raise ConfigError("best recall needs a budget to search within; pass one")
    if cost is not None:
        budget_search.check_cost(cost)
        if budget is None and max_recall_drop is None:
            raise ConfigError(f"cost {cost!r} applies only to a budget or a recall drop, not to shares or metrics")
    folder = checkpoint.find(folder, ("bundle", "complexity"))
    description = checkpoint.describe(folder)
    bundle = description["kind"] == "bundle"
    if metric is not None:
        check_metric(metric)
    if grid:
        if metric is None:
            raise ConfigError("a threshold grid needs a metric to choose by: pass --metric")
        threshold_grid(*grid)  # fails before images are scored
    _check_fits(folder, description, metric)
    if max_recall_drop is not None or best_recall:
        return _calibrate_recall(
            folder, source, max_recall_drop, budget, cost or "measured", draw, batch_size, dtype, loading
        )  # fmt: skip
    if bundle:
        exits = description["routing"]["exits"]
        counted = bundle_costs(folder)
        if budget is not None and cost != "measured":
            thresholds_for_budget(np.zeros(1, np.float32), budget, counted)  # fails early if the budget cannot be met
        full_shares(shares, exits)
        if cost == "measured":
            whole = load(folder, batch_size=batch_size, dtype=dtype)
            measured = budget_search.measure_costs(whole, source, loading)
            thresholds_for_budget(np.zeros(1, np.float32), budget, measured[0])
    scored = score_source(load(folder / "complexity" if bundle else folder, batch_size=batch_size, dtype=dtype),
                          source, "calibrate", loading)  # fmt: skip
    if metric is not None:
        threshold, found = classifier_threshold(scored, metric, boundary, resamples=resamples, grid=grid)
        changes = {"threshold": threshold, "threshold_found": found}
        if bundle:
            changes = {"routing": _routing_record(scored, exits, counted, (threshold,), found)}
    elif cost == "measured":
        found = {"method": "budget", "budget": budget, "cost_by": cost}
        routing = _routing_record(scored, exits, counted, thresholds_for_budget(scored.scores, budget, measured[0]), found)
        reached = {int(e): share for e, share in routing["found"]["reached"].items()}
        routing["found"]["measured"] = budget_search.describe_costs(measured[0], reached, measured[1])
        changes = {"routing": routing}
    else:
        changes = {"routing": routing_from_scores(scored, exits, counted, shares=shares, budget=budget)}
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
        thresholds_for_budget(np.zeros(1, np.float32), budget, bundle_costs(folder))  # fails early if it cannot be met
    model = load(folder, batch_size=batch_size, dtype=dtype)
    gallery, thresholds, found = budget_search.search_thresholds(
        model, source, bundle_costs(folder), max_drop=max_drop, budget=budget, cost=cost, loading=loading, draw=draw
    )  # fmt: skip
    scored = ScoredImages(gallery.scores, np.full(len(gallery.scores), np.nan, np.float32), gallery.bad, source)
    checkpoint.amend(folder, {"routing": _routing_record(scored, model.exits, bundle_costs(folder), thresholds, found)})
    return checkpoint.describe(folder)


def _check_fits(folder: Path, description: Mapping[str, Any], metric: str | None) -> None:
    if description["kind"] == "bundle":
        exits = description["routing"]["exits"]
        if metric is not None and len(exits) != 2:
            raise ConfigError(
                f"{folder} has the exits {tuple(exits)}: a metric sets one threshold, which needs exactly one early exit; use "
                "--budget or --share"
            )
    elif metric is None:
        raise ConfigError(
            f"{folder} is a complexity model without a CLIP: budgets and shares need a bundle (made by `icar bundle`); to set "
            "the threshold of a classifier pass --metric"
        )
    elif description["arch"]["head"] != CLASSIFICATION:
        raise ConfigError(
            f"{folder} is a regression model; only classifiers have a decision threshold. Calibrate a classifier, or the "
            "bundle that routes with this model"
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
    """Combines a CLIP and a complexity checkpoint with thresholds, writes the bundle to `out` and returns its path.

    Either `thresholds` are given, or they are calibrated on `calibration` so that each exit gets its share of the images. With
    neither, a CLIP with one early exit uses the threshold stored with a converted classifier. loading: keyword arguments of
    `eval_batches` (workers, retries, ...). The description records how the thresholds were found. Raises CheckpointError or
    ConfigError if the parts do not match.
    """
    checkpoint.require_replaceable(out, "bundle")  # fails before the calibration images are scored
    clip_model, scorer = load_parts(clip, complexity, batch_size=batch_size, dtype=dtype)
    exits = clip_model.exits
    if len(exits) < 2:
        raise ConfigError(
            f"{clip} has no early exit, so routing is not possible; train it with config.clip.exits, or convert it again with "
            "`icar convert --exits`"
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
                "a bundle needs thresholds, or calibration images to set them: pass --thresholds, or pass a train.py workdir "
                "as --clip, whose config names the calibration images"
            )
        full_shares(shares, exits)
        scored = score_source(scorer, calibration, "calibrate", loading)
        routing = routing_from_scores(scored, exits, model_costs(clip_model.arch, scorer.scorer.complexity.arch), shares=shares)
    routing = {"exits": list(exits), **routing}
    logging.info("Thresholds %s for exits %s.", routing["thresholds"], exits)
    return checkpoint.write_bundle(
        out, {"routing": routing}, checkpoint.find(clip, ("clip",)), checkpoint.find(complexity, ("complexity",))
    )

"""Evaluation of a complexity model on its held-out split, beside classical measures of the same pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax import workdir as files
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.loader.batches import BadFiles, eval_batches
from icar_jax.data.records import Source
from icar_jax.errors import DataError
from icar_jax.evaluation.complexity import agreement, baselines, regret
from icar_jax.evaluation.complexity.agreement import Predictions
from icar_jax.evaluation.metrics import ratings as m
from icar_jax.evaluation.report import complexity_figures, complexity_table
from icar_jax.evaluation.report.table import write_metrics
from icar_jax.evaluation.routing.calibration import labels_of
from icar_jax.evaluation.routing.thresholds import best_threshold
from icar_jax.inference.loading import load
from icar_jax.inference.model import Model
from icar_jax.models import variants
from icar_jax.models.flops import complexity_flops, router_flops, vision_flops

MODEL = "model"
NUISANCES = ("noise", "blur", "contrast")  # of scenes: varied independently of the complexity
TIMED = 256  # images whose scoring is timed
REPEATS = 3  # the fastest counts: other work on the machine only ever adds time
REFERENCE = "vit_l14"  # the tower whose cost a router is measured against


@dataclass(frozen=True)
class ComplexityResult:
    """Every readable image of a split: scores float32 [n], measures [n, 3], known complexity float32 [n], indices [n]."""

    scores: np.ndarray
    measures: np.ndarray
    complexity: np.ndarray
    index: np.ndarray
    sample: dict[str, np.ndarray]  # prepared pixels of the first images, to be timed
    bad: BadFiles


def evaluate_complexity(config: ExperimentConfig, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the complexity model in `workdir`; writes metrics.json, scores.png and, for scenes, nuisance.png there.

    A run that kept its best model is evaluated by that one, in WORKDIR/best. Returns the metrics as documented in
    evaluation/complexity_table.py. Of a model that learnt regret, what it is compared with are the ranks of the regrets (see
    evaluation/regret.py). Raises ConfigError or CheckpointError: a classifier needs a stored threshold, and the images
    must be those that the run in `workdir` was started on, or some that it trained on could be among the held-out ones.
    """
    config = cfg.validate(config)
    cfg.require_local("--workdir", workdir)
    workdir = Path(workdir)
    folder = checkpoint.find(workdir, ("complexity",))
    if (workdir / files.CONFIG).is_file():
        free = [field for field in files.FREE_ON_EVALUATION if field != "config.complexity"]
        files.require_same_config(workdir, config, free)
        otherwise = f"pass --workdir={folder} to evaluate the model on other images"
        files.require_same_data(workdir, configured.fingerprint(configured.train_source(config.data)), otherwise)
    model = load(folder, batch_size=config.eval.batch_size, dtype=config.eval.dtype)
    threshold = _stored_threshold(model, folder)
    source, calibration = configured.eval_source(config.data, config.eval), configured.calibration_source(config.data)
    lost = _regrets(config, model, calibration, source)
    fitted_on, asked = (found.judged() for found in lost) if lost else (calibration, source)
    fitted = _measure(config, None, fitted_on, "calibration images")
    measured = _measure(config, model, asked, "score")
    metrics = _report(config, model, threshold, fitted, measured, source, lost)
    metrics["notes"] = _notes(folder, source, calibration, fitted, measured)
    if threshold is not None:
        metrics["notes"].append(_decision_note(model.description.get("threshold_found", {}), threshold, source, calibration))
    write_metrics(metrics, workdir / "metrics.json")
    complexity_table.print_results(metrics)
    complexity_figures.scores(measured.scores, measured.complexity, metrics, workdir / "scores.png")
    if metrics["nuisance"]:
        complexity_figures.nuisance(metrics, workdir / "nuisance.png")
    return metrics


def _stored_threshold(model: Model, folder: Path) -> float | None:
    """The threshold of a classifier; None for a regression, which decides nothing."""
    if model.scorer.complexity.arch.head != "classification":
        return None
    if "threshold" not in model.description:
        raise CheckpointError(
            f"{folder} is a classifier without a threshold, so it decides nothing yet: run `icar calibrate {folder} --metric "
            "f1` first, which chooses one on the calibration images"
        )
    return float(model.description["threshold"])


def _regrets(config: ExperimentConfig, model: Model, *of: Source) -> tuple[regret.Regrets, ...] | None:
    """The regrets of each source; None of a model of ratings."""
    told = model.description.get("regret")
    if config.complexity.target != "regret":
        if told is not None:
            raise cfg.ConfigError(
                f"the model learnt regret, at exit {told['exit']} of {told['clip']}: pass --config.complexity.target=regret "
                "--config.complexity.clip=CLIP to evaluate it"
            )
        return None
    clip = regret.open_clip(config, model.description)
    return tuple(regret.measure(config, clip, told, source) for source in of)


def _measure(config: ExperimentConfig, model: Model | None, source: Source, title: str) -> ComplexityResult:
    """One pass over a split: the classical measures of every picture, and its score where there is a model."""
    preprocess = {"classical": baselines.PREPROCESS} | ({MODEL: model.scorer.preprocess} if model else {})
    size, bad = config.eval.batch_size, BadFiles()
    scores, measures, known, index = [], [], [], []
    kept: dict[str, list[np.ndarray]] = {key: [] for key in preprocess}
    with eval_batches(source, preprocess, batch_size=size, **configured.loading(config.data)) as batches:
        for batch in tqdm(batches, total=-(-len(source) // size), desc=title, unit="batch"):
            bad.add(batch)
            if not len(batch["index"]):
                continue
            if model:
                scores.append(model.scorer.forward.submit(batch["images"][MODEL]))
            measures.append(baselines.measure(batch["images"]["classical"]))
            known.append(batch["complexity"])
            index.append(batch["index"])
            if sum(map(len, kept["classical"])) < TIMED:
                for key, pixels in batch["images"].items():
                    kept[key].append(pixels)
    if not known:
        raise DataError(f"no image of {source.name} could be read:\n{bad.summary()}")
    complexity = np.concatenate(known)
    if np.isnan(complexity).any():
        raise cfg.ConfigError(f"{int(np.isnan(complexity).sum())} of {len(complexity)} images of {source.name} have no rating")
    return ComplexityResult(
        np.concatenate([part.result() for part in scores]) if model else np.zeros(0, np.float32),
        np.concatenate(measures),
        complexity,
        np.concatenate(index),
        {key: np.concatenate(parts)[:TIMED] for key, parts in kept.items()},
        bad,
    )


def _report(
    config: ExperimentConfig,
    model: Model,
    threshold: float | None,
    fitted: ComplexityResult,
    measured: ComplexityResult,
    source: Source,
    lost: tuple[regret.Regrets, ...] | None,
) -> dict[str, Any]:
    n, head = config.eval.bootstrap, model.scorer.complexity.arch.head
    fits = baselines.fit(fitted.measures, fitted.complexity)
    others = {name: Predictions(fit(measured.measures)) for name, fit in fits.items()}
    truth, names, ranked_by = measured.complexity, m.OF_RATINGS, "pcc"
    if threshold is not None:
        boundary = config.complexity.threshold
        truth = labels_of(measured.complexity, boundary, source.name)
        labels = labels_of(fitted.complexity, boundary, "the calibration images")
        chosen_by = model.description.get("threshold_found", {}).get("metric", "f1")
        others = {
            name: Predictions(p.scores, best_threshold(fits[name](fitted.measures), labels, chosen_by)[0])
            for name, p in others.items()
        }
        names, ranked_by = agreement.OF_CLASSIFIERS, "roc_auc"
    known = _known(lost, fitted) if lost else {}
    predictors = {MODEL: Predictions(measured.scores, threshold), **known, **others}
    nuisances = _nuisances(source, measured.index)
    metrics = {
        "task": "complexity",
        "head": head,
        "source": source.name,
        "images": len(truth),
        "runs": agreement.rows(predictors, truth, names, n),
        "margin": agreement.margin(ranked_by, predictors[MODEL], others, truth, n),
        "nuisance": agreement.by_level(predictors, measured.complexity, nuisances, n) if nuisances else {},
        "cost": _cost(model, measured.sample, known),
    }
    if lost:
        rated = lost[1].known() if known else None
        metrics["regret"] = regret.record(lost[1], model.description["regret"], measured.scores, rated, n)
        metrics["over_known"] = agreement.margin(ranked_by, predictors[MODEL], known, truth, n) if known else None
    if threshold is not None:
        confusion = m.confusion(predictors[MODEL].decided, truth).as_dict()
        metrics |= {"threshold": threshold, "boundary": boundary, "confusion": confusion}
    return metrics


def _known(lost: tuple[regret.Regrets, ...], fitted: ComplexityResult) -> dict[str, Predictions]:
    """What the source knows of its images' complexity as a predictor of regret: a line fitted on the calibration images."""
    rated, asked = (found.known() for found in lost)
    if np.isnan(rated).any() or np.isnan(asked).any() or not np.ptp(rated):
        return {}
    return {regret.KNOWN: Predictions(regret.line(rated, fitted.complexity, asked))}


def _nuisances(source: Source, index: np.ndarray) -> dict[str, np.ndarray]:
    """What varies in scenes beside their complexity: name -> [n]; empty for other sources."""
    if not hasattr(source, "scene"):
        return {}
    found = [source.scene(i).nuisance for i in index.tolist()]
    return {name: np.array([getattr(nuisance, name) for nuisance in found]) for name in NUISANCES}


def _cost(model: Model, sample: dict[str, np.ndarray], known: Mapping[str, Predictions]) -> dict[str, dict[str, float | None]]:
    """What each predictor costs an image, timed on prepared pixels, compilation left out."""
    arch = model.scorer.complexity.arch
    tower, flops = vision_flops(variants.CLIP[REFERENCE].vision), complexity_flops(arch)
    forward = model.scorer.forward
    forward(sample[MODEL])  # compiles
    seconds = _fastest(lambda: forward(sample[MODEL])) / len(sample[MODEL])
    none = {"flops_per_image": None, "share_of_vit_l14": None}
    cost: dict[str, dict[str, float | None]] = {
        MODEL: {
            "flops_per_image": flops,
            "share_of_vit_l14": flops / tower,
            "routing_flops": router_flops(arch),
            "ms_per_image": 1e3 * seconds,
        }
    }
    cost |= {name: {**none, "ms_per_image": None} for name in known}
    pictures = sample["classical"]
    for name, function in baselines.MEASURES.items():
        seconds = _fastest(lambda: [function(picture) for picture in pictures]) / len(pictures)
        cost[name] = {**none, "ms_per_image": 1e3 * seconds}
    total = sum(cost[name]["ms_per_image"] for name in baselines.MEASURES)
    cost[baselines.COMBINED] = {**none, "ms_per_image": total}
    return cost


def _fastest(run: Callable[[], object]) -> float:
    best = np.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _decision_note(found: Mapping[str, Any], threshold: float, source: Source, calibration: Source) -> str:
    note = f"decisions are score > {threshold:g}, as stored in the checkpoint; baselines choose theirs on {calibration.name}"
    if found.get("calibration", calibration.name) != calibration.name:
        note += (
            f"; the threshold was chosen on {found['calibration']}: where that holds images of {source.name}, decisions look "
            "better here than they are"
        )
    return note


def _notes(
    folder: Path, source: Source, calibration: Source, fitted: ComplexityResult, measured: ComplexityResult
) -> list[str]:
    notes = [
        f"the model is {folder}",
        f"classical measures have no scale of their own: each is a line fitted on {len(fitted.complexity)} images of "
        f"{calibration.name}, 'all three' one linear fit of them together, at {baselines.SIZE} pixels",
        "milliseconds are of prepared images held in memory: the model in batches, a classical measure on one thread",
    ]
    for name, seen in ((source.name, measured.bad), (calibration.name, fitted.bad)):
        if seen:
            notes.append(f"{name}: {seen.summary()}")
            logging.warning("%s", notes[-1])
    return notes

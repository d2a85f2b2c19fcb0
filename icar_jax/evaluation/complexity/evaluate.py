"""Evaluation of a complexity model on its held-out split, compared with classical measures of the same images."""

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
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.records import Source
from icar_jax.data.scenes import Scenes
from icar_jax.errors import DataError
from icar_jax.evaluation.complexity import agreement, baselines, regret
from icar_jax.evaluation.complexity.agreement import Predictions
from icar_jax.evaluation.metrics import ratings as m
from icar_jax.evaluation.records.complexity import ComplexityEvaluation, Cost
from icar_jax.evaluation.report import complexity_figures, complexity_table
from icar_jax.evaluation.report.table import write_metrics
from icar_jax.evaluation.routing.calibration import binary_labels
from icar_jax.evaluation.routing.thresholds import best_threshold
from icar_jax.inference.loading import load
from icar_jax.inference.model import Model
from icar_jax.models import variants
from icar_jax.models.flops import complexity_flops, router_flops, vision_flops

MODEL = "model"
NUISANCES = ("noise", "blur", "contrast")  # scene parameters that vary independently of complexity
TIMED = 256  # number of images whose scoring is timed
REPEATS = 3  # the fastest repetition counts, since other load on the machine only adds time
REFERENCE = "vit_l14"  # vision tower that router cost is compared with


@dataclass(frozen=True)
class ComplexityResult:
    """Results for the readable images of a split: scores float32 [n], measures [n, 3], complexity float32 [n], index [n]."""

    scores: np.ndarray
    measures: np.ndarray
    complexity: np.ndarray
    index: np.ndarray
    sample: dict[str, np.ndarray]  # preprocessed pixels of the first images, for timing
    bad: BadFiles


def evaluate_complexity(config: ExperimentConfig, workdir: str | Path) -> ComplexityEvaluation:
    """Evaluates the complexity model in `workdir`; writes metrics.json, scores.png and, for scenes, nuisance.png there.

    Uses WORKDIR/best if the run kept its best model. Models trained on regret are compared with the ranks of the regrets (see
    evaluation/complexity/regret.py). Raises ConfigError or CheckpointError: a classifier needs a stored threshold, and the data
    must be what the run in `workdir` was started on, otherwise held-out images could include training images.
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
    regrets = _regrets(config, model, calibration, source)
    fit_source, eval_source = (found.as_source() for found in regrets) if regrets else (calibration, source)
    fitted = _score_split(config, None, fit_source, "calibration images")
    measured = _score_split(config, model, eval_source, "score")
    record = _compare(config, model, threshold, fitted, measured, source, regrets)
    record.notes = _notes(folder, source, calibration, fitted, measured)
    if threshold is not None:
        record.notes.append(_decision_note(model.description.get("threshold_found", {}), threshold, source, calibration))
    write_metrics(record, workdir / "metrics.json")
    complexity_table.print_results(record)
    complexity_figures.scores(measured.scores, measured.complexity, record, workdir / "scores.png")
    if record.nuisance:
        complexity_figures.nuisance(record, workdir / "nuisance.png")
    return record


def _stored_threshold(model: Model, folder: Path) -> float | None:
    """Returns a classifier's stored threshold; None for a regression model. Raises CheckpointError if it is missing."""
    if model.scorer.complexity.arch.head != "classification":
        return None
    if "threshold" not in model.description:
        raise CheckpointError(
            f"{folder} is a classifier without a threshold: run `icar calibrate {folder} --metric f1` first, which chooses one "
            "on the calibration images"
        )
    return float(model.description["threshold"])


def _regrets(config: ExperimentConfig, model: Model, *of: Source) -> tuple[regret.Regrets, ...] | None:
    """Returns the regrets of each source; None for a model trained on ratings."""
    spec = model.description.get("regret")
    if config.complexity.target != "regret":
        if spec is not None:
            raise cfg.ConfigError(
                f"the model was trained on regret at exit {spec['exit']} of {spec['clip']}: pass "
                "--config.complexity.target=regret --config.complexity.clip=CLIP to evaluate it"
            )
        return None
    clip = regret.load_routed_clip(config, model.description)
    return tuple(regret.measure_regrets(config, clip, spec, source) for source in of)


def _score_split(config: ExperimentConfig, model: Model | None, source: Source, title: str) -> ComplexityResult:
    """Computes the classical measures of every image of a split, and its score if a model is given, in one pass."""
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
            measures.append(baselines.classical_measures(batch["images"]["classical"]))
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


def _compare(
    config: ExperimentConfig,
    model: Model,
    threshold: float | None,
    fitted: ComplexityResult,
    measured: ComplexityResult,
    source: Source,
    regrets: tuple[regret.Regrets, ...] | None,
) -> ComplexityEvaluation:
    n, head = config.eval.bootstrap, model.scorer.complexity.arch.head
    fits = baselines.fit_baselines(fitted.measures, fitted.complexity)
    others = {name: Predictions(fit(measured.measures)) for name, fit in fits.items()}
    truth, names, ranked_by = measured.complexity, m.OF_RATINGS, "pcc"
    if threshold is not None:
        boundary = config.complexity.threshold
        truth = binary_labels(measured.complexity, boundary, source.name)
        labels = binary_labels(fitted.complexity, boundary, "the calibration images")
        chosen_by = model.description.get("threshold_found", {}).get("metric", "f1")
        others = {
            name: Predictions(p.scores, best_threshold(fits[name](fitted.measures), labels, chosen_by)[0])
            for name, p in others.items()
        }
        names, ranked_by = agreement.OF_CLASSIFIERS, "roc_auc"
    known = _known(regrets, fitted) if regrets else {}
    predictors = {MODEL: Predictions(measured.scores, threshold), **known, **others}
    nuisances = _nuisances(source, measured.index)
    record = ComplexityEvaluation(
        head=head,
        source=source.name,
        images=len(truth),
        runs=agreement.rows(predictors, truth, names, n),
        margin=agreement.margin(ranked_by, predictors[MODEL], others, truth, n),
        nuisance=agreement.by_level(predictors, measured.complexity, nuisances, n),
        cost=_cost(model, measured.sample, known),
    )
    if regrets:
        rated = regrets[1].known_complexity() if known else None
        record.regret = regret.summarise_regrets(regrets[1], model.description["regret"], measured.scores, rated, n)
        record.over_known = agreement.margin(ranked_by, predictors[MODEL], known, truth, n) if known else None
    if threshold is not None:
        record.threshold, record.boundary = threshold, boundary
        record.confusion = m.confusion(predictors[MODEL].decided, truth)
    return record


def _known(regrets: tuple[regret.Regrets, ...], fitted: ComplexityResult) -> dict[str, Predictions]:
    """Returns the source's known complexity as a predictor of regret: a linear fit on the calibration images."""
    fit_complexity, eval_complexity = (found.known_complexity() for found in regrets)
    if np.isnan(fit_complexity).any() or np.isnan(eval_complexity).any() or not np.ptp(fit_complexity):
        return {}
    return {regret.KNOWN: Predictions(regret.fit_line(fit_complexity, fitted.complexity, eval_complexity))}


def _nuisances(source: Source, index: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the nuisance parameters of scenes: name -> [n]; empty for other sources."""
    if not isinstance(source, Scenes):
        return {}
    found = [source.scene(i).nuisance for i in index.tolist()]
    return {name: np.array([getattr(nuisance, name) for nuisance in found]) for name in NUISANCES}


def _cost(model: Model, sample: dict[str, np.ndarray], known: Mapping[str, Predictions]) -> dict[str, Cost]:
    """Returns the cost per image of each predictor, timed on preprocessed pixels, without compilation."""
    arch = model.scorer.complexity.arch
    tower, flops = vision_flops(variants.CLIP[REFERENCE].vision), complexity_flops(arch)
    forward = model.scorer.forward
    forward(sample[MODEL])  # compiles
    seconds = _fastest(lambda: forward(sample[MODEL])) / len(sample[MODEL])
    cost = {MODEL: Cost(flops, flops / tower, routing_flops=router_flops(arch), ms_per_image=1e3 * seconds)}
    cost |= {name: Cost() for name in known}
    pictures = sample["classical"]
    for name, function in baselines.MEASURES.items():
        seconds = _fastest(lambda: [function(picture) for picture in pictures]) / len(pictures)
        cost[name] = Cost(ms_per_image=1e3 * seconds)
    cost[baselines.COMBINED] = Cost(ms_per_image=sum(cost[name].ms_per_image for name in baselines.MEASURES))
    return cost


def _fastest(run: Callable[[], object]) -> float:
    best = np.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def _decision_note(found: Mapping[str, Any], threshold: float, source: Source, calibration: Source) -> str:
    note = f"decisions: score > {threshold:g}, from the checkpoint; baseline thresholds are chosen on {calibration.name}"
    if found.get("calibration", calibration.name) != calibration.name:
        note += (
            f"; the threshold was chosen on {found['calibration']}: if that contains images of {source.name}, the decision "
            "metrics are optimistic"
        )
    return note


def _notes(
    folder: Path, source: Source, calibration: Source, fitted: ComplexityResult, measured: ComplexityResult
) -> list[str]:
    notes = [
        f"model: {folder}",
        f"each classical measure is a linear fit on {len(fitted.complexity)} images of {calibration.name}, 'all three' is one "
        f"linear fit of all of them, at {baselines.SIZE} pixels",
        "milliseconds are for preprocessed images in memory: the model in batches, classical measures on one thread",
    ]
    for name, seen in ((source.name, measured.bad), (calibration.name, fitted.bad)):
        if seen:
            notes.append(f"{name}: {seen.summary()}")
            logging.warning("%s", notes[-1])
    return notes

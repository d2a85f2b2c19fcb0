"""Evaluation on a held-out split: compares every run of a model by retrieval and cost; see docs/evaluation.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.distractors import distractor_source, require_apart, source_urls
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.ratings.labels import read_labels
from icar_jax.data.records import Source, Subset
from icar_jax.errors import IcarError
from icar_jax.evaluation.embeddings.saved import FOLDER as SAVED
from icar_jax.evaluation.embeddings.saved import save_gallery
from icar_jax.evaluation.metrics.colour_baseline import colour_histogram_baseline
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS
from icar_jax.evaluation.records.retrieval import RetrievalEvaluation, ScoreCalibrationResult
from icar_jax.evaluation.report import figures, report, table
from icar_jax.evaluation.routing import score_calibration, timing
from icar_jax.evaluation.routing.calibration import make_bundle, model_costs, routing_from_scores, score_source
from icar_jax.evaluation.routing.gallery import Gallery, embed_source, full_scale, labelled
from icar_jax.evaluation.routing.score_calibration import ScoreCalibration
from icar_jax.evaluation.runs import ShallowBaseline, evaluate_runs
from icar_jax.inference.loading import load
from icar_jax.inference.model import Model

BASELINE_IMAGES = 3000  # training images used to fit the colour baseline


def evaluate(config: ExperimentConfig, workdir: str | Path, *, save_embeddings: bool = False) -> RetrievalEvaluation:
    """Evaluates the model in `workdir` and writes metrics.json, retention.png, complexity.png and report/ there.

    save_embeddings: also writes embeddings/, see `embeddings.saved`.

    Creates WORKDIR/bundle if there is none and `config.eval.complexity` names a complexity model. Raises ConfigError or
    CheckpointError.
    """
    config = cfg.validate(config)
    cfg.require_local("--workdir", workdir)
    workdir = Path(workdir)
    folder = checkpoint.find(workdir, ("bundle", "clip"))
    if (workdir / files.CONFIG).is_file():
        files.require_same_config(workdir, config, files.FREE_ON_EVALUATION)
    folder, notes = _model_folder(config, workdir, folder)
    model = load(folder, batch_size=config.eval.batch_size, dtype=config.eval.dtype)
    small = _load_shallower_baseline(config)
    source = configured.eval_source(config.data, config.eval)
    far_source, urls, far_urls = None, None, None
    if config.eval.distractors.source:
        far_source = distractor_source(config.eval.distractors, config.data)
        urls, far_urls = source_urls(source), source_urls(far_source)
        notes += require_apart(source, far_source, urls, far_urls)
    elif config.eval.labels:
        urls = source_urls(source)
    # Read the label files first, so that a missing or invalid file fails before hours of work.
    far_file = config.eval.distractors.labels if far_source is not None else ""
    labels, far_labels = (read_labels(file) if file else None for file in (config.eval.labels, far_file))
    train = _colour_baseline_source(config, notes)
    loading = configured.loading(config.data)
    warm = timing.warm_up(model)
    settings, found = _budgets(config, model, notes)
    calibration, fitted_on = _score_calibration(config, model, notes)
    gallery = embed_source(model, source, loading, timed=config.eval.timing_images)
    gallery = labelled(gallery, urls, labels, config.eval.labels, notes)
    far = None
    if far_source is not None:
        far = embed_source(model, far_source, loading)
        far = labelled(far, far_urls, far_labels, config.eval.distractors.labels, notes)
    if save_embeddings:
        print(save_gallery(gallery, far, workdir / SAVED))
    static = _embed_shallower_baseline(config, small, source, far_source, gallery, far)
    record, evidence = evaluate_runs(config, model, source, gallery, far, static, settings, calibration)
    if calibration is not None:
        record.score_calibration = ScoreCalibrationResult(
            calibration.exits, calibration.loss_before, calibration.loss_after,
            score_calibration.bias(gallery.by_exit, gallery.texts, gallery.caption_image), *fitted_on,
        )  # fmt: skip
    record.timing.compile_s, record.timing.programs = warm
    for name, routing in found.items():
        record.runs[name].found = routing["found"]
    record.gallery.distractors = far_source.name if far_source is not None else None
    record.notes = notes if train is None else [*notes, _colour_baseline_note(config, train, source, gallery, record)]
    record.notes += [run.folds.sentence(name) for name, run in record.runs.items() if run.folds is not None]
    record.notes += [each.bad.summary() for each in (gallery, far) if each is not None and each.bad]
    table.write_metrics(record, workdir / "metrics.json")
    table.print_results(record)
    figures.retention_against_cost(record, workdir / "retention.png")
    if gallery.scores is not None:
        figures.complexity_histogram(gallery.scores, model.thresholds, workdir / "complexity.png", exits=model.exits)
    page = report.write_report(record, evidence, source, workdir / "report", title=workdir.resolve().name)
    print(f"Report: {page}")
    return record


def _budgets(config: ExperimentConfig, model: Model, notes: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Calibrates thresholds for each of config.eval.budgets: (run name -> thresholds, run name -> how they were found)."""
    if not config.eval.budgets:
        return {}, {}
    if model.thresholds is None:
        notes.append(f"config.eval.budgets={config.eval.budgets} ignored: a budget needs a complexity model to route with")
        return {}, {}
    calibration = configured.calibration_source(config.data)
    scored = score_source(model, calibration, "score calibration images", configured.loading(config.data))
    cost = model_costs(model.arch, model.scorer.complexity.arch)
    found = {f"budget_{b:g}": routing_from_scores(scored, model.exits, cost, budget=b) for b in config.eval.budgets}
    return {name: tuple(routing["thresholds"]) for name, routing in found.items()}, found


def _score_calibration(
    config: ExperimentConfig, model: Model, notes: list[str]
) -> tuple[ScoreCalibration | None, tuple[str, int] | None]:
    """Fits per-exit score calibration on the routed calibration images, if config.eval enables it; also returns the source and
    the number of these images."""
    if config.eval.score_calibration == "none":
        return None, None
    if model.thresholds is None:
        flag = f"config.eval.score_calibration={config.eval.score_calibration!r}"
        notes.append(f"{flag} ignored: score calibration applies to routed galleries, which need a complexity model")
        return None, None
    source = configured.calibration_source(config.data)
    images = embed_source(model, source, configured.loading(config.data))
    fitted = score_calibration.fit(images.by_exit, images.texts, images.caption_image, images.exits, full_scale(model))
    return fitted, (source.name, len(images.captions))


def _load_shallower_baseline(config: ExperimentConfig) -> Model | None:
    if not config.eval.static:
        return None
    folder = checkpoint.find(config.eval.static, ("clip",))
    return load(folder, batch_size=config.eval.batch_size, dtype=config.eval.dtype)


def _embed_shallower_baseline(
    config: ExperimentConfig,
    small: Model | None,
    source: Source,
    far_source: Source | None,
    gallery: Gallery,
    far: Gallery | None,
) -> ShallowBaseline | None:
    """Embeds the same images with the shallower model. Raises ConfigError if a different set of images was readable."""
    if small is None:
        return None
    depth = small.exits[-1:]
    made = [
        embed_source(small, each, configured.loading(config.data), exits=depth, timed=config.eval.timing_images)
        for each in (source, far_source)
        if each is not None
    ]
    for own, theirs in zip(made, (gallery, far)):
        if not np.array_equal(own.index, theirs.index):
            raise cfg.ConfigError(
                f"config.eval.static={config.eval.static!r} read {len(own.index)} images but the evaluated model read "
                f"{len(theirs.index)}: the files changed between the two passes; evaluate again"
            )
    return ShallowBaseline(small, made[0], made[1] if len(made) > 1 else None)


def _model_folder(config: ExperimentConfig, workdir: Path, folder: Path) -> tuple[Path, list[str]]:
    """Returns the workdir's bundle, creating it if possible; otherwise the CLIP, with a note on what is missing."""
    scorer = config.eval.complexity
    if checkpoint.describe(folder)["kind"] == "bundle":
        _check_fresh(folder / "clip", workdir / "model", "clip")
        if scorer:
            _check_fresh(folder / "complexity", Path(scorer), "complexity")
        _check_shares(config, folder)
        return folder, []
    if scorer and Path(scorer).exists():
        bundle = make_bundle(
            folder,
            scorer,
            workdir / "bundle",
            calibration=configured.calibration_source(config.data),
            shares=config.eval.early_share,
            batch_size=config.eval.batch_size,
            dtype=config.eval.dtype,
            loading=configured.loading(config.data),
        )
        return bundle, []
    found = f"there is none at config.eval.complexity={scorer!r}" if scorer else "config.eval.complexity is empty"
    where = scorer or "workdir/complexity"
    note = (
        f"not routed: no complexity model ({found}). Train the router of this config there, if it has one (such as "
        "configs/demo.py:router for :cheaper), or a ConvNeXt-IC for any CLIP: "
        f"`python train.py --config=configs/demo.py:complexity --workdir={where}`"
        + ("" if scorer else f", and pass --config.eval.complexity={where}")
    )
    logging.warning("%s", note)
    return folder, [note]


def _check_fresh(bundled: Path, original: Path, kind: str) -> None:
    """Raises CheckpointError if the model at `original` differs from the bundled one, for example after retraining."""
    if not original.exists():
        return
    now = checkpoint.find(original, (kind,))
    if checkpoint.describe(now).get("hashes") != checkpoint.describe(bundled).get("hashes"):
        raise checkpoint.CheckpointError(
            f"{bundled.parent} holds a different {kind} model than {now}; run `icar bundle` again, or remove {bundled.parent}"
            + (", or pass --config.eval.complexity= to keep the bundled one" if kind == "complexity" else "")
        )


def _check_shares(config: ExperimentConfig, bundle: Path) -> None:
    """Raises ConfigError if config.eval.early_share differs from the shares the bundle's thresholds were calibrated for."""
    found = checkpoint.describe(bundle)["routing"]["found"]
    wanted = config.eval.early_share
    if wanted and list(wanted) != list(found.get("shares", {}).values())[:-1]:
        raise cfg.ConfigError(
            f"config.eval.early_share={wanted}, but the thresholds of {bundle} were set by {found}; recreate it with "
            "`icar bundle --share` or remove it"
        )


def _colour_baseline_source(config: ExperimentConfig, notes: list[str]) -> Source | None:
    """Returns the training images that the colour baseline is fitted on; None, with a note, if they are not available."""
    try:
        train = configured.train_source(config.data)
    except (IcarError, OSError) as error:
        notes.append(f"no colour-histogram baseline, because the training images are not available: {error}")
        return None
    some = np.linspace(0, len(train) - 1, min(BASELINE_IMAGES, len(train))).astype(int)
    return Subset(train, some, f"{train.name}/baseline")


def _colour_baseline_note(
    config: ExperimentConfig, train: Source, source: Source, gallery: Gallery, record: RetrievalEvaluation
) -> str:
    """Adds the colour-histogram baseline to the record and returns a sentence that compares it with full depth."""
    loading = configured.loading(config.data)
    fitted = list(_thumbnails(train, loading))
    result = colour_histogram_baseline(
        [image for image, _ in fitted],
        [captions for _, captions in fitted],
        (image for image, _ in _thumbnails(source, loading)),
        gallery.captions,
    )
    record.colour_baseline = result
    full = record.runs["full"]
    pairs = [
        f"{name.replace('_', ' ')} R@1 {result[name]['r1']:.1f}% (full depth {full.metrics(name)['r1']:.1f}%)"
        for name in DIRECTIONS
    ]
    return f"colour histograms alone, linear, fitted on {len(fitted)} training images: {', '.join(pairs)}"


def _thumbnails(source: Source, loading: dict[str, Any]) -> Iterator[tuple[np.ndarray, tuple[str, ...]]]:
    """Yields (uint8 [64, 64, 3], captions) for every readable image, in order."""
    with eval_batches(source, {"small": Preprocess(64, "squash", "bilinear")}, batch_size=64, **loading) as batches:
        for batch in batches:
            yield from zip(batch["images"]["small"], batch["captions"])

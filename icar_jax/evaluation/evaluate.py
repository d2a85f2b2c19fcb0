"""Evaluation on a held-out split: full depth, each exit, routed and random routing, with what each costs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.data import sources
from icar_jax.data.distractors import distractor_source, require_apart, source_urls
from icar_jax.data.images import Preprocess
from icar_jax.data.labels import merge_labels, read_labels
from icar_jax.data.pipeline import BadFiles, eval_batches
from icar_jax.data.records import Source
from icar_jax.data.splits import Subset
from icar_jax.evaluation import bootstrap_metrics, category, figures, table, timing
from icar_jax.evaluation.assignments import random_exits, ranks_mixed, take_exits
from icar_jax.evaluation.bootstrap import Hits, difference, hits_at, mean_hits, retention
from icar_jax.evaluation.calibration import make_bundle
from icar_jax.evaluation.category import Precisions
from icar_jax.evaluation.colour_baseline import colour_histogram_baseline
from icar_jax.evaluation.metrics import Distractors, Ranks, mean_summary, ranks, summarise
from icar_jax.evaluation.ranking import local_mesh
from icar_jax.inference.model import Model, load
from icar_jax.models.flops import router_flops, vision_flops

RETENTION_AT = 5  # recall at 5 is what retention and comparisons are about
CATEGORY_DRAWS = 10  # of the random assignments whose average precision is measured: unlike ranks, each is a run of its own
BASELINE_IMAGES = 3000  # training images the colour baseline is fitted on


@dataclass(frozen=True)
class Gallery:
    """Embeddings of a whole source: one row per image and exit, one per caption, and the routed rows.

    names and index are those of the images in the source; labels are their category labels, () where there are none.
    """

    by_exit: dict[int, np.ndarray]
    texts: np.ndarray
    caption_image: np.ndarray
    routed: np.ndarray | None
    scores: np.ndarray | None
    exits: np.ndarray | None
    sample: timing.Sample
    captions: list[tuple[str, ...]]
    bad: BadFiles
    names: list[str]
    index: np.ndarray
    labels: list[tuple[str, ...]]


def evaluate(config: ExperimentConfig, workdir: str | Path) -> dict[str, Any]:
    """Evaluates the model in `workdir` and writes metrics.json, retention.png and complexity.png there.

    Makes WORKDIR/bundle where there is none and `config.eval.complexity` names a complexity model.
    Returns the metrics as documented in evaluation/table.py. Raises ConfigError or CheckpointError.
    """
    config = cfg.validate(config)
    workdir = Path(workdir)
    folder = checkpoint.find(workdir, ("bundle", "clip"))
    if (workdir / files.CONFIG).is_file():
        files.require_same_config(workdir, config, files.FREE_ON_EVALUATION)
    folder, notes = _model_folder(config, workdir, folder)
    model = load(folder, batch_size=config.eval.batch_size, dtype=config.eval.dtype)
    source = sources.eval_source(config.data, config.eval)
    far_source, urls, far_urls = None, None, None
    if config.eval.distractors.source:
        far_source = distractor_source(config.eval.distractors, config.data)
        urls, far_urls = source_urls(source), source_urls(far_source)
        notes += require_apart(source, far_source, urls, far_urls)
    elif config.eval.labels:
        urls = source_urls(source)
    gallery = _embed(model, source, config.data)
    gallery = _labelled(gallery, urls, config.eval.labels, notes)
    far = None
    if far_source is not None:
        far = _embed(model, far_source, config.data)
        far = _labelled(far, far_urls, config.eval.distractors.labels, notes)
    metrics = _measure(config, model, gallery, far)
    metrics["gallery"]["source"] = source.name
    metrics["gallery"]["distractors"] = far_source.name if far_source is not None else None
    metrics["notes"] = [*notes, _baseline_note(config, source, gallery, metrics)]
    metrics["notes"] += [each.bad.summary() for each in (gallery, far) if each is not None and each.bad]
    table.write_metrics(metrics, workdir / "metrics.json")
    table.print_results(metrics)
    figures.retention_against_cost(metrics, workdir / "retention.png")
    if gallery.scores is not None:
        figures.complexity_histogram(gallery.scores, model.thresholds, workdir / "complexity.png", exits=model.exits)
    return metrics


def _model_folder(config: ExperimentConfig, workdir: Path, folder: Path) -> tuple[Path, list[str]]:
    """The bundle of the workdir, made now if it can be; else the plain CLIP, with a note that says what is missing."""
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
            calibration=sources.calibration_source(config.data),
            shares=config.eval.early_share,
            batch_size=config.eval.batch_size,
            dtype=config.eval.dtype,
            loading=sources.loading(config.data),
        )
        return bundle, []
    found = f"there is none at config.eval.complexity={scorer!r}" if scorer else "config.eval.complexity is empty"
    note = (
        f"not routed: no complexity model ({found}). Train one with "
        "`python train.py --config=configs/demo.py:complexity --workdir=workdir/complexity` and pass "
        "--config.eval.complexity=workdir/complexity"
    )
    logging.warning("%s", note)
    return folder, [note]


def _check_fresh(bundled: Path, original: Path, kind: str) -> None:
    """Raises CheckpointError where the model at `original` is not the one in the bundle, as after training it again."""
    if not original.exists():
        return
    now = checkpoint.find(original, (kind,))
    if checkpoint.describe(now).get("hashes") != checkpoint.describe(bundled).get("hashes"):
        raise checkpoint.CheckpointError(
            f"{bundled.parent} holds another {kind} model than {now}; run `icar bundle` again, or remove {bundled.parent}"
            + (", or pass --config.eval.complexity= to keep the bundled one" if kind == "complexity" else "")
        )


def _check_shares(config: ExperimentConfig, bundle: Path) -> None:
    """Raises ConfigError where shares are asked for that the bundle's thresholds were not set for."""
    found = checkpoint.describe(bundle)["routing"]["found"]
    wanted = config.eval.early_share
    if wanted and list(wanted) != list(found.get("shares", {}).values())[:-1]:
        raise cfg.ConfigError(
            f"config.eval.early_share={wanted}, but the thresholds of {bundle} were set by {found}; make it again with "
            "`icar bundle --share` or remove it"
        )


def _embed(model: Model, source: Source, data: cfg.DataConfig) -> Gallery:
    """One pass over the split: every exit of every image, the routed rows, and every caption."""
    towers = {exit: [] for exit in model.exits}
    kept: dict[str, list[np.ndarray]] = {key: [] for key in model.preprocesses}
    captions: list[tuple[str, ...]] = []
    names: list[str] = []
    labels: list[tuple[str, ...]] = []
    index: list[np.ndarray] = []
    bad = BadFiles()
    routing = model.thresholds is not None

    def prepared():
        batches = eval_batches(
            source,
            model.preprocesses,
            batch_size=model.batch_size,
            **sources.loading(data),
        )
        with batches:
            for batch in tqdm(batches, total=-(-len(source) // model.batch_size), desc="embed images", unit="batch"):
                bad.add(batch)
                if not len(batch["index"]):
                    continue
                captions.extend(batch["captions"])
                names.extend(batch["name"])
                labels.extend(batch["labels"])
                index.append(batch["index"])
                for key, pixels in batch["images"].items():
                    if sum(map(len, kept[key])) < timing.SAMPLE:
                        kept[key].append(pixels)
                for exit, parts in towers.items():
                    parts.append(model.towers[exit].submit(batch["images"]["clip"]).result())
                yield batch["images"]["clip"], batch["images"].get(model.scored_on)

    if routing:
        routed = model.router.embed(prepared(), model.embed_dim)
    else:
        for _ in prepared():
            pass
    if not captions:
        raise ValueError(f"no image of {source.name} could be read:\n{bad.summary()}")
    flat = [caption for group in captions for caption in group]
    sample = {key: np.concatenate(parts)[: timing.SAMPLE] for key, parts in kept.items()}
    return Gallery(
        by_exit={exit: np.concatenate(parts) for exit, parts in towers.items()},
        texts=model.encode_text(flat),
        caption_image=np.repeat(np.arange(len(captions)), [len(group) for group in captions]),
        routed=routed.embeddings if routing else None,
        scores=routed.scores if routing else None,
        exits=routed.exits if routing else None,
        sample=timing.Sample(sample["clip"], sample.get(model.scored_on)),
        captions=captions,
        bad=bad,
        names=names,
        index=np.concatenate(index),
        labels=labels,
    )


def _labelled(gallery: Gallery, urls: list[str | None] | None, file: str, notes: list[str]) -> Gallery:
    """The gallery with the labels of a file, where one is given; notes how many images it knows."""
    if not file:
        return gallery
    own_urls = [urls[i] for i in gallery.index.tolist()] if urls is not None else None
    labels, note = merge_labels(gallery.names, own_urls, read_labels(file), file)
    notes.append(note)
    return dataclasses.replace(gallery, labels=labels)


def _measure(config: ExperimentConfig, model: Model, gallery: Gallery, far: Gallery | None) -> dict[str, Any]:
    full = model.exits[-1]
    names = {exit: "full" if exit == full else f"exit_{exit}" for exit in model.exits}
    flops = {exit: vision_flops(model.clip.arch.vision, exit) for exit in model.exits}
    galleries = [gallery, *([far] if far is not None else [])]
    all_exits = np.concatenate([g.exits for g in galleries]) if gallery.exits is not None else None
    share = _share(all_exits, model.exits) if all_exits is not None else None
    timed = gallery.exits[: len(gallery.sample.clip)] if gallery.exits is not None else None
    speed = timing.measure(model, gallery.sample, timed)
    runs: dict[str, dict[str, Any]] = {}
    hits: dict[str, Hits] = {}
    per_image: dict[str, bootstrap_metrics.Run] = {}

    def add(name: str, draws: list[tuple[Ranks, Precisions | None]], cost: float, shares: dict[str, float]) -> None:
        hits[name] = mean_hits([hits_at(found, RETENTION_AT) for found, _ in draws])
        per_image[name] = bootstrap_metrics.mean_run([bootstrap_metrics.collect(*draw) for draw in draws])
        runs[name] = {
            **mean_summary([_summary(*draw) for draw in draws]),
            "flops_per_image": cost,
            "images_per_s": speed[name],
            "share": shares,
        }

    mesh = local_mesh()

    asked = gallery.texts, gallery.caption_image

    def among(embeddings: Sequence[np.ndarray]) -> dict[str, Any]:
        """The distractors, whose embeddings come second."""
        given = Distractors(embeddings[1], far.texts, far.caption_image, far.labels) if far is not None else None
        return {"distractors": given, "mesh": mesh}

    def precise(*embeddings: np.ndarray) -> Precisions | None:
        """Average precisions where there are labels, for embeddings of the base images and the distractors."""
        if not any(gallery.labels):
            return None
        return category.precisions(embeddings[0], *asked, gallery.labels, **among(embeddings))

    def rank(*embeddings: np.ndarray) -> tuple[Ranks, Precisions | None]:
        return ranks(embeddings[0], *asked, **among(embeddings)), precise(*embeddings)

    for exit in reversed(model.exits):
        add(names[exit], [rank(*(g.by_exit[exit] for g in galleries))], flops[exit], {str(exit): 1.0})
    if share is not None:
        tower_cost = sum(share[str(exit)] * flops[exit] for exit in model.exits)
        router_cost = router_flops(model.scorer.complexity.arch)
        add("routed", [rank(*(g.routed for g in galleries))], tower_cost + router_cost, share)
        draws = np.stack([random_exits(all_exits, seed) for seed in range(config.eval.random_draws)])
        far_by_exit = far.by_exit if far is not None else None
        drawn = ranks_mixed(gallery.by_exit, *asked, draws, far_by_exit=far_by_exit, **among([g.texts[:0] for g in galleries]))
        parts = [np.split(exits, [len(gallery.captions)]) for exits in draws[:CATEGORY_DRAWS]]
        found = [precise(*(take_exits(g.by_exit, exits) for g, exits in zip(galleries, part))) for part in parts]
        add("random", list(itertools.zip_longest(drawn, found)), tower_cost, share)
    n = config.eval.bootstrap
    compared = bootstrap_metrics.intervals(per_image, n=n)
    for name, run in runs.items():
        kept = retention(hits[name], hits["full"], n=n)
        run["retention"] = kept.percent().as_dict() if kept else None
        run["intervals"] = {d: {m: c.as_dict() for m, c in by.items()} for d, by in compared[name].items()}
    metrics: dict[str, Any] = {
        "runs": runs,
        "gallery": {
            "images": sum(len(g.captions) for g in galleries),
            "captions": sum(len(g.texts) for g in galleries),
            "queries": {"images": len(gallery.captions), "captions": len(gallery.texts)},
        },
        "comparisons": {},
    }
    if share is not None:
        delta = difference(hits["routed"], hits["random"], n=n)
        metrics["comparisons"]["routed_minus_random"] = {**delta.as_dict(), "includes_zero": delta.includes_zero}
        metrics["routing"] = {**model.description["routing"], "router_flops": router_cost}
    return metrics


def _share(exits: np.ndarray, known: tuple[int, ...]) -> dict[str, float]:
    return {str(e): float(np.mean(exits == e)) for e in known}


def _summary(found: Ranks, precisions: Precisions | None) -> dict[str, dict[str, float]]:
    summary = summarise(found)
    if precisions is None:
        return summary
    extra = category.summarise(precisions)
    return {direction: summary[direction] | extra[direction] for direction in summary}


def _baseline_note(config: ExperimentConfig, source: Source, gallery: Gallery, metrics: dict[str, Any]) -> str:
    """Adds the colour-histogram baseline to the metrics and says how it compares."""
    train = sources.train_source(config.data)
    some = np.linspace(0, len(train) - 1, min(BASELINE_IMAGES, len(train))).astype(int)
    fitted = list(_thumbnails(Subset(train, some, f"{train.name}/baseline")))
    result = colour_histogram_baseline(
        [image for image, _ in fitted],
        [captions for _, captions in fitted],
        (image for image, _ in _thumbnails(source)),
        gallery.captions,
    )
    metrics["colour_baseline"] = result
    full = metrics["runs"]["full"]
    pairs = [
        f"{name.replace('_', ' ')} R@1 {result[name]['r1']:.1f}% (full depth {full[name]['r1']:.1f}%)"
        for name in ("text_to_image", "image_to_text")
    ]
    return f"colour histograms alone, linear, fitted on {len(fitted)} training images: {', '.join(pairs)}"


def _thumbnails(source: Source) -> Iterator[tuple[np.ndarray, tuple[str, ...]]]:
    """(uint8 [64, 64, 3], captions) of every readable image, in order."""
    with eval_batches(source, {"small": Preprocess(64, "squash", "bilinear")}, batch_size=64) as batches:
        for batch in batches:
            yield from zip(batch["images"]["small"], batch["captions"])

"""Evaluation on a held-out split: full depth, each exit, routed and random routing, with what each costs."""

from __future__ import annotations

from collections.abc import Iterator
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
from icar_jax.data.images import Preprocess
from icar_jax.data.pipeline import BadFiles, eval_batches
from icar_jax.data.records import Source
from icar_jax.data.splits import Subset
from icar_jax.evaluation import figures, table, timing
from icar_jax.evaluation.bootstrap import Hits, difference, hits_at, mean_hits, retention
from icar_jax.evaluation.calibration import make_bundle
from icar_jax.evaluation.colour_baseline import colour_histogram_baseline
from icar_jax.evaluation.metrics import mean_summary, ranks, summarise
from icar_jax.inference.model import Model, load
from icar_jax.models.flops import router_flops, vision_flops

RETENTION_AT = 5  # recall at 5 is what retention and comparisons are about
BASELINE_IMAGES = 3000  # training images the colour baseline is fitted on


@dataclass(frozen=True)
class Gallery:
    """Embeddings of the whole split: one row per image and exit, one per caption, and the routed rows."""

    by_exit: dict[int, np.ndarray]
    texts: np.ndarray
    caption_image: np.ndarray
    routed: np.ndarray | None
    scores: np.ndarray | None
    exits: np.ndarray | None
    sample: timing.Sample
    captions: list[tuple[str, ...]]
    bad: BadFiles


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
    gallery = _embed(model, source, config.data)
    metrics = _measure(config, model, gallery)
    metrics["gallery"]["source"] = source.name
    metrics["notes"] = [*notes, _baseline_note(config, source, gallery, metrics)]
    if gallery.bad:
        metrics["notes"].append(gallery.bad.summary())
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
    )


def _measure(config: ExperimentConfig, model: Model, gallery: Gallery) -> dict[str, Any]:
    full = model.exits[-1]
    names = {exit: "full" if exit == full else f"exit_{exit}" for exit in model.exits}
    flops = {exit: vision_flops(model.clip.arch.vision, exit) for exit in model.exits}
    share = _share(gallery.exits, model.exits) if gallery.exits is not None else None
    timed = gallery.exits[: len(gallery.sample.clip)] if gallery.exits is not None else None
    speed = timing.measure(model, gallery.sample, timed)
    runs: dict[str, dict[str, Any]] = {}
    hits: dict[str, Hits] = {}

    def add(name: str, summary: dict, run_hits: Hits, cost: float, shares: dict[str, float]) -> None:
        hits[name] = run_hits
        runs[name] = {
            **summary,
            "flops_per_image": cost,
            "images_per_s": speed[name],
            "share": shares,
        }

    def rank(embeddings: np.ndarray):
        return ranks(embeddings, gallery.texts, gallery.caption_image)

    for exit in reversed(model.exits):
        result = rank(gallery.by_exit[exit])
        add(names[exit], summarise(result), hits_at(result, RETENTION_AT), flops[exit], {str(exit): 1.0})
    if share is not None:
        tower_cost = sum(share[str(exit)] * flops[exit] for exit in model.exits)
        result = rank(gallery.routed)
        router_cost = router_flops(model.scorer.complexity.arch)
        add("routed", summarise(result), hits_at(result, RETENTION_AT), tower_cost + router_cost, share)
        draws = [rank(_random_rows(gallery, seed)) for seed in range(config.eval.random_draws)]
        drawn = mean_hits([hits_at(d, RETENTION_AT) for d in draws])
        add("random", mean_summary([summarise(d) for d in draws]), drawn, tower_cost, share)
    n = config.eval.bootstrap
    for name, run in runs.items():
        kept = retention(hits[name], hits["full"], n=n)
        run["retention"] = kept.percent().as_dict() if kept else None
    metrics: dict[str, Any] = {
        "runs": runs,
        "gallery": {"images": len(gallery.captions), "captions": len(gallery.texts)},
        "comparisons": {},
    }
    if share is not None:
        delta = difference(hits["routed"], hits["random"], n=n)
        metrics["comparisons"]["routed_minus_random"] = {**delta.as_dict(), "includes_zero": delta.includes_zero}
        metrics["routing"] = {**model.description["routing"], "router_flops": router_cost}
    return metrics


def _share(exits: np.ndarray, known: tuple[int, ...]) -> dict[str, float]:
    return {str(e): float(np.mean(exits == e)) for e in known}


def _random_rows(gallery: Gallery, seed: int) -> np.ndarray:
    """Embeddings [N, D] with the routed exits dealt out at random: the same count of images at each exit."""
    exits = np.random.default_rng(seed).permutation(gallery.exits)
    rows = gallery.by_exit[max(gallery.by_exit)].copy()
    for exit, embeddings in gallery.by_exit.items():
        rows[exits == exit] = embeddings[exits == exit]
    return rows


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

"""Cross-validation of complexity models on human ratings, beside classical measures: correlations within categories."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from icar_jax import config as cfg
from icar_jax import pytree
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data.records import Source, Subset
from icar_jax.evaluation.complexity import classical
from icar_jax.evaluation.complexity.ridge_routers import (
    CLASSICAL,
    FEATURES,
    Rated,
    Router,
    all_rated,
    blocks_router,
    convnext_router,
    fit_head,
    measure,
    rated_images,
)  # fmt: skip
from icar_jax.evaluation.metrics import within
from icar_jax.evaluation.records.cross_validation import CrossValidation, MethodCost, MethodResult
from icar_jax.evaluation.report import ratings_report
from icar_jax.evaluation.report.table import write_metrics
from icar_jax.inference.forward import Forward, bucket_sizes
from icar_jax.models.flops import complexity_flops, router_flops, trunk_flops
from icar_jax.models.token_router import BlocksArch
from icar_jax.models.variants import BLOCKS

COMBINED = "all_measures"  # ridge regression on all classical measures
CONVNEXT = "convnextv2_micro"
HEADS = "blocks"  # entry of the features after several depths
# Best of five classical measures, Pearson, of Saraee, Jalal and Betke 2018 (arXiv 1810.01771), by the categories of SAVOIAS.
PUBLISHED = {"ad": 0.56, "art": 0.65, "interior_design": 0.68, "objects": 0.30, "scenes": 0.57, "sup": 0.84, "vis": 0.61}
_TIMED, _REPEATS = 64, 3


def cross_validate(config: ExperimentConfig, workdir: str | Path) -> CrossValidation:
    """Cross-validates all methods on the rated images of config.data; writes WORKDIR/ratings.json and WORKDIR/ratings.png.

    Methods: the classical measures, a ridge regression on all of them, the ConvNeXt of config.complexity or CONVNEXT, and,
    if config.complexity.clip is set, heads after config.complexity.depths and config.complexity.blocks blocks. Features are
    kept in WORKDIR/features. Raises ConfigError, RatingsError, CheckpointError, OSError.
    """
    config, workdir = cfg.validate(config), Path(workdir)
    cfg.require_local("--workdir", workdir)
    source, routers = all_rated(config), _routers(config)
    index, features = measure(config, source, routers, workdir / FEATURES, classical_too=True)
    rated = rated_images(config, source, index)
    measures = features[CLASSICAL]
    scores: dict[str, np.ndarray] = {name: measures[:, i] for i, name in enumerate(classical.MEASURES)}
    learned = {COMBINED: (measures, ())} | _learned(routers, features)
    penalties = {}
    for name, (values, groups) in tqdm(learned.items(), desc="cross-validate", unit="method"):
        scores[name], penalties[name] = held_out_scores(config, values, rated, groups)
    costs = _costs(config, source, routers)
    record = _record(config, source, rated, scores, penalties, costs)
    if HEADS in routers:
        record.tower = _tower(config, routers[HEADS], costs)
    write_metrics(record, workdir / "ratings.json")
    ratings_report.print_results(record)
    ratings_report.figure(record, workdir / "ratings.png")
    return record


def held_out_scores(
    config: ExperimentConfig, features: np.ndarray, rated: Rated, groups: tuple[int, ...] = ()
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Returns (scores [N] in [0, 1], each by a fit on the other folds; penalty of each fold, chosen on the other folds)."""
    scores, chosen = np.zeros(len(rated.names)), []
    for fold in np.unique(rated.folds):
        rest, held = rated.folds != fold, rated.folds == fold
        fit = fit_head(config, features[rest], rated.take(rest), groups)
        scores[held] = 1 / (1 + np.exp(-fit(features[held])))
        chosen.append(fit.penalty)
    return scores, tuple(chosen)


def _routers(config: ExperimentConfig) -> dict[str, Router]:
    c, found = config.complexity, {}
    plain = c
    if c.variant == BLOCKS:
        plain = dataclasses.replace(c, variant=CONVNEXT, pool="statistics", blocks=0, clip="", pooled_norm="whole")
    found[plain.variant] = convnext_router(dataclasses.replace(config, complexity=plain))
    if c.clip:
        depths = tuple(sorted({*c.depths, *((c.blocks,) if c.blocks else ())}))
        if not depths or depths[0] < 1:
            raise ConfigError(f"config.complexity.depths={c.depths} must be numbers of blocks, at least 1")
        heads = config if c.variant == BLOCKS else dataclasses.replace(config, complexity=dataclasses.replace(c, pool="mean"))
        found[HEADS] = blocks_router(heads, depths)
    elif c.variant == BLOCKS:
        blocks_router(config, (max(c.blocks, 1),))  # raises: a head needs config.complexity.clip
    return found


def _learned(
    routers: Mapping[str, Router], features: Mapping[str, np.ndarray]
) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
    found = {}
    for name, router in routers.items():
        if router.depths:
            found |= {head(depth): (features[name][:, i], router.groups) for i, depth in enumerate(router.depths)}
        else:
            found[name] = (features[name], router.groups)
    return found


def head(depth: int) -> str:
    """Returns the name of the head after `depth` blocks."""
    return f"{depth}_blocks"


def _record(
    config: ExperimentConfig, source: Subset, rated: Rated, scores: Mapping[str, np.ndarray],
    penalties: Mapping[str, tuple[float, ...]], costs: Mapping[str, MethodCost],
) -> CrossValidation:  # fmt: skip
    n, truth, categories = config.eval.bootstrap, rated.scores, rated.categories
    methods = {}
    for name, predicted in tqdm(scores.items(), desc="bootstrap", unit="method"):
        pcc, srcc = (within.within(metric, predicted, truth, categories, n) for metric in ("pcc", "srcc"))
        methods[name] = MethodResult(pcc, srcc, costs[name], penalties.get(name, ()))
    best = max((*classical.MEASURES, COMBINED), key=lambda name: methods[name].pcc[within.MEAN].value)
    margins = {
        name: within.mean_difference("pcc", scores[name], scores[best], truth, categories, n)
        for name in methods
        if name not in classical.MEASURES and name != best
    }
    counts = {name: len(rows) for name, rows in within.indices(categories).items()}
    published = PUBLISHED if counts.keys() == PUBLISHED.keys() else {}
    return CrossValidation(
        source.source.name, len(truth), config.complexity.folds, counts, methods, best, margins, published, _processor(),
        notes=[
            f"{config.complexity.folds} folds by category; each score is by a fit on the others, penalty included",
            "classical measures are not fitted; all_measures is a ridge regression on them",
        ],
    )  # fmt: skip


def _costs(config: ExperimentConfig, source: Source, routers: Mapping[str, Router]) -> dict[str, MethodCost]:
    """Returns the cost of a score of each method, timed on preprocessed images, the fastest of three repetitions."""
    pictures = [source[i].image() for i in range(min(len(source), _TIMED))]
    small = np.stack([classical.PREPROCESS.resize(picture) for picture in pictures[: _TIMED // 8]])
    found = {}
    for name, function in classical.MEASURES.items():
        found[name] = MethodCost(ms=_ms(lambda: [function(image) for image in small], len(small)))
    found[COMBINED] = MethodCost(ms=sum(cost.ms for cost in found.values()))
    whole = vision_flops_of(routers[HEADS]) if HEADS in routers else None
    for name, router in routers.items():
        pixels = np.stack([router.preprocess.resize(picture) for picture in pictures])
        for depth in router.depths or (0,):
            one, arch = router, router.arch
            if depth:
                arch = dataclasses.replace(arch, blocks=depth)
                one = dataclasses.replace(router, depths=(depth,))
            forward = Forward(one.compute, jax.device_put(one.params), bucket_sizes(config.eval.batch_size))
            flops, shapes = complexity_flops(arch), pytree.flatten(router.graph.shapes)
            used = [leaf for path, leaf in shapes.items() if not depth or path.startswith("head/")]
            found[head(depth) if depth else name] = MethodCost(
                flops=flops,
                added_flops=router_flops(arch) if depth else None,
                share=flops / whole if whole else None,
                parameters=sum(int(np.prod(leaf.shape)) for leaf in used),
                ms=_ms(lambda: forward(pixels), len(pixels)),
            )
    return found


def vision_flops_of(router: Router) -> int:
    """Returns the FLOPs of one image through all blocks of the tower of a head."""
    assert isinstance(router.arch, BlocksArch)
    return trunk_flops(router.arch.vision, router.arch.vision.depth)


def _tower(config: ExperimentConfig, router: Router, costs: Mapping[str, MethodCost]) -> dict[str, float | str]:
    """Returns the tower's cost: its blocks are equal, so its time follows from those of the deepest and shallowest heads."""
    first, last = router.depths[0], router.depths[-1]
    depth = router.arch.vision.depth
    low, high = costs[head(first)].ms, costs[head(last)].ms
    ms = (
        high
        if last == depth
        else high + (high - low) / (last - first) * (depth - last)
        if last > first
        else high * depth / last
    )
    return {"name": config.complexity.clip, "blocks": depth, "flops": vision_flops_of(router), "ms": ms}


def _ms(run: Callable[[], object], images: int) -> float:
    run()  # compiles
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * min(times) / images


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {jax.default_backend()}"

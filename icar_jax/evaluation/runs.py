"""Compares the runs of one evaluation: same galleries, same bootstrap resamples, same cost accounting."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icar_jax.config import ExperimentConfig
from icar_jax.data.records import Source
from icar_jax.evaluation.metrics import category, comparison
from icar_jax.evaluation.metrics.bootstrap import Hits, difference, hits_at, mean_hits, retention
from icar_jax.evaluation.metrics.category import Precisions
from icar_jax.evaluation.metrics.folds import fold_metrics, fold_of
from icar_jax.evaluation.metrics.ranking import local_mesh
from icar_jax.evaluation.metrics.retrieval import Distractors, Ranks, mean_summary, ranks, summarise
from icar_jax.evaluation.records.retrieval import (
    Difference,
    ExitFlops,
    Flops,
    FrontierPoint,
    GalleryCounts,
    QueryCounts,
    RetrievalEvaluation,
    Run,
)
from icar_jax.evaluation.routing import timing
from icar_jax.evaluation.routing.assignments import (
    oracle_exits,
    oracle_exits_at_share,
    random_exits,
    ranks_alone,
    ranks_mixed,
    take_exits,
)
from icar_jax.evaluation.routing.calibration import model_costs
from icar_jax.evaluation.routing.frontier import Bench, sweep
from icar_jax.evaluation.routing.gallery import Evidence, Gallery
from icar_jax.evaluation.routing.score_calibration import ScoreCalibration
from icar_jax.inference.budgets import Costs
from icar_jax.inference.model import Model
from icar_jax.inference.router import assign
from icar_jax.models.flops import text_flops, vision_flops

RETENTION_AT = 5  # retention and comparisons use recall at 5
AFFINE = "routed_affine"  # the routed run, ranked with per-exit calibrated scores
CATEGORY_DRAWS = 10  # random assignments with average precision; each needs a separate ranking pass

Draw = tuple[Ranks, Precisions | None]


@dataclass(frozen=True)
class ShallowBaseline:
    """A shallower model with its embeddings of the same images; `far` holds the distractors (None without)."""

    model: Model
    gallery: Gallery
    far: Gallery | None


class EvaluationRuns:
    """Collects the runs of a gallery; far: its distractors (None without); fold: int [N], the fold of each image, or None."""

    def __init__(
        self, config: ExperimentConfig, model: Model, gallery: Gallery, far: Gallery | None, fold: np.ndarray | None = None
    ):
        self.fold = fold
        self.config, self.model, self.gallery, self.far = config, model, gallery, far
        self.galleries = [gallery, *([far] if far is not None else [])]
        self.mesh = local_mesh()
        self.flops = {e: float(vision_flops(model.arch.vision, e)) for e in model.exits}
        self.costs = model_costs(model.arch, model.scorer.complexity.arch) if gallery.exits is not None else None
        self.records: dict[str, Run] = {}
        self.evidence = Evidence(gallery)
        self._hits: dict[str, Hits] = {}
        self._per_image: dict[str, comparison.RunMetrics] = {}

    def add(self, name: str, draws: Sequence[Draw], flops: float, share: Mapping[int, float]) -> None:
        """Adds a run from its ranks (averaged over several draws), its counted FLOPs per image and its share per exit."""
        self._hits[name] = mean_hits([hits_at(found, RETENTION_AT) for found, _ in draws])
        self._per_image[name] = comparison.mean_run([comparison.collect(*draw) for draw in draws])
        self.records[name] = Run(**mean_summary([_summary(*draw) for draw in draws]), flops_per_image=flops, share=dict(share))
        if len(draws) == 1:
            self.evidence.ranks[name] = draws[0][0]

    def add_exits(self, name: str, exits: Sequence[np.ndarray], *, router: bool) -> None:
        """Adds a run with one assignment of exits: [N] for the base images, then [A] for the distractors."""
        share = _share(np.concatenate(exits), self.model.exits)
        if max(share.values()) == 1.0 and not router:
            share = {exit: part for exit, part in share.items() if part}
        rows = [take_exits(g.by_exit, e) for g, e in zip(self.galleries, exits)]
        self.add(name, [self.rank(*rows)], self._cost(share, router), share)
        self.add_folds(name, rows[0], self.captions[0])
        self.evidence.exits[name] = exits[0]

    def add_folds(self, name: str, images: np.ndarray, texts: np.ndarray) -> None:
        """Adds the means over folds to the record of a run, from its embeddings [N, D] and [M, D]; nothing without folds."""
        if self.fold is not None:
            found = fold_metrics(images, texts, self.captions[1], self.fold, n=self.config.eval.bootstrap, mesh=self.mesh)
            self.records[name].folds = found

    def add_calibrated(self, name: str, exits: Sequence[np.ndarray], calibration: ScoreCalibration) -> None:
        """Adds the routed assignment ranked with per-exit calibrated scores; its encoding cost equals that of 'routed'."""
        own, far = self.gallery, None
        rows = [calibration.map_images(take_exits(g.by_exit, e), e) for g, e in zip(self.galleries, exits)]
        if self.far is not None:
            far = Distractors(rows[1], calibration.map_texts(self.far.texts), self.far.caption_image, self.far.labels)
        captions, options = (calibration.map_texts(own.texts), own.caption_image), {"distractors": far, "mesh": self.mesh}
        precise = category.precisions(rows[0], *captions, own.labels, **options) if any(own.labels) else None
        share = _share(np.concatenate(exits), self.model.exits)
        self.add(name, [(ranks(rows[0], *captions, **options), precise)], self._cost(share, True), share)
        self.add_folds(name, rows[0], captions[0])
        self.evidence.exits[name] = exits[0]

    def add_random(self, exits: Sequence[np.ndarray]) -> None:
        """Adds 'random': random permutations of the same exits, without the router's cost."""
        everyone = np.concatenate(exits)
        n = len(exits[0])
        draws = np.stack([random_exits(everyone, seed) for seed in range(self.config.eval.random_draws)])
        drawn = ranks_mixed(self.gallery.by_exit, *self.captions, draws, **self.mixed_options())
        found = [
            self.precisions(*(take_exits(g.by_exit, e) for g, e in zip(self.galleries, np.split(each, [n]))))
            for each in draws[:CATEGORY_DRAWS]
        ]
        share = _share(everyone, self.model.exits)
        self.add("random", list(itertools.zip_longest(drawn, found)), self._cost(share, False), share)

    def add_oracles(self, exits: Sequence[np.ndarray] | None) -> None:
        """Adds 'lossless' and, where `exits` are given, 'oracle'.

        'lossless' is a lossless oracle: each image takes the cheapest exit that worsens none of its ranks. 'oracle' is the
        assignment with the highest recall at the exit shares of `exits`. Both use the true ranks and pay for no router, so
        they are upper bounds for any router. Distractors take their routed exits, or full depth without routing.
        """
        full = self.model.exits[-1]
        alone = ranks_alone(
            self.gallery.by_exit, *self.captions, **self.ranking_options([g.by_exit[full] for g in self.galleries])
        )
        others = list(exits[1:]) if exits else [np.full(len(g.captions), full) for g in self.galleries[1:]]
        if exits:
            counts = {e: int(np.sum(exits[0] == e)) for e in self.model.exits}
            self.add_exits("oracle", [oracle_exits_at_share(alone, counts, RETENTION_AT), *others], router=False)
        self.add_exits("lossless", [oracle_exits(alone), *others], router=False)

    def add_shallower_baseline(self, static: ShallowBaseline) -> None:
        """Adds 'static': the shallower model at its full depth, on the same images and captions."""
        own, exit = static.gallery, static.model.exits[-1]
        far = None
        if static.far is not None:
            far = Distractors(static.far.by_exit[exit], static.far.texts, static.far.caption_image, self.far.labels)
        options = {"distractors": far, "mesh": self.mesh}
        found = ranks(own.by_exit[exit], own.texts, own.caption_image, **options)
        precise = None
        if any(self.gallery.labels):
            precise = category.precisions(own.by_exit[exit], own.texts, own.caption_image, self.gallery.labels, **options)
        self.add("static", [(found, precise)], float(vision_flops(static.model.arch.vision)), {exit: 1.0})
        self.add_folds("static", own.by_exit[exit], own.texts)

    @property
    def captions(self) -> tuple[np.ndarray, np.ndarray]:
        """Caption embeddings [M, D] and the image index [M] of each."""
        return self.gallery.texts, self.gallery.caption_image

    def ranking_options(self, embeddings: Sequence[np.ndarray]) -> dict[str, Any]:
        """Keyword arguments for ranking: the mesh, and the distractors with the image embeddings `embeddings[1]`."""
        distractors, far = None, self.far
        if far is not None:
            distractors = Distractors(embeddings[1], far.texts, far.caption_image, far.labels)
        return {"distractors": distractors, "mesh": self.mesh}

    def mixed_options(self) -> dict[str, Any]:
        """Keyword arguments for `ranks_mixed`."""
        far = self.far.by_exit if self.far is not None else None
        return {"far_by_exit": far, **self.ranking_options([g.texts[:0] for g in self.galleries])}

    def precisions(self, *embeddings: np.ndarray) -> Precisions | None:
        """Average precisions for embeddings of the base images and the distractors; None without labels."""
        if not any(self.gallery.labels):
            return None
        return category.precisions(embeddings[0], *self.captions, self.gallery.labels, **self.ranking_options(embeddings))

    def rank(self, *embeddings: np.ndarray) -> Draw:
        return ranks(embeddings[0], *self.captions, **self.ranking_options(embeddings)), self.precisions(*embeddings)

    def compare(self) -> dict[str, Difference]:
        """Adds intervals and retention to the records and returns the comparisons between runs."""
        n = self.config.eval.bootstrap
        compared = comparison.intervals(self._per_image, n=n)
        for name, run in self.records.items():
            kept = retention(self._hits[name], self._hits["full"], n=n)
            run.retention = kept.percent() if kept else None
            run.intervals = compared[name]
        if "random" not in self.records:
            return {}
        pairs = {"routed_minus_random": ("routed", "random"), "routed_affine_minus_routed": (AFFINE, "routed")}
        return {
            name: Difference.of(difference(self._hits[a], self._hits[b], n=n))
            for name, (a, b) in pairs.items() if a in self._hits
        }  # fmt: skip

    def _cost(self, share: Mapping[int, float], router: bool) -> float:
        return sum(part * self.flops[exit] for exit, part in share.items()) + (self.costs.router if router else 0.0)


def evaluate_runs(
    config: ExperimentConfig,
    model: Model,
    source: Source,
    gallery: Gallery,
    far: Gallery | None = None,
    static: ShallowBaseline | None = None,
    settings: Mapping[str, Sequence[float]] | None = None,
    calibration: ScoreCalibration | None = None,
) -> tuple[RetrievalEvaluation, Evidence]:
    """Evaluates all runs; also returns the evidence that the report shows.

    settings: additional routed runs, name -> thresholds. calibration: adds the run 'routed_affine', which ranks the routed
    gallery with these calibrated scores.
    """
    texts = [caption for group in gallery.captions for caption in group]
    n = len(gallery.sample.clip)
    where = timing.time_breakdown(
        model, gallery.sample, source, texts, gallery.exits[:n] if gallery.exits is not None else None
    )
    speed = timing.throughput(
        model, gallery.sample, gallery.exits[:n] if gallery.exits is not None else None, settings,
        (static.model, static.gallery.sample) if static is not None else None,
    )  # fmt: skip
    fold = fold_of(gallery.index, config.eval.folds, len(source)) if config.eval.folds else None
    runs = EvaluationRuns(config, model, gallery, far, fold)
    for exit in reversed(model.exits):
        name = "full" if exit == model.exits[-1] else f"exit_{exit}"
        runs.add_exits(name, [np.full(len(g.captions), exit) for g in runs.galleries], router=False)
    taken = None
    if gallery.exits is not None:
        taken = [g.exits for g in runs.galleries]
        share = _share(np.concatenate(taken), model.exits)
        runs.add("routed", [runs.rank(*(g.routed for g in runs.galleries))], runs._cost(share, True), share)
        runs.add_folds("routed", gallery.routed, gallery.texts)
        runs.evidence.exits["routed"] = gallery.exits
        for name, limits in (settings or {}).items():
            runs.add_exits(name, [assign(g.scores, model.exits, limits) for g in runs.galleries], router=True)
        if calibration is not None:
            runs.add_calibrated(AFFINE, taken, calibration)
            speed[AFFINE] = speed["routed"]  # same images at the same exits
        runs.add_random(taken)
    if len(model.exits) > 1:
        runs.add_oracles(taken)
    if static is not None:
        runs.add_shallower_baseline(static)
    for name, value in speed.items():
        runs.records[name].images_per_s = value
    counts = GalleryCounts(
        images=sum(len(g.captions) for g in runs.galleries),
        captions=sum(len(g.texts) for g in runs.galleries),
        queries=QueryCounts(len(gallery.captions), len(gallery.texts)),
        source=source.name,
    )
    record = RetrievalEvaluation(runs.records, counts, runs.compare(), where, _flops(model, runs))
    if taken is not None:
        record.routing = {**model.description["routing"], "router_flops": runs.costs.router}
        for name, limits in (settings or {}).items():
            runs.records[name].thresholds = tuple(limits)
        measured = timing.measured_costs(model, gallery.sample)
        if where.router_ms is None:  # a router head that shares the tower's blocks has no separate timing
            where.router_ms = 1e3 * measured.router
        record.frontier = _frontier(runs, measured)
    return record, runs.evidence


def _flops(model: Model, runs: EvaluationRuns) -> Flops:
    exits = {e: ExitFlops(runs.flops[e], timing.compiler_flops(model, e)) for e in model.exits}
    return Flops(exits, runs.costs.router if runs.costs else None, float(text_flops(model.arch.text)))


def _frontier(runs: EvaluationRuns, measured: Costs) -> list[FrontierPoint]:
    """Sweeps thresholds on the evaluated images, for the report only; no threshold is chosen from it."""
    gallery, far = runs.gallery, runs.far
    bench = Bench(
        gallery.by_exit, *runs.captions, gallery.scores, {"counted": runs.costs, "measured": measured},
        far_scores=far.scores if far is not None else None, **runs.mixed_options(),
    )  # fmt: skip
    whole = runs.records["full"].mean_r5
    return [FrontierPoint(**vars(p), kept=100 * p.recall / whole if whole else None) for p in sweep(bench)]


def _share(exits: np.ndarray, known: Sequence[int]) -> dict[int, float]:
    return {e: float(np.mean(exits == e)) for e in known}


def _summary(found: Ranks, precisions: Precisions | None) -> dict[str, dict[str, float]]:
    summary = summarise(found)
    if precisions is None:
        return summary
    extra = category.summarise(precisions)
    return {direction: summary[direction] | extra[direction] for direction in summary}

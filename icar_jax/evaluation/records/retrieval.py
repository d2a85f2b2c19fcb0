"""The record of a retrieval evaluation, from which metrics.json is written (see `plain`).

An exit is named by its number of executed blocks. Percentages lie in [0, 100], shares in [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.metrics.comparison import Comparison
from icar_jax.evaluation.metrics.folds import FoldMetrics
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS
from icar_jax.evaluation.records.plain import optional
from icar_jax.evaluation.routing.frontier import Point
from icar_jax.evaluation.routing.score_calibration import Bias, ScoreCalibration
from icar_jax.evaluation.routing.timing import Timing


@dataclass(kw_only=True)
class Run:
    """Retrieval and cost of one run.

    text_to_image, image_to_text: 'r1', 'r5', 'r10' in percent, 'median_rank' and 'mean_rank'; with labels also 'map10',
        'map50', 'map100' (official denominator) and 'map10_standard', ... in percent.
    flops_per_image: 2 x MACs, including the complexity model if the run uses it.
    images_per_s: measured; None if not measured.
    share: exit -> fraction of the images.
    retention: R@5 (mean of both directions) in percent of full depth; None if undefined.
    intervals: 'text_to_image' | 'image_to_text' | 'mean' -> each of these metrics -> its comparison with full depth.
    thresholds: those of a budget.
    folds: with config.eval.folds, means over folds; None for runs with several assignments.
    found: how a budget's thresholds were set: the method, the calibration images and what was reached on them.
    """

    text_to_image: dict[str, float]
    image_to_text: dict[str, float]
    flops_per_image: float
    images_per_s: float | None = None
    share: dict[int, float]
    retention: Interval | None = None
    intervals: dict[str, dict[str, Comparison]] = field(default_factory=dict)
    thresholds: tuple[float, ...] | None = optional()
    folds: FoldMetrics | None = optional()
    found: dict[str, Any] | None = optional()

    def metrics(self, direction: str) -> dict[str, float]:
        """Returns the metrics of one of DIRECTIONS."""
        return {"text_to_image": self.text_to_image, "image_to_text": self.image_to_text}[direction]

    @property
    def mean_r5(self) -> float:
        """R@5 in percent, mean of both directions."""
        return sum(self.metrics(direction)["r5"] for direction in DIRECTIONS) / len(DIRECTIONS)


@dataclass(frozen=True)
class QueryCounts:
    """Numbers of queries: distractors are not among them."""

    images: int
    captions: int


@dataclass
class GalleryCounts:
    """The evaluated gallery.

    images, captions: counts, with distractors.
    source, distractors: names of the sources; `distractors` is None without.
    """

    images: int
    captions: int
    queries: QueryCounts
    source: str
    distractors: str | None = None


@dataclass(frozen=True)
class Difference:
    """R@5 (mean of both directions) of one run minus another, in percentage points, with its paired interval."""

    value: float
    low: float
    high: float
    includes_zero: bool

    @classmethod
    def of(cls, found: Interval) -> Difference:
        return cls(found.value, found.low, found.high, found.includes_zero)


@dataclass(frozen=True)
class ExitFlops:
    """FLOPs of one image through an exit: counted (2 x MACs), and from XLA's cost analysis (None if it reports none)."""

    counted: float
    compiler: float | None


@dataclass(frozen=True)
class Flops:
    """FLOPs per image by exit, of the complexity score of an image (None without routing), and of a caption."""

    exits: dict[int, ExitFlops]
    router: float | None
    text: float


@dataclass(frozen=True)
class FrontierPoint(Point):
    """A router setting evaluated on the gallery; `kept` is its R@5 in percent of full depth, None if that is 0."""

    kept: float | None


@dataclass(frozen=True)
class ScoreCalibrationResult(ScoreCalibration):
    """A score calibration, with the bias of the evaluated gallery by exit, and the source and number of calibration images."""

    bias: dict[int, Bias]
    calibration: str
    images: int


@dataclass
class RetrievalEvaluation:
    """All results of a retrieval evaluation.

    runs: by name. 'full' and 'exit_<blocks>' use one exit for all images; 'routed' the bundle's thresholds; 'budget_<share>'
        thresholds set on calibration images for that share of full depth's counted cost; 'random' a random assignment at the
        shares of 'routed'; 'oracle' the best assignment at these shares (upper bound); 'lossless' each image's cheapest exit
        that worsens none of its ranks (lossless oracle); 'static' is a shallower baseline model; 'routed_affine' is 'routed'
        ranked with per-exit calibrated scores.
    comparisons: with routing 'routed_minus_random', and with score calibration 'routed_affine_minus_routed'.
    routing: the routing of the bundle's description, and 'router_flops', the FLOPs of a complexity score.
    frontier: a sweep of thresholds on the evaluated images, from which nothing was chosen.
    colour_baseline: direction -> 'r1', 'r5', 'r10' in percent of a linear map from colour histograms.
    notes: sentences.
    """

    runs: dict[str, Run]
    gallery: GalleryCounts
    comparisons: dict[str, Difference]
    timing: Timing
    flops: Flops
    score_calibration: ScoreCalibrationResult | None = optional()
    routing: dict[str, Any] | None = optional()
    frontier: list[FrontierPoint] | None = optional()
    colour_baseline: dict[str, dict[str, float]] | None = optional()
    notes: list[str] = field(default_factory=list)

"""The record of a complexity model's evaluation, from which metrics.json is written (see `plain`).

Runs are 'model' and the classical measures, and for a model trained on regret 'known_complexity'.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from icar_jax.evaluation.metrics.ratings import Confusion, Estimate
from icar_jax.evaluation.records.plain import optional


@dataclass(frozen=True)
class Margin:
    """The model's `metric` minus that of the run `over`, on the same images, with its paired 95% interval.

    low, high, includes_zero: None where there are too few images for an interval, or too few of one class.
    """

    metric: str
    over: str
    value: float
    low: float | None
    high: float | None
    includes_zero: bool | None


@dataclass(frozen=True)
class NuisanceLevel:
    """A third of the images by a nuisance parameter of scenes.

    from_, to: the range of the parameter; images: their number.
    pcc: run -> Pearson's correlation; None if undefined, as with equal ratings.
    """

    from_: float
    to: float
    images: int
    pcc: dict[str, Estimate | None]


@dataclass(frozen=True)
class Cost:
    """Cost per image of one run; None where it is not counted or not timed.

    flops_per_image: 2 x MACs, and as a fraction of ViT-L/14's vision tower.
    routing_flops: of the model, its additional cost as the router of a tower whose blocks it shares.
    ms_per_image: measured on preprocessed images in memory.
    """

    flops_per_image: float | None = None
    share_of_vit_l14: float | None = None
    routing_flops: float | None = optional()
    ms_per_image: float | None = None


@dataclass(frozen=True)
class RegretSummary:
    """The regrets of the evaluated images (see `complexity.regret`).

    kind, exit, rivals, clip, sha256: how the model was trained; `sha256` is that of the CLIP's weights.
    mean, deviation: of the regrets; better_early: fraction of images whose regret is negative.
    pcc: run -> Pearson's correlation with the regrets themselves, not their ranks.
    """

    kind: str
    exit: int
    rivals: int | None = optional()
    clip: str
    sha256: str
    mean: float
    deviation: float
    better_early: float
    pcc: dict[str, Estimate]


@dataclass
class ComplexityEvaluation:
    """All results of evaluating a complexity model. For a model trained on regret, all but `regret` compares with the ranks of
    the regrets, scaled to [0, 1].

    head: 'regression' or 'classification'.
    source, images: name and number of the evaluated images.
    runs: run -> metric -> estimate. Regression: pcc, srcc, rmse, rmae. Classification: accuracy, f1, balanced_accuracy, youden,
        roc_auc, ece.
    margin: over the best classical measure.
    nuisance: 'noise' | 'blur' | 'contrast' -> 'low' | 'mid' | 'high'; empty for sources other than scenes.
    over_known: margin over the known complexity, None if it is unknown; with `regret` only.
    threshold, boundary, confusion: of a classifier; `boundary` is the rating above which an image is complex.
    notes: sentences.
    """

    task: str = field(default="complexity", init=False)
    head: str
    source: str
    images: int
    runs: dict[str, dict[str, Estimate]]
    margin: Margin
    nuisance: dict[str, dict[str, NuisanceLevel]]
    cost: dict[str, Cost]
    regret: RegretSummary | None = optional()
    over_known: Margin | None = optional(beside="regret")
    threshold: float | None = optional()
    boundary: float | None = optional(beside="threshold")
    confusion: Confusion | None = optional()
    notes: list[str] = field(default_factory=list)

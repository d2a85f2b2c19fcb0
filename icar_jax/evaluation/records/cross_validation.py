"""The record of a cross-validation on human ratings, from which metrics.json is written (see `plain`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from icar_jax.evaluation.metrics.ratings import Estimate
from icar_jax.evaluation.records.plain import optional


@dataclass(frozen=True)
class MethodCost:
    """Cost of one score; None where it is not counted.

    flops: 2 x MACs of a score alone; added_flops: beside a tower whose blocks it shares; share: `flops` as a share of the whole
    tower in config.complexity.clip; parameters: of the model; ms: measured per image, on preprocessed images in memory.
    """

    ms: float
    flops: float | None = None
    added_flops: float | None = optional()
    share: float | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class MethodResult:
    """Agreement of one method with the ratings.

    pcc, srcc: category -> estimate, and 'mean' over the categories. penalties: chosen in each fold; empty for a measure, which
    is compared as it is.
    """

    pcc: dict[str, Estimate]
    srcc: dict[str, Estimate]
    cost: MethodCost
    penalties: tuple[float, ...] = ()


@dataclass
class CrossValidation:
    """Cross-validated agreement of complexity models and classical measures with ratings, within categories.

    source, images, folds: what was rated. categories: category -> number of images.
    methods: method -> result. margins: learned method -> mean PCC over that of the best measure, paired.
    best_measure: of the classical measures, by mean PCC on the same images, so in their favour.
    published: category -> the best published classical PCC, for the categories of SAVOIAS.
    tower: name, FLOPs and milliseconds of the whole tower; None without one.
    """

    task: str = field(default="ratings", init=False)
    source: str
    images: int
    folds: int
    categories: dict[str, int]
    methods: dict[str, MethodResult]
    best_measure: str
    margins: dict[str, Estimate]
    published: dict[str, float]
    tower: dict[str, float | str] | None = optional()
    processor: str
    notes: list[str] = field(default_factory=list)

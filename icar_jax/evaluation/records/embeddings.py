"""The record of an evaluation of saved embeddings, from which metrics.json is written (see `plain`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.metrics.folds import FoldMetrics
from icar_jax.evaluation.records.plain import optional
from icar_jax.evaluation.records.retrieval import GalleryCounts


@dataclass
class EmbeddingsEvaluation:
    """Retrieval by embeddings from files.

    images, texts: the files. dimensions: of a vector.
    text_to_image, image_to_text: 'r1', 'r5', 'r10' in percent, 'median_rank' and 'mean_rank'; with labels also 'map10', ...
    intervals: 'text_to_image' | 'image_to_text' | 'mean' -> each of these metrics -> its bootstrap interval; None if undefined.
    chance: direction -> recall of a random ranking in percent.
    notes: sentences.
    """

    images: str
    texts: str
    dimensions: int
    gallery: GalleryCounts
    text_to_image: dict[str, float]
    image_to_text: dict[str, float]
    intervals: dict[str, dict[str, Interval | None]]
    chance: dict[str, dict[str, float]]
    folds: FoldMetrics | None = optional()
    notes: list[str] = field(default_factory=list)

    def metrics(self, direction: str) -> dict[str, float]:
        """Returns the metrics of one of DIRECTIONS."""
        return {"text_to_image": self.text_to_image, "image_to_text": self.image_to_text}[direction]

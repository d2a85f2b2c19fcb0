"""Retrieval in folds: the images of a set in equal parts, each a gallery of its own, as COCO's five folds of 1,000 images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from icar_jax.errors import ConfigError
from icar_jax.evaluation.metrics import comparison
from icar_jax.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Interval
from icar_jax.evaluation.metrics.comparison import collect
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, ranks, summarise

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclass(frozen=True)
class FoldMetrics:
    """Means over folds.

    images: number of images of each fold.
    text_to_image, image_to_text, mean: metric -> mean over the folds, with the interval of a bootstrap that draws images within
        each fold. mean: of both directions.
    each: one summary per fold: direction -> metric -> value.
    """

    images: tuple[int, ...]
    text_to_image: dict[str, Interval]
    image_to_text: dict[str, Interval]
    mean: dict[str, Interval]
    each: tuple[dict[str, dict[str, float]], ...]

    def sentence(self, name: str) -> str:
        """What a report says of them; `name` is the run."""
        sizes = f"{min(self.images):,}" if len(set(self.images)) == 1 else f"{min(self.images):,} to {max(self.images):,}"
        parts = []
        for direction in DIRECTIONS:
            found = getattr(self, direction)
            recalls = ", ".join(f"{v.value:.1f} [{v.low:.1f}, {v.high:.1f}]" for v in (found["r1"], found["r5"], found["r10"]))
            parts.append(f"{direction.replace('_', ' ')} {recalls}")
        return f"{name}, mean R@1, 5, 10 of {len(self.images)} folds of {sizes} images: {'; '.join(parts)}"


def fold_of(position: np.ndarray, folds: int, total: int) -> np.ndarray:
    """int64 [N]: the fold of images at `position` of a set of `total` images, in order: fold 0 has the first images.

    Raises ConfigError for more folds than images.
    """
    if not 0 < folds <= total:
        raise ConfigError(f"{folds} folds of {total} images are not possible; use 1 to {total}")
    return np.asarray(position, np.int64) * folds // total


def fold_metrics(
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    caption_image: np.ndarray,
    fold: np.ndarray,
    *,
    n: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
    mesh: Mesh | None = None,
) -> FoldMetrics:
    """Ranks every query in the gallery of its own fold; arguments as for `retrieval.ranks`, fold: int [N].

    Raises errors as `retrieval.ranks` does.
    """
    runs, each, sizes = [], [], []
    for number in np.unique(fold):
        images = np.flatnonzero(fold == number)
        place = np.full(len(fold), -1)
        place[images] = np.arange(len(images))
        texts = np.flatnonzero(place[caption_image] >= 0)
        found = ranks(image_embed[images], text_embed[texts], place[caption_image[texts]], mesh=mesh)
        runs.append(collect(found))
        each.append(summarise(found))
        sizes.append(len(images))
    means = comparison.mean_of_folds(runs, n=n, seed=seed, level=level)
    metrics = each[0][DIRECTIONS[0]]
    ordered = ({metric: means[name][metric] for metric in metrics} for name in (*DIRECTIONS, comparison.BOTH))
    return FoldMetrics(tuple(sizes), *ordered, tuple(each))

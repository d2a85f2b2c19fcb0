"""The complexity model of a loaded checkpoint, jitted on static shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from icar_jax import pytree
from icar_jax.checkpoint import Checkpoint
from icar_jax.data.images import Preprocess
from icar_jax.inference.forward import Forward, Placement, bucket_sizes
from icar_jax.models.pixels import normalise
from icar_jax.models.scorers import make_scorer, scorer_arch


class Scorer:
    """A complexity model with its preprocessing.

    `clip_params`, of the CLIP it is a head on, replace the equal ones of `loaded`, so that they lie in memory once.
    """

    def __init__(
        self,
        loaded: Checkpoint,
        batch_size: int,
        dtype: Any,
        clip_params: dict[str, Any] | None = None,
        placement: Placement = Placement(),
    ):
        self.path = loaded.path
        self.complexity = make_scorer(scorer_arch(loaded.description["arch"], f"{loaded.path}: arch"))
        pytree.require_same(self.complexity.shapes(), loaded.params, str(loaded.path))
        params = loaded.params
        if clip_params is not None:
            shared, ours = self.complexity.shared_paths(), pytree.flatten(clip_params)
            params = pytree.map_with_path(lambda path, leaf: ours[shared[path]] if path in shared else leaf, params)
        self.preprocess = Preprocess.from_dict(loaded.description["preprocess"])
        p = self.preprocess
        self.forward = Forward(
            lambda params, images: self.complexity.score(params, normalise(images, p.mean, p.std), dtype),
            placement.params(params),
            bucket_sizes(batch_size, placement.shards),
            placement,
        )

    def warm_up(self) -> None:
        """Compiles every batch shape."""
        self.forward.warm_up((self.preprocess.image_size, self.preprocess.image_size, 3), np.uint8)

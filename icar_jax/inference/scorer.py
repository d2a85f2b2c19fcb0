"""The complexity model of a loaded checkpoint, jitted on static shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from icar_jax import pytree
from icar_jax.checkpoint import Checkpoint
from icar_jax.data.images import Preprocess
from icar_jax.inference.forward import Forward, Placement, bucket_sizes
from icar_jax.models.functional import Graph
from icar_jax.models.pixels import normalise
from icar_jax.models.scorers import scorer_arch, scorer_class
from icar_jax.models.token_router import shared_paths


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
        arch = scorer_arch(loaded.description["arch"], f"{loaded.path}: arch")
        self.complexity = scorer_class(arch).graph(arch, dtype=dtype)
        pytree.require_same(self.complexity.shapes, loaded.params, str(loaded.path))
        params = loaded.params
        if clip_params is not None:
            shared, ours = shared_paths(loaded.params), pytree.flatten(clip_params)
            params = pytree.map_with_path(lambda path, leaf: ours[shared[path]] if path in shared else leaf, params)
        self.preprocess = Preprocess.from_dict(loaded.description["preprocess"])
        self._buckets, self._placement = bucket_sizes(batch_size, placement.shards), placement
        self.adopt(self.complexity, placement.params(params))

    def adopt(self, graph: Graph, params: Any) -> None:
        """Computes with another structure and parameters from here on."""
        p, self.complexity = self.preprocess, graph
        self.forward = Forward(
            lambda params, images: graph.score(params, normalise(images, p.mean, p.std)), params, self._buckets, self._placement
        )

    def warm_up(self) -> None:
        """Compiles every batch shape."""
        self.forward.warm_up((self.preprocess.image_size, self.preprocess.image_size, 3), np.uint8)

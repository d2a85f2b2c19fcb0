"""The complexity model of a loaded checkpoint, jitted at static batch shapes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from icar_jax import pytree
from icar_jax.checkpoint import Checkpoint, CheckpointError
from icar_jax.data.images import Preprocess
from icar_jax.inference.ahead import Programs
from icar_jax.inference.forward import Forward, Placement, bucket_sizes
from icar_jax.models.clip import ClipArch
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.reduction.routes import route_name
from icar_jax.models.token_router import (
    BlocksArch,
    ScorerArch,
    require_blocks,
    scorer_arch,
    scorer_class,
    shared_paths,
)


class Scorer:
    """A complexity model with its preprocessing.

    For a head on a CLIP, `clip_params` replace the identical parameters of `loaded`, so that they are in memory only once.
    """

    def __init__(
        self,
        loaded: Checkpoint,
        batch_size: int,
        dtype: Any,
        clip_params: dict[str, Any] | None = None,
        placement: Placement = Placement(),
        programs: Programs = Programs(),
    ):
        self.path = loaded.path
        arch = scorer_arch(loaded.description["arch"], f"{loaded.path}: arch")
        require_blocks(arch, loaded.params, str(loaded.path))
        self.complexity = scorer_class(arch).graph(arch, dtype=dtype)
        pytree.require_same(self.complexity.shapes, loaded.params, str(loaded.path))
        params = loaded.params
        if clip_params is not None:
            shared, ours = shared_paths(loaded.params), pytree.flatten(clip_params)
            params = pytree.map_with_path(lambda path, leaf: ours[shared[path]] if path in shared else leaf, params)
        self.preprocess = Preprocess.from_dict(loaded.description["preprocess"], f"{loaded.path}: preprocess")
        self._buckets, self._placement = bucket_sizes(batch_size, placement.shards), placement
        self.set_weights(self.complexity, placement.params(params), programs)

    def set_weights(self, graph: Graph, params: Any, programs: Programs = Programs()) -> None:
        """Replaces the structure and the parameters."""
        p, self.complexity = self.preprocess, graph
        run = lambda params, images: graph.score(params, normalise(images, p.mean, p.std))
        run = programs.use("complexity", run, params, jax.ShapeDtypeStruct((p.image_size, p.image_size, 3), np.uint8))
        self.forward = Forward(run, params, self._buckets, self._placement)

    def warm_up(self) -> None:
        """Compiles the forward pass at every batch shape."""
        self.forward.warm_up((self.preprocess.image_size, self.preprocess.image_size, 3), np.uint8)


def require_compatible(clip: Checkpoint, clip_arch: ClipArch, scorer: Checkpoint, arch: ScorerArch) -> None:
    """Raises CheckpointError unless this complexity model can route this CLIP; a separate backbone always can.

    A head on the blocks of a vision tower needs the tower it was trained on, with equal weights and preprocessing, and no
    exit before the block it reads.
    """
    if not isinstance(arch, BlocksArch):
        return
    trained_on = scorer.description.get("tower", {})
    fix = (
        f"bundle it with the CLIP it was trained on ({trained_on.get('clip', 'unknown')}, whose weights have SHA-256 "
        f"{trained_on.get('sha256', 'unknown')}), or train it on this one: --config.complexity.clip={clip.path}"
    )
    where = f"the complexity model {scorer.path} reads the tokens after block {arch.blocks} of a CLIP's vision tower"
    first = clip_arch.vision.depths[0]
    if first < arch.blocks:
        raise CheckpointError(
            f"{where}, but {clip.path} has an exit after block {first}, where images would leave before they are scored; "
            f"train the complexity model with --config.complexity.blocks={first} or less, or the CLIP with later exits"
        )
    for exit in clip_arch.vision.all_exits:
        own, _ = clip_arch.vision.at_route(exit)
        if own.reduction_until(arch.blocks) != clip_arch.vision.reduction_until(arch.blocks):
            raise CheckpointError(
                f"{where}, but {clip.path} has a route ({route_name(exit)}) that removes other tokens before, so its images "
                "could not go on from there; train the CLIP with routes that remove tokens later "
                f"(--config.clip.reduce_after={arch.blocks}), or use a complexity model with its own backbone"
            )
    names = (
        "image_size",
        "patch_size",
        "heads",
        "activation",
        "norm_eps",
        "pre_norm",
        "ffn",
        "registers",
        "reduce",
        "proportional",
    )
    ours, theirs = (
        {name: getattr(v, name) for name in names} | v.reduction_until(arch.blocks) for v in (arch.vision, clip_arch.vision)
    )
    apart = [f"{name} {theirs[name]!r} instead of {value!r}" for name, value in ours.items() if value != theirs[name]]
    if Preprocess.from_dict(clip.description["preprocess"]) != Preprocess.from_dict(scorer.description["preprocess"]):
        apart.append("the preprocessing")
    have, want = pytree.flatten(scorer.params), pytree.flatten(clip.params)
    for path, source in shared_paths(scorer.params).items():
        if source not in want or not np.array_equal(have[path], want[source]):
            apart.append(source)
    if apart:
        more = f" and {len(apart) - 3} more" if len(apart) > 3 else ""
        raise CheckpointError(f"{where}, but {clip.path} has a different tower ({', '.join(apart[:3])}{more}); {fix}")

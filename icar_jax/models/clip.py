"""CLIP over both towers: pure functions of a parameter dict.

`Clip(arch)` holds no arrays. Its methods take `params`, so they can be jitted, differentiated and mapped freely.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from icar_jax import pytree
from icar_jax.models.layers import Bridge, DType
from icar_jax.models.merging import Tokens
from icar_jax.models.text import Text, TextArch
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import Vision, VisionArch

Array = jax.Array
LOGIT_SCALE_START = float(np.log(1 / 0.07))
LOGIT_SCALE_MAX = 100.0
SIGMOID_SCALE_START, LOGIT_BIAS_START = float(np.log(10)), -10.0  # SigLIP's


@dataclass(frozen=True)
class ClipArch:
    """Both towers and the temperatures: each exit its own, or one shared by all."""

    vision: VisionArch
    text: TextArch
    temperature: str = "own"  # own | shared
    logit_bias: bool = False  # SigLIP's; beside each logit scale

    def __post_init__(self):
        if self.vision.embed_dim != self.text.embed_dim:
            raise ValueError(
                f"both towers must embed into one space: vision {self.vision.embed_dim}, text {self.text.embed_dim}"
            )


class _ClipModule(nnx.Module):
    def __init__(self, arch: ClipArch, rngs: nnx.Rngs):
        self.vision = Vision(arch.vision, rngs=rngs)
        self.text = Text(arch.text, rngs=rngs)
        scale = SIGMOID_SCALE_START if arch.logit_bias else LOGIT_SCALE_START
        self.logit_scale = nnx.Param(jnp.float32(scale))
        own = arch.vision.exits if arch.temperature == "own" else ()
        self.exit_logit_scale = nnx.Dict({str(e): nnx.Param(jnp.float32(scale)) for e in own})
        if arch.logit_bias:
            self.logit_bias = nnx.Param(jnp.float32(LOGIT_BIAS_START))
            self.exit_logit_bias = nnx.Dict({str(e): nnx.Param(jnp.float32(LOGIT_BIAS_START)) for e in own})


@dataclass(frozen=True)
class Clip:
    """Pure functions of one CLIP architecture; embeddings are float32 with unit norm.

    `execution` is how the blocks run; parameters and values do not depend on it.
    """

    arch: ClipArch
    execution: Execution = Execution()

    @cached_property
    def _bridge(self) -> Bridge:
        return Bridge(lambda rngs: _ClipModule(self.arch, rngs))

    def shapes(self) -> pytree.Tree:
        """Parameter shapes without allocating them."""
        return self._bridge.shapes()

    def init(self, key: Array, exit_start: str = "final") -> pytree.Tree:
        """Random float32 parameters; with `exit_start='final'` exit heads copy ln_post and proj."""
        params = self._bridge.init(key)
        return start_exits_from_final(params) if exit_start == "final" else params

    def encode_image(
        self, params: Mapping[str, Any], images: Array, exit: int | None = None, dtype: DType = jnp.float32
    ) -> Array:
        """images float [B, S, S, 3], normalised -> [B, D], unit norm. `exit` counts executed blocks; None is all."""
        blocks_run = self.arch.vision.check_exit(exit)
        return self.encode_image_exits(params, images, (blocks_run,), dtype)[blocks_run]

    def encode_image_exits(
        self,
        params: Mapping[str, Any],
        images: Array,
        exits: tuple[int, ...] | None = None,
        dtype: DType = jnp.float32,
        scales: Array | None = None,
    ) -> dict[int, Array]:
        """One pass, every exit: images [B, S, S, 3] -> {executed blocks: [B, D], unit norm}; None means all exits.

        `scales` float32 [B, depth]: of each image's residuals in each block, for layer dropout while training; None for none.
        """
        exits = tuple(self.arch.vision.check_exit(e) for e in exits or self.arch.vision.all_exits)
        embeds = self._bridge.bind(params).vision(images, exits, dtype, self.execution, scales)
        return {blocks_run: unit_norm(z) for blocks_run, z in embeds.items()}

    def encode_tokens(
        self, params: Mapping[str, Any], tokens: Tokens, start: int, exit: int | None = None, dtype: DType = jnp.float32
    ) -> Array:
        """The rest of `encode_image`: Tokens of [B, L, W] in the vision tower after `start` blocks -> [B, D], unit norm."""
        blocks_run = self.arch.vision.check_exit(exit)
        return self.encode_tokens_exits(params, tokens, start, (blocks_run,), dtype)[blocks_run]

    def encode_tokens_exits(
        self, params: Mapping[str, Any], tokens: Tokens, start: int, exits: tuple[int, ...], dtype: DType = jnp.float32
    ) -> dict[int, Array]:
        """The rest of `encode_image_exits`: Tokens of [B, L, W] after `start` blocks -> {executed blocks: [B, D], unit}."""
        for blocks_run in exits:
            first = self.arch.vision.heads_of(self.arch.vision.check_exit(blocks_run))[0]
            if start > first:
                raise ValueError(f"tokens after {start} blocks are past the head after {first} of the exit after {blocks_run}")
        embeds = self._bridge.bind(params).vision.resume(tokens, start, exits, dtype, self.execution)
        return {blocks_run: unit_norm(z) for blocks_run, z in embeds.items()}

    def encode_text(self, params: Mapping[str, Any], tokens: Array, dtype: DType = jnp.float32) -> Array:
        """tokens int32 [B, L] -> [B, D], unit norm."""
        return unit_norm(self._bridge.bind(params).text(tokens, dtype, self.execution))

    def logit_scales(self, params: Mapping[str, Any]) -> dict[int, Array]:
        """{executed blocks: scale}, full depth included; each at most 100 as in CLIP, or unbounded as in SigLIP."""
        scales = self._own_or_shared(params, "logit_scale")
        limit = jnp.inf if self.arch.logit_bias else LOGIT_SCALE_MAX
        return {e: jnp.minimum(jnp.exp(s), limit) for e, s in scales.items()}

    def logit_biases(self, params: Mapping[str, Any]) -> dict[int, Array]:
        """{executed blocks: bias} of a model with logit biases (SigLIP), full depth included."""
        return self._own_or_shared(params, "logit_bias")

    def _own_or_shared(self, params: Mapping[str, Any], name: str) -> dict[int, Array]:
        own = {e: params[f"exit_{name}"][str(e)] for e in self.arch.vision.exits if self.arch.temperature == "own"}
        return {e: own.get(e, params[name]) for e in self.arch.vision.all_exits}


def unit_norm(z: Array) -> Array:
    """z [B, D] divided by its length; a zero vector stays zero."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-24))


def start_exits_from_final(params: pytree.Tree) -> pytree.Tree:
    """Exit heads as copies of the full tower's head, so that an exit begins in the space the full tower uses.

    Temperatures and biases of the exits start from the full tower's too.
    """
    flat, sources = pytree.flatten(params), exit_sources(params)
    # jnp.array copies: donated buffers must not be shared between two leaves.
    return pytree.map_with_path(lambda path, leaf: jnp.array(flat[sources[path]]) if path in sources else leaf, params)


def exit_sources(params: Mapping[str, Any]) -> dict[str, str]:
    """{path of an exit's leaf: path of the full tower's leaf it starts from}, for parameters or their shapes.

    The residual of an exit head has no counterpart: its last kernel is zero at the start, whatever the others are.
    """
    sources = {}
    for path in pytree.flatten(params):
        match = re.fullmatch(r"vision/exits/\d+/((?!residual/).+)|exit_(logit_scale|logit_bias)/\d+", path)
        if match:
            head, scalar = match.groups()
            sources[path] = scalar or "vision/" + re.sub(r"^ln(?=/)", "ln_post", head)
    return sources

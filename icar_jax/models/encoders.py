"""What a model can do with a vision tower and with a text tower: embeddings of unit norm, from a CLIP or from a tower alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.errors import ModelError
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType
from icar_jax.models.reduction.routes import split_route
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.transformer import AttentionFn, Execution
from icar_jax.models.vision import VisionArch, VisionTower, run_first

Array = jax.Array


@dataclass(frozen=True)
class LoneArch:
    """Architecture of one tower alone: either `vision` or `text` is given, under the names that a ClipArch has."""

    vision: VisionArch | None = None
    text: TextArch | None = None

    def __post_init__(self) -> None:
        if (self.vision is None) == (self.text is None):
            raise ModelError("a tower alone is either a vision tower or a text tower")


class ImageEncoder(Module):
    """Methods of models with a vision tower, `vision`, whose architecture is `arch.vision`."""

    arch: Any
    vision: VisionTower

    def encode_image(self, images: Array, exit: int | None = None) -> Array:
        """images float [B, S, S, 3], normalised -> float32 [B, D], unit norm.

        `exit` counts executed blocks; None is full depth. Raises ModelError if there is no such exit.
        """
        blocks_run = self.arch.vision.check_exit(exit)
        return self.encode_image_exits(images, (blocks_run,))[blocks_run]

    def encode_image_exits(
        self, images: Array, exits: Sequence[int] | None = None, scales: Array | None = None
    ) -> dict[int, Array]:
        """images float [B, S, S, 3], normalised -> {executed blocks: float32 [B, D], unit norm}, in one forward pass.

        `exits` counts executed blocks; None is every exit. `scales` float32 [B, depth] multiplies the residuals of each image
        in each block (layer dropout in training); None is 1. Raises ModelError if there is no such exit.
        """
        given = () if exits is None and scales is None else (exits, scales)
        return {blocks_run: unit_norm(z) for blocks_run, z in self.vision(images, *given).items()}

    def image_tokens(self, images: Array, blocks: int) -> Tokens:
        """images float [B, S, S, 3], normalised -> Tokens of [B, L, W] after `blocks` blocks, for `encode_tokens`."""
        return run_first(self.vision, images, blocks)

    def encode_tokens(self, tokens: Tokens, start: int, exit: int | None = None) -> Array:
        """Resumes `encode_image` from Tokens of [B, L, W] after `start` blocks -> float32 [B, D], unit norm.

        Raises ModelError if there is no such exit; ValueError if it lies before `start`, or if heads read several blocks and
        the tokens lack those of earlier blocks (`image_tokens` gives them).
        """
        blocks_run = self.arch.vision.check_exit(exit)
        return self.encode_tokens_exits(tokens, start, (blocks_run,))[blocks_run]

    def encode_tokens_exits(self, tokens: Tokens, start: int, exits: Sequence[int]) -> dict[int, Array]:
        """Resumes `encode_image_exits` from Tokens of [B, L, W] after `start` blocks -> {executed blocks: float32 [B, D]}.

        Raises ModelError if there is no such exit, ValueError as `encode_tokens`.
        """
        for blocks_run in exits:
            first = self.arch.vision.heads_of(split_route(self.arch.vision.check_exit(blocks_run))[0])[0]
            if start > first:
                raise ValueError(f"tokens after {start} blocks come too late for exit {blocks_run}, which reads block {first}")
        return {blocks_run: unit_norm(z) for blocks_run, z in self.vision.resume(tokens, start, exits).items()}


class TextEncoder(Module):
    """Methods of models with a text tower, `text`."""

    text: TextTower

    def encode_text(self, tokens: Array) -> Array:
        """tokens int [B, L] -> float32 [B, D], unit norm."""
        return unit_norm(self.text(tokens))


class VisionModel(ImageEncoder):
    """A vision tower alone; arguments are those of `vision.VisionTower`, with a LoneArch."""

    def __init__(
        self, arch: LoneArch, *, execution: Execution = Execution(), attention: AttentionFn | None = None,
        dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        if arch.vision is None:
            raise TypeError("a VisionModel needs an architecture with a vision tower")
        self.arch = arch
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.vision = VisionTower(arch.vision, execution=execution, attention=attention, **types)


class TextModel(TextEncoder):
    """A text tower alone; arguments are those of `text.TextTower`, with a LoneArch."""

    def __init__(
        self, arch: LoneArch, *, execution: Execution = Execution(), attention: AttentionFn | None = None,
        dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        if arch.text is None:
            raise TypeError("a TextModel needs an architecture with a text tower")
        self.arch = arch
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.text = TextTower(arch.text, execution=execution, attention=attention, **types)


def unit_norm(z: Array) -> Array:
    """z [B, D] -> z / |z|, [B, D]; a zero vector stays zero."""
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-24))

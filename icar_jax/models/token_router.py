"""Complexity from the tokens after the first blocks of a CLIP vision tower, so that routing shares the tower's own work.

The tower's part is a copy of the CLIP's weights and does not learn; a head on pooled tokens does. The copy makes the model
complete without the CLIP; beside it the tokens are computed once, and the tower goes on from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax import pytree
from icar_jax.config import from_dict, unknown
from icar_jax.errors import ModelError
from icar_jax.models.complexity import HEAD_MODULES, HEADS, ComplexityArch, ComplexityModel, log_odds
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType
from icar_jax.models.token_merging import Tokens
from icar_jax.models.vision import Trunk, VisionArch, run_trunk

Array = jax.Array
TOWER = "tower"  # parameters of the copied part; the others are the head's


@dataclass(frozen=True)
class BlocksArch:
    """The whole vision tower's shape, the blocks that run before the head, and the head."""

    vision: VisionArch
    blocks: int
    head: str
    dropout: float = 0.2  # regression head only, while training
    norm_parts: bool = False  # class token, mean and deviation are brought to one scale before the head's own norm
    type: str = "blocks"

    def __post_init__(self) -> None:
        if self.head not in HEADS:
            raise ModelError(f"complexity head {self.head!r} must be one of {HEADS}")
        if not 1 <= self.blocks <= self.vision.depth:
            raise ModelError(f"blocks={self.blocks} must lie in 1 to {self.vision.depth}, the depth of the vision tower")
        if self.type != "blocks":
            raise ModelError(f"type {self.type!r} must be 'blocks'")

    @property
    def image_size(self) -> int:
        """Pixels, prepared as the CLIP's own."""
        return self.vision.image_size

    @property
    def features(self) -> int:
        """Width of the pooled tokens: mean and deviation of the patches and, where there is one, the class token."""
        return (2 + self.vision.class_token) * self.vision.width


class TokenRouter(Module):
    """The first blocks of a vision tower and a head.

    images float [B, S, S, 3], normalised -> complexity [B] in [0, 1], float32.

    Args:
        arch: its shape.
        dtype: of activations; parameters are cast inside.
        param_dtype: of parameters.
    """

    def __init__(self, arch: BlocksArch, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        types = {"dtype": jnp.dtype(dtype), "param_dtype": param_dtype, "rngs": rngs}
        self.arch = arch
        self.tower = Trunk(arch.vision, arch.blocks, **types)
        self.head = HEAD_MODULES[arch.head](arch.features, dropout=arch.dropout, **types)

    def __call__(self, images: Array) -> Array:
        return self.score(images)

    def tokens(self, images: Array) -> Tokens:
        """images float [B, S, S, 3], normalised -> Tokens of [B, L, W] after `arch.blocks` blocks, in the compute dtype."""
        return self._tokens_after(self.arch.blocks, images)

    def _tokens_after(self, blocks: int, images: Array) -> Tokens:
        return run_trunk(self.tower, self.tower.embed(images), (blocks,))[blocks]

    def logits_of_tokens(self, tokens: Tokens, dropout_key: Array | None = None) -> Array:
        """Tokens of [B, L, W] -> [B, 2] (classification) or [B, 1] (regression), float32."""
        pooled = pool_tokens(tokens, self.arch.vision.class_token)
        if self.arch.norm_parts:
            parts = pooled.reshape(len(pooled), -1, self.arch.vision.width)
            parts = parts - parts.mean(axis=-1, keepdims=True)
            parts = parts * jax.lax.rsqrt(jnp.square(parts).mean(axis=-1, keepdims=True) + 1e-5)
            pooled = parts.reshape(pooled.shape)
        return self.head(pooled, dropout_key)

    def logits(self, images: Array, dropout_key: Array | None = None) -> Array:
        """images float [B, S, S, 3], normalised -> [B, 2] (classification) or [B, 1] (regression), float32."""
        return self.logits_of_tokens(self.tokens(images), dropout_key)

    def score_of_tokens(self, tokens: Tokens) -> Array:
        """Tokens of [B, L, W] -> complexity [B] in [0, 1], float32; higher is more complex."""
        return jax.nn.sigmoid(log_odds(self.logits_of_tokens(tokens), self.arch.head))

    def score(self, images: Array) -> Array:
        """images float [B, S, S, 3], normalised -> complexity [B] in [0, 1], float32; higher is more complex."""
        return self.score_of_tokens(self.tokens(images))

    def score_and_map(self, images: Array) -> tuple[Array, Array]:
        """The score, and where in the image it comes from: what each patch's token adds to the log odds of 'complex'.

        images float [B, S, S, 3], normalised -> complexity [B], as `score`; map [B, h, w], float32, one cell a patch. A cell is
        its token times the gradient by it, times h w: a patch counts through the mean and through the deviation, whose
        gradients by the pooled tokens, as of `models.complexity.activation_map`, would leave the deviation out. The mean of a
        map is the patches' share of the log odds to first order (both pools are homogeneous, Euler's theorem); the rest comes
        from the class token. Positive values raise the score, negative ones lower it. With `norm_parts` the size of a part is
        taken out, and that mean is 0: a map says what speaks for 'complex' more than the rest of the image.

        Where patches are merged before the head reads them, tokens and gradients are those before the first merging, where
        each patch still has its own; what blocks after it add is then in the map, but its mean is no share of the log odds.
        """
        vision, blocks = self.arch.vision, self.arch.blocks
        start = min(blocks, vision.first_merging)
        tokens = self._tokens_after(start, images)

        def odds_of(values: Array) -> Array:
            read = run_trunk(self.tower, Tokens(values, tokens.sizes), (blocks,), start)[blocks]
            return log_odds(self.logits_of_tokens(read), self.arch.head)

        odds, pull_back = jax.vjp(odds_of, tokens.values)
        (gradient,) = pull_back(jnp.ones_like(odds))
        each = jnp.sum(tokens.values.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)[:, int(vision.class_token) :]
        return jax.nn.sigmoid(odds), each.reshape(-1, vision.grid, vision.grid) * vision.grid**2


def pool_tokens(tokens: Tokens, class_token: bool) -> Array:
    """Tokens of [B, L, W] -> float32 [B, 3 W or 2 W]: the class token, and mean and standard deviation over the patches.

    A token that stands for several patches counts as often.
    """
    x, part = tokens.values.astype(jnp.float32), jnp.asarray(tokens.sizes)
    if class_token:
        part = part.at[:, 0].set(0)
    part = part / part.sum(axis=1, keepdims=True)

    def mean_of(values: Array) -> Array:  # as products: twice as fast on a CPU as sums of what is weighed
        return jnp.einsum("bl,blw->bw", part, values, precision="highest")

    mean = mean_of(x)
    variance = mean_of(jnp.square(x - mean[:, None]))
    # The gradient of sqrt at 0 is infinite; the patches of a flat image are told apart by their positions alone.
    return jnp.concatenate([*([x[:, 0]] if class_token else []), mean, jnp.sqrt(variance + 1e-12)], axis=-1)


def shared_paths(shapes: Mapping[str, Any]) -> dict[str, str]:
    """{path of a parameter of the copied part: its path in the CLIP's parameters}, from parameters or their shapes."""
    return {path: re.sub(f"^{TOWER}/", "vision/", path) for path in pytree.flatten(shapes) if path.startswith(f"{TOWER}/")}


ScorerArch = ComplexityArch | BlocksArch


def scorer_arch(values: Mapping[str, Any], where: str) -> ScorerArch:
    """The architecture under "arch" of a complexity checkpoint; one without "type" is a ConvNeXt.

    Raises ConfigError for an unknown type or field, naming `where`.
    """
    kind = values.get("type")
    if kind not in (None, "blocks"):
        raise unknown(f"{where}.type", kind, ("blocks",))
    return from_dict(dict(values), ComplexityArch if kind is None else BlocksArch, where)


def scorer_class(arch: ScorerArch) -> type[ComplexityModel | TokenRouter]:
    """The module that an architecture describes."""
    return TokenRouter if isinstance(arch, BlocksArch) else ComplexityModel

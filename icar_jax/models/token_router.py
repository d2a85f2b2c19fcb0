"""Complexity model on the tokens after the first blocks of a CLIP vision tower, so that routing reuses the tower's compute.

The blocks are a frozen copy of the CLIP's weights; only a head on pooled tokens is trained. The copy makes the model usable
without the CLIP. When both are used, the tokens are computed once and the tower continues from them.
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
from icar_jax.models.complexity import ComplexityArch, ComplexityModel, head_module, log_odds, require_head
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.sizes import require_depth
from icar_jax.models.transformer import AttentionFn
from icar_jax.models.vision import Trunk, VisionArch, run_first, run_trunk

Array = jax.Array
TOWER = "tower"  # parameters of the copied blocks; the others belong to the head


@dataclass(frozen=True)
class BlocksArch:
    """Architecture of the whole vision tower, the number of blocks below the head, and the head."""

    vision: VisionArch
    blocks: int
    head: str
    dropout: float = 0.2  # regression head only, while training
    norm_parts: bool = False  # normalise class token, mean and deviation separately before the head's LayerNorm
    readout: str = "mlp"  # regression head: mlp (RegressionHead) | linear (LinearHead)
    type: str = "blocks"

    def __post_init__(self) -> None:
        require_head(self.head, self.readout)
        if not 1 <= self.blocks <= self.vision.depth:
            raise ModelError(f"blocks={self.blocks} must lie in 1 to {self.vision.depth}, the depth of the vision tower")
        if self.type != "blocks":
            raise ModelError(f"type {self.type!r} must be 'blocks'")

    @property
    def image_size(self) -> int:
        """Image size in pixels, the same as the CLIP's."""
        return self.vision.image_size

    @property
    def features(self) -> int:
        """Width of the pooled features: mean and standard deviation of the patches, and the class token if there is one."""
        return (2 + self.vision.class_token) * self.vision.width


class TokenRouter(Module):
    """The first blocks of a vision tower and a head.

    images float [B, S, S, 3], normalised -> complexity [B] in [0, 1], float32.

    Args:
        arch: architecture.
        attention: attention function, see `transformer.Attention`; None is `ops.attention`.
        dtype: dtype of activations; parameters are cast to it in each layer.
        param_dtype: dtype of parameters.
        rngs: random keys for initialisation.
    """

    def __init__(
        self, arch: BlocksArch, *, attention: AttentionFn | None = None, dtype: DType = jnp.float32,
        param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        types: dict[str, Any] = {"dtype": jnp.dtype(dtype), "param_dtype": param_dtype, "rngs": rngs}
        self.arch = arch
        self.tower = Trunk(arch.vision, arch.blocks, attention=attention, **types)
        self.head = head_module(arch.head, arch.readout)(arch.features, dropout=arch.dropout, **types)

    def __call__(self, images: Array) -> Array:
        return self.score(images)

    def tokens(self, images: Array) -> Tokens:
        """images float [B, S, S, 3], normalised -> Tokens of [B, L, W] after `arch.blocks` blocks, in the compute dtype."""
        return run_first(self.tower, images, self.arch.blocks)

    def logits_of_tokens(self, tokens: Tokens, dropout_key: Array | None = None) -> Array:
        """Tokens of [B, L, W], as of `tokens` -> logits [B, 2] (classification) or [B, 1] (regression), float32."""
        return self.head(self.pooled_tokens(tokens), dropout_key)

    def pooled_tokens(self, tokens: Tokens) -> Array:
        """Tokens of [B, L, W], as of `tokens` -> the features that the head reads, float32 [B, arch.features]."""
        if self.arch.vision.has_cross:  # it stands for no part of the image
            tokens = Tokens(tokens.values[:, :-1], tokens.sizes[:, :-1])
        pooled = pool_tokens(tokens, self.arch.vision.class_token, self.arch.vision.registers)
        if self.arch.norm_parts:
            parts = pooled.reshape(len(pooled), -1, self.arch.vision.width)
            parts = parts - parts.mean(axis=-1, keepdims=True)
            parts = parts * jax.lax.rsqrt(jnp.square(parts).mean(axis=-1, keepdims=True) + 1e-5)
            pooled = parts.reshape(pooled.shape)
        return pooled

    def pooled(self, images: Array) -> Array:
        """images float [B, S, S, 3], normalised -> the features that the head reads, float32 [B, arch.features]."""
        return self.pooled_tokens(self.tokens(images))

    def pooled_after(self, images: Array, depths: tuple[int, ...]) -> Array:
        """images float [B, S, S, 3], normalised -> `pooled` after each of `depths` blocks, float32 [B, depths, features]."""
        tokens = run_trunk(self.tower, self.tower.embed(images), depths)
        return jnp.stack([self.pooled_tokens(tokens[depth]) for depth in depths], axis=1)

    def logits(self, images: Array, dropout_key: Array | None = None) -> Array:
        """images float [B, S, S, 3], normalised -> logits [B, 2] (classification) or [B, 1] (regression), float32."""
        return self.logits_of_tokens(self.tokens(images), dropout_key)

    def score_of_tokens(self, tokens: Tokens) -> Array:
        """Tokens of [B, L, W], as of `tokens` -> complexity [B] in [0, 1], float32; higher is more complex."""
        return jax.nn.sigmoid(log_odds(self.logits_of_tokens(tokens), self.arch.head))

    def score(self, images: Array) -> Array:
        """images float [B, S, S, 3], normalised -> complexity [B] in [0, 1], float32; higher is more complex."""
        return self.score_of_tokens(self.tokens(images))

    def score_and_map(self, images: Array) -> tuple[Array, Array]:
        """Returns the score and a map of the contribution of each patch token to the log odds of 'complex'.

        images float [B, S, S, 3], normalised -> (complexity [B], as `score`; map [B, h, w], float32, one cell per patch). A
        cell is the dot product of the token and its gradient, times h w. Unlike `models.complexity.activation_map` this
        includes the standard deviation of the patches as well as their mean. The mean of a map is the contribution of the
        patches to the log odds to first order (both pools are homogeneous, Euler's theorem); the rest comes from the class
        token. Positive values raise the score, negative values lower it. With `norm_parts` the head is invariant to the scale
        of each part, so the mean is 0 and the map is relative to the rest of the same image.

        If patches are merged before the head, tokens and gradients are taken before the first merging, where each patch still
        has its own token. The map then includes the effect of later blocks, and its mean is not a contribution to the log odds.
        """
        vision, blocks = self.arch.vision, self.arch.blocks
        start = min(blocks, vision.first_merging)
        tokens = run_first(self.tower, images, start)

        def odds_of(values: Array) -> Array:
            read = run_trunk(self.tower, Tokens(values, tokens.sizes), (blocks,), start)[blocks]
            return log_odds(self.logits_of_tokens(read), self.arch.head)

        odds, pull_back = jax.vjp(odds_of, tokens.values)
        (gradient,) = pull_back(jnp.ones_like(odds))
        each = jnp.sum(tokens.values.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
        each = each[:, vision.prefix : vision.prefix + vision.grid**2]
        return jax.nn.sigmoid(odds), each.reshape(-1, vision.grid, vision.grid) * vision.grid**2


def pool_tokens(tokens: Tokens, class_token: bool, registers: int = 0) -> Array:
    """Tokens of [B, L, W] -> float32 [B, 3 W] or, without class token, [B, 2 W].

    Concatenates the class token, and mean and standard deviation over the patches, weighted by the sizes of merged tokens.
    Registers, which follow the class token, are left out.
    """
    x, part = tokens.values.astype(jnp.float32), jnp.asarray(tokens.sizes)
    if prefix := int(class_token) + registers:
        part = part.at[:, :prefix].set(0)
    part = part / part.sum(axis=1, keepdims=True)

    def mean_of(values: Array) -> Array:  # as a matrix product: twice as fast on CPU as a weighted sum
        return jnp.einsum("bl,blw->bw", part, values, precision="highest")

    mean = mean_of(x)
    variance = mean_of(jnp.square(x - mean[:, None]))
    # The gradient of sqrt at 0 is infinite; patches of a uniform image differ only in their position embeddings.
    return jnp.concatenate([*([x[:, 0]] if class_token else []), mean, jnp.sqrt(variance + 1e-12)], axis=-1)


def shared_paths(shapes: Mapping[str, Any]) -> dict[str, str]:
    """Returns {path of a copied parameter: its path in the CLIP's parameters}, from parameters or their shapes."""
    return {path: re.sub(f"^{TOWER}/", "vision/", path) for path in pytree.flatten(shapes) if path.startswith(f"{TOWER}/")}


ScorerArch = ComplexityArch | BlocksArch


def scorer_arch(values: Any, where: str) -> ScorerArch:
    """Returns the architecture for the entry "arch" of a complexity checkpoint; without "type" it is a ConvNeXt.

    Raises ConfigError for an unknown type or field, naming `where`.
    """
    kind = values.get("type") if isinstance(values, Mapping) else None
    if kind not in (None, "blocks"):
        raise unknown(f"{where}.type", kind, ("blocks",))
    return from_dict(values, ComplexityArch if kind is None else BlocksArch, where)


def require_blocks(arch: ScorerArch, params: pytree.Tree, where: str) -> None:
    """Raises ModelError unless the weights hold as many blocks as the architecture, before anything is built."""
    if isinstance(arch, BlocksArch):
        require_depth(arch.blocks, params.get(TOWER, {}), f"{where}: {TOWER}")


def scorer_class(arch: ScorerArch) -> type[ComplexityModel | TokenRouter]:
    """Returns the module class for an architecture."""
    return TokenRouter if isinstance(arch, BlocksArch) else ComplexityModel

"""What heads read of the tokens of a vision tower: one pooled token, or several."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from icar_jax.models.reduction.tokens import Tokens
from icar_jax.models.vision_arch import VisionArch

Array = jax.Array


def without_cross(tokens: Tokens, arch: VisionArch) -> Tokens:
    """The tokens that heads read: a cross token only guides."""
    return Tokens(tokens.values[:, :-1], tokens.sizes[:, :-1]) if arch.has_cross else tokens


def pool(x: Array, how: str, prefix: int, sizes: Array | None) -> Array:
    """x [B, L, W] -> [B, W], or [B, 2, W] for 'cls_mean'; the first `prefix` tokens are no patches. `sizes` as of ExitHead."""
    if how == "cls":
        return x[:, 0]
    patches = x[:, prefix:]
    if how == "first_patch":
        return patches[:, 0]
    wide = patches.astype(jnp.float32)
    if sizes is None:
        mean = wide.mean(axis=1).astype(x.dtype)
    else:
        weights = sizes[:, prefix:, None]
        mean = ((wide * weights).sum(axis=1) / weights.sum(axis=1)).astype(x.dtype)
    return jnp.stack([x[:, 0], mean], axis=1) if how == "cls_mean" else mean


def flat(pooled: Array) -> Array:
    """[B, W] or [B, n, W] -> [B, W] or [B, n W]."""
    return pooled.reshape(len(pooled), -1) if pooled.ndim == 3 else pooled


def parts(pooled: Array) -> Array:
    """[B, W] or [B, 2, W] -> [B, 1, W] or [B, 2, W]."""
    return pooled if pooled.ndim == 3 else pooled[:, None]


def pooled_after(tokens: Tokens, block: int, arch: VisionArch) -> Array:
    """What heads read of Tokens of [B, L, W] after that block: [B, W], or [B, 2, W] for 'cls_mean'."""
    tokens = without_cross(tokens, arch)
    how = arch.head if block == arch.depth or arch.head_blocks > 1 else arch.pool
    return pool(tokens.values, how, arch.prefix, tokens.sizes if block > arch.first_merging else None)


def earlier_pooled(tokens: Tokens, start: int, wanted: Iterable[int]) -> dict[int, Array]:
    """{executed blocks: [B, P, W]} of the `wanted` blocks before `start`, from `tokens.earlier`. Raises ValueError without."""
    before = sorted(block for block in wanted if block < start)
    count = 0 if tokens.earlier is None else tokens.earlier.shape[1]
    if before and count < start - before[0]:
        raise ValueError(
            f"tokens after {start} blocks also need the pooled tokens of {start - before[0]} earlier blocks, which the heads "
            f"read (head_blocks); they have those of {count}: make them with image_tokens"
        )
    return {block: tokens.earlier[:, block - start] for block in before}  # type: ignore[index]

"""Causal text transformer pooled at the end token."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models.layers import DType, LayerNorm, Linear, normal
from icar_jax.models.transformer import Block

Array = jax.Array


@dataclass(frozen=True)
class TextArch:
    """Shape of a text tower; `end_id` is the token whose first occurrence is pooled."""

    context_length: int
    vocabulary: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    embed_dim: int
    activation: str = "gelu"
    end_id: int = 49407

    def __post_init__(self):
        if not 0 <= self.end_id < self.vocabulary:
            raise ValueError(f"end token {self.end_id} lies outside the vocabulary of {self.vocabulary}")


class Text(nnx.Module):
    """tokens int32 [B, L] -> [B, D] before normalisation, float32."""

    def __init__(self, arch: TextArch, *, rngs: nnx.Rngs):
        a = arch
        self.arch = arch
        self.embed = normal(rngs, (a.vocabulary, a.width), 0.02)
        self.pos = normal(rngs, (a.context_length, a.width), 0.01)
        self.blocks = nnx.List(
            [Block(a.width, a.heads, a.mlp_width, a.depth, a.activation, 1e-5, rngs=rngs) for _ in range(a.depth)]
        )
        self.ln_final = LayerNorm(a.width, 1e-5)
        self.proj = Linear(a.width, a.embed_dim, std=a.width**-0.5, bias=False, rngs=rngs)

    def __call__(self, tokens: Array, dtype: DType) -> Array:
        length = tokens.shape[1]
        x = (self.embed[...][tokens] + self.pos[...][:length]).astype(dtype)
        for block in self.blocks:
            x = block(x, causal=True, dtype=dtype)
        # argmax returns the first match, so padding with the end token does no harm.
        end = jnp.argmax(tokens == self.arch.end_id, axis=1)
        pooled = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        return self.proj(self.ln_final(pooled), dtype).astype(jnp.float32)

"""What an exit head may add to its pooled token before LayerNorm and projection.

A shallow block has not yet gathered into one token what full depth projects. Both modules give a residual whose last kernel
starts at zero, so that a head with one is at its start the plain linear head (as adapters are: Houlsby et al. 2019,
arXiv:1902.00751).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models.layers import DType, LayerNorm, Linear, normal, zeros
from icar_jax.models.transformer import Attention, Mlp

Array = jax.Array
EXIT_HEADS = ("linear", "adapter", "attention")
_EPS = 1e-5  # as of the heads' own norm


def adapter_width(width: int) -> int:
    """Channels of the adapter's bottleneck: a quarter of the tower's."""
    return max(1, width // 4)


class Adapter(nnx.Module):
    """LayerNorm and a bottleneck MLP on the pooled token: pooled [B, W] -> residual [B, W], zero at the start."""

    def __init__(self, width: int, activation: str, *, rngs: nnx.Rngs):
        self.ln = LayerNorm(width, _EPS)
        self.mlp = Mlp(width, adapter_width(width), 1, activation, rngs=rngs)
        self.mlp.fc2.kernel = zeros(adapter_width(width), width)

    def __call__(self, x: Array, pooled: Array, dtype: DType) -> Array:
        return self.mlp(self.ln(pooled), dtype)


class TokenAttention(nnx.Module):
    """One learned query attends to all tokens: x [B, L, W] -> residual [B, W], zero at the start."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.probe = normal(rngs, (width,), width**-0.5)
        self.ln = LayerNorm(width, _EPS)
        self.attn = Attention(width, heads, 1, rngs=rngs)
        self.attn.out = Linear(width, width, std=0.0, rngs=rngs)

    def __call__(self, x: Array, pooled: Array, dtype: DType) -> Array:
        probe = jnp.broadcast_to(self.probe[...], (x.shape[0], 1, x.shape[2]))
        return self.attn.read(probe, self.ln(x), dtype=dtype)[:, 0]

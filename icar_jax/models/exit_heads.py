"""Optional residual modules of exit heads, added to the pooled token before LayerNorm and projection.

At shallow depth one token does not yet summarise the image. The last kernel of both modules is initialised to zero, so a head
initially equals the plain linear head (as with adapters: Houlsby et al. 2019, arXiv:1902.00751).
"""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.config.choices import ExitHeadName
from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, LayerNorm, Linear, draw
from icar_jax.models.transformer import Attention, AttentionFn, Mlp

Array = jax.Array
EXIT_HEADS = get_args(ExitHeadName)
_EPS = 1e-5  # same as the LayerNorm of the head


def adapter_width(width: int) -> int:
    """Returns the number of bottleneck channels of the adapter: a quarter of the tower's width, at least 1."""
    return max(1, width // 4)


class Adapter(Module):
    """LayerNorm and a bottleneck MLP; pooled token [B, W] -> residual [B, W], initially zero. `x` [B, L, W] is ignored."""

    def __init__(
        self, width: int, *, activation: str = "gelu", dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        hidden = adapter_width(width)
        self.ln = LayerNorm(width, _EPS, param_dtype=param_dtype)
        self.mlp = Mlp(width, hidden, activation=activation, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp.fc2.kernel = nnx.Param(jnp.zeros((hidden, width), param_dtype))

    def __call__(self, x: Array, pooled: Array, key_bias: Array | None = None) -> Array:
        return self.mlp(self.ln(pooled))


class TokenAttention(Module):
    """One learned query attends to all tokens; x [B, L, W] -> residual [B, W], initially zero. `pooled` [B, W] is ignored."""

    def __init__(
        self, width: int, heads: int, *, attention: AttentionFn | None = None, dtype: DType = None,
        param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.probe = draw(rngs, (width,), width**-0.5, param_dtype)
        self.ln = LayerNorm(width, _EPS, param_dtype=param_dtype)
        self.attn = Attention(width, heads, attention=attention, **types)
        self.attn.out = Linear(width, width, std=0.0, **types)

    def __call__(self, x: Array, pooled: Array, key_bias: Array | None = None) -> Array:
        """`key_bias` float32 [B, L]: the logarithms of the sizes of merged tokens; None is 0."""
        probe = jnp.broadcast_to(self.probe[...], (x.shape[0], 1, x.shape[2]))
        return self.attn.read(probe, self.ln(x), key_bias)[:, 0]

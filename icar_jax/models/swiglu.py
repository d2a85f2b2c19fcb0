"""The gated feed-forward part of large vision towers (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, Linear

Array = jax.Array


class SwiGlu(Module):
    """fc2(silu(a) b), where a and b are the halves of fc1(x); x [B, L, W] -> [B, L, W], in place of `transformer.Mlp`."""

    def __init__(
        self, width: int, hidden: int, *, depth: int = 1, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        """`hidden`: channels of a and of b; `depth`: as of `transformer.Attention`."""
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = Linear(width, 2 * hidden, std=(2 * width) ** -0.5, **types)
        self.fc2 = Linear(hidden, width, std=(2 * depth * width) ** -0.5, **types)

    def __call__(self, x: Array) -> Array:
        gate, value = jnp.split(checkpoint_name(self.fc1(x), "mlp_hidden"), 2, axis=-1)
        return self.fc2(jax.nn.silu(gate) * value)

"""Statistics of filter responses, and the linear head that reads them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models.layers import DType, Linear

Array = jax.Array
PER_CHANNEL = 2  # statistics of one channel
_EPS = 1e-4  # of responses of order 1; keeps uniform images finite


def response_statistics(x: Array) -> Array:
    """Responses [B, H, W, C] -> float32 [B, 2 C]: for each channel the energy and the sparsity of its responses.

    Energy: log of their standard deviation. Sparsity: log of the ratio of their mean absolute deviation to it; textures have
    a high one, a few edges on a uniform ground a low one.
    """
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=(1, 2), keepdims=True)
    deviation = jnp.sqrt(jnp.square(centred).mean(axis=(1, 2)) + _EPS**2)
    spread = jnp.log(jnp.abs(centred).mean(axis=(1, 2)) + _EPS)
    return jnp.concatenate([jnp.log(deviation), spread - jnp.log(deviation)], axis=-1)


class LinearHead(nnx.Module):
    """Standardisation and a linear layer; features [B, F] -> logit [B, 1], float32. Ridge regression sets all parameters."""

    def __init__(
        self, width: int, *, dropout: float = 0.0, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        """`dropout` and `dtype` are ignored, for the signature of the other heads: the features are computed in float32."""
        self.mean = nnx.Param(jnp.zeros((width,), param_dtype))
        self.deviation = nnx.Param(jnp.ones((width,), param_dtype))
        self.fc = Linear(width, 1, std=0.02, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        x = x.astype(jnp.float32)
        return self.fc((x - self.mean[...][None]) / self.deviation[...][None]).astype(jnp.float32)

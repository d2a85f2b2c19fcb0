"""Attention whose scores have a bias for each key: masked padding, or the logarithm of the size of a merged token."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from icar_jax.models import fused_attention, ops
from icar_jax.models.autodiff import Derivatives, with_derivatives

Array = jax.Array
BIAS_CHANNELS = 8  # added to each head to carry a bias of the keys


def biased(q: Array, k: Array, v: Array, key_bias: Array) -> tuple[Array, Array, Array]:
    """q, k, v [B, L, H, K] and a bias of the keys [B, L] -> arrays [B, L, H, K + 8] whose attention has that bias.

    One more channel carries the bias, so that every attention function, fused kernels included, can have one; they take heads
    of a multiple of 8 channels. The first K channels of the result are the attention.
    """
    kept = q.shape[-1]
    wider = kept + BIAS_CHANNELS  # attention divides the scores by its square root
    spread = [(0, 0)] * 3 + [(0, BIAS_CHANNELS - 1)]
    shift = jnp.broadcast_to((wider**0.5 * key_bias)[:, :, None, None], (*k.shape[:-1], 1)).astype(k.dtype)
    q = jnp.concatenate([q * (wider / kept) ** 0.5, jnp.pad(jnp.ones((*q.shape[:-1], 1), q.dtype), spread)], axis=-1)
    k = jnp.concatenate([k, jnp.pad(shift, spread)], axis=-1)
    return q.astype(k.dtype), k, jnp.pad(v, [(0, 0)] * 3 + [(0, BIAS_CHANNELS)])


def attend_by_channels(attention: Callable[..., Array], q: Array, k: Array, v: Array, key_bias: Array, causal: bool) -> Array:
    """`attention` of q, k, v [B, L, H, K] with a bias of the keys float32 [B, L], by `biased`."""
    return attention(*biased(q, k, v, key_bias), causal=causal)[..., : v.shape[-1]]


def attend(attention: Callable[..., Array], q: Array, k: Array, v: Array, key_bias: Array, causal: bool) -> Array:
    """The same, with the bias added to the scores where `attention` is `ops.attention` in plain operations.

    That costs no more channels. No gradient flows to the bias.
    """
    key_bias = jax.lax.stop_gradient(key_bias)
    plain = attention is ops.xla_attention or (
        attention is ops.attention and fused_attention.cudnn_obstacle_here(*jax.eval_shape(biased, q, k, v, key_bias))
    )
    if not plain:
        return attend_by_channels(attention, q, k, v, key_bias, causal)
    out = _keyed(*(jnp.swapaxes(t, 1, 2) for t in (q, k, v)), key_bias.astype(jnp.float32), causal, q.dtype)
    return jnp.swapaxes(out, 1, 2)


def _forward(q: Array, k: Array, v: Array, bias: Array, causal: bool, dtype: ops.DType) -> ops.Saved:
    return ops.attention_forward(q, k, v, causal, dtype, bias)


def _backward(residuals: tuple[Array, ...], g: Array, causal: bool, dtype: ops.DType) -> tuple[Array, ...]:
    k = residuals[1]
    return *ops.attention_backward(residuals, g, causal, dtype), jnp.zeros((k.shape[0], k.shape[2]), jnp.float32)


def _tangent(residuals: tuple[Array, ...], tangents: tuple[Array | None, ...], causal: bool, dtype: ops.DType) -> Array:
    return ops.attention_tangent(residuals, tangents[:3], causal, dtype)


_keyed = with_derivatives(Derivatives(_forward, _tangent, _backward), arrays=4)

"""The arithmetic of the towers: matrix products, attention, depthwise convolution, normalisation, activations.

Pure functions of arrays, no modules. Every matrix product of a tower goes through `batched_dot` or `linear`: operands in the
compute dtype, accumulation in float32, in the forward and in the backward pass.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def _dot(lhs: Array, rhs: Array, dims, dtype) -> Array:
    """A dot_general on operands cast to `dtype`, accumulated and returned in float32."""
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    if dtype == jnp.float32:
        return lax.dot_general(lhs, rhs, dims, precision=lax.Precision.HIGHEST)
    dot = partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    return lax.platform_dependent(
        lhs, rhs, cpu=lambda a, b: lax.optimization_barrier(dot(*lax.optimization_barrier((a, b)))), default=dot
    )


def _transpose(x: Array, dtype) -> Array:
    """Swap the last two axes of `x`, cast to `dtype`, as an operand of `_dot`."""
    x = jnp.swapaxes(x.astype(dtype), -1, -2)
    if dtype == jnp.float32:
        return x
    split = x.reshape(*x.shape[:-1], 1, x.shape[-1])
    held = lax.platform_dependent(split, cpu=lax.optimization_barrier, default=lambda a: a)
    return held.reshape(x.shape)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def batched_dot(lhs: Array, rhs: Array, dtype) -> Array:
    """[..., M, K] x [..., K, N] -> [..., M, N] float32, operands cast to `dtype`, equal leading dimensions.

    The cotangent is cast to `dtype` before the backward dots; cotangents come back in the operands' own dtypes.
    """
    batch = tuple(range(lhs.ndim - 2))
    return _dot(lhs, rhs, (((lhs.ndim - 1,), (rhs.ndim - 2,)), (batch, batch)), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def batched_dot_t(lhs: Array, rhs: Array, dtype) -> Array:
    """[..., M, K] x [..., N, K] -> [..., M, N] float32: `batched_dot` with the right operand transposed."""
    batch = tuple(range(lhs.ndim - 2))
    return _dot(lhs, rhs, (((lhs.ndim - 1,), (rhs.ndim - 1,)), (batch, batch)), dtype)


def _batched_dot_bwd(dtype, operands, g):
    lhs, rhs = operands
    g = g.astype(dtype)
    d_lhs = batched_dot_t(g, rhs, dtype)
    d_rhs = batched_dot(_transpose(lhs, dtype), g, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


def _batched_dot_t_bwd(dtype, operands, g):
    lhs, rhs = operands
    g = g.astype(dtype)
    d_lhs = batched_dot(g, rhs, dtype)
    d_rhs = batched_dot(_transpose(g, dtype), lhs, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


batched_dot.defvjp(lambda lhs, rhs, dtype: (batched_dot(lhs, rhs, dtype), (lhs, rhs)), _batched_dot_bwd)
batched_dot_t.defvjp(lambda lhs, rhs, dtype: (batched_dot_t(lhs, rhs, dtype), (lhs, rhs)), _batched_dot_t_bwd)


def linear(x: Array, kernel: Array, bias: Array | None = None, *, dtype) -> Array:
    """x [..., in] @ kernel [in, out] (+ bias [out]) -> [..., out] in `dtype`; float32 master weights are cast inside."""
    y = batched_dot(x.reshape(-1, x.shape[-1]), kernel, dtype)
    if bias is not None:
        y = y + bias
    return y.astype(dtype).reshape(*x.shape[:-1], kernel.shape[-1])


def attention(q: Array, k: Array, v: Array, *, causal: bool = False, dtype) -> Array:
    """Scaled dot-product attention; q, k, v [B, L, H, K] -> [B, L, H, K] in `dtype`; softmax in float32."""
    q, k, v = (jnp.swapaxes(t, 1, 2) for t in (q, k, v))
    scores = batched_dot_t(q, k, dtype) * (q.shape[-1] ** -0.5)
    if causal:
        keep = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(keep, scores, -jnp.inf)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    out = batched_dot(weights, v, dtype) / weights.sum(-1, keepdims=True)
    return jnp.swapaxes(out.astype(dtype), 1, 2)


def depthwise_conv(x: Array, kernel: Array, bias: Array | None = None, *, dtype) -> Array:
    """Depthwise convolution, stride 1, "same" zero padding; x [B, H, W, C], kernel [7, 7, 1, C] -> [B, H, W, C] in `dtype`."""
    y = lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )
    return y if bias is None else y + bias.astype(dtype)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float, dtype=None) -> Array:
    """LayerNorm over the last axis, statistics in float32; returns `dtype` (default x.dtype)."""
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)
    return (y * scale + bias).astype(dtype or x.dtype)


def gelu_erf(x: Array) -> Array:
    """Exact GELU, x * Phi(x)."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Array) -> Array:
    """GELU's tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of the original CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)

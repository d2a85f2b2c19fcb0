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
_SQRT_HALF = 0.7071067811865476


def _row_major(x: Array) -> Array:
    """`x`, held in row-major order where a dot reads it (see `_dot`)."""
    split = x.reshape(*x.shape[:-1], 1, x.shape[-1])
    return lax.optimization_barrier(split).reshape(x.shape)


def _cpu_dot(lhs: Array, rhs: Array, dims) -> Array:
    dot = lax.dot_general(_row_major(lhs), _row_major(rhs), dims, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(dot)


def _dot(lhs: Array, rhs: Array, dims, dtype) -> Array:
    """A dot_general on operands cast to `dtype`, accumulated and returned in float32."""
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    if dtype == jnp.float32:
        return lax.dot_general(lhs, rhs, dims, precision=lax.Precision.HIGHEST)
    default = partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    return lax.platform_dependent(lhs, rhs, cpu=partial(_cpu_dot, dims=dims), default=default)


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


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
    d_rhs = batched_dot(_transpose(lhs.astype(dtype)), g, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


def _batched_dot_t_bwd(dtype, operands, g):
    lhs, rhs = operands
    g = g.astype(dtype)
    d_lhs = batched_dot(g, rhs, dtype)
    d_rhs = batched_dot(_transpose(g), lhs, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


batched_dot.defvjp(lambda lhs, rhs, dtype: (batched_dot(lhs, rhs, dtype), (lhs, rhs)), _batched_dot_bwd)
batched_dot_t.defvjp(lambda lhs, rhs, dtype: (batched_dot_t(lhs, rhs, dtype), (lhs, rhs)), _batched_dot_t_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x: Array, kernel: Array, bias: Array | None, dtype) -> Array:
    y = batched_dot(x, kernel, dtype)
    return (y if bias is None else y + bias).astype(dtype)


def _linear_fwd(x, kernel, bias, dtype):
    return _linear(x, kernel, bias, dtype), (x, kernel, bias)


def _linear_bwd(dtype, residuals, g):
    x, kernel, bias = residuals
    dx, d_kernel = _batched_dot_bwd(dtype, (x, kernel), g)
    return dx, d_kernel, None if bias is None else g.astype(jnp.float32).sum(0).astype(bias.dtype)


_linear.defvjp(_linear_fwd, _linear_bwd)


def linear(x: Array, kernel: Array, bias: Array | None = None, *, dtype) -> Array:
    """x [..., in] @ kernel [in, out] (+ bias [out]) -> [..., out] in `dtype`; float32 master weights are cast inside."""
    y = _linear(x.reshape(-1, x.shape[-1]), kernel, bias, dtype)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def _attend(q, k, v, causal, dtype):
    """q, k, v [B, H, L, K] -> output [B, H, L, K] in `dtype`, unnormalised weights [B, H, L, L] in `dtype`, their sums."""
    scores = batched_dot_t(q, k, dtype)
    if causal:
        keep = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(keep, scores, -jnp.inf)
    weights = jnp.exp((scores - scores.max(-1, keepdims=True)) * q.shape[-1] ** -0.5)
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(dtype)
    return (batched_dot(weights, v, dtype) / total).astype(dtype), weights, total


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, causal, dtype):
    return _attend(q, k, v, causal, dtype)[0]


def _attention_fwd(q, k, v, causal, dtype):
    out, weights, total = _attend(q, k, v, causal, dtype)
    return out, (q, k, v, weights, total, out)


def _attention_bwd(causal, dtype, residuals, g):
    # With p = weights / total: dv = p^T g, dp = g v^T, ds = p (dp - rowsum(p dp)), and rowsum(p dp) = rowsum(g out). Dividing g by
    # total once ([L, K]) spares dividing the weights ([L, L]).
    q, k, v, weights, total, out = residuals
    g = g.astype(jnp.float32) / total
    centre = (g * out.astype(jnp.float32)).sum(-1, keepdims=True)
    g = g.astype(dtype)
    dv = batched_dot(_transpose(weights), g, dtype)
    ds = weights * (batched_dot_t(g, v, dtype) - centre) * q.shape[-1] ** -0.5
    ds = ds.astype(dtype)
    dq = batched_dot(ds, k, dtype)
    dk = batched_dot(_transpose(ds), q, dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(q: Array, k: Array, v: Array, *, causal: bool = False, dtype) -> Array:
    """Scaled dot-product attention; q, k, v [B, L, H, K] -> [B, L, H, K] in `dtype`; softmax in float32."""
    out = _attention(*(jnp.swapaxes(t.astype(dtype), 1, 2) for t in (q, k, v)), causal, dtype)
    return jnp.swapaxes(out, 1, 2)


def depthwise_conv(x: Array, kernel: Array, bias: Array | None = None, *, dtype) -> Array:
    """Depthwise convolution, stride 1, "same" zero padding; x [B, H, W, C], kernel [7, 7, 1, C] -> [B, H, W, C] in `dtype`."""
    y = lax.conv_general_dilated(
        x.astype(dtype), kernel.astype(dtype), (1, 1), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
    )
    return y if bias is None else y + bias.astype(dtype)


def _normalise(x, mean, inv):
    return (x.astype(jnp.float32) - mean) * inv


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x, scale, bias, eps, dtype):
    return _layer_norm_fwd(x, scale, bias, eps, dtype)[0]


def _layer_norm_fwd(x, scale, bias, eps, dtype):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    inv = lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + eps)
    mean, inv = lax.optimization_barrier((mean, inv))
    return (_normalise(x, mean, inv) * scale + bias).astype(dtype), (x, scale, bias, mean, inv)


def _layer_norm_bwd(eps, dtype, residuals, g):
    x, scale, bias, mean, inv = residuals
    g = g.astype(jnp.float32)
    y = _normalise(x, mean, inv)
    rows = tuple(range(x.ndim - 1))
    d_scale, d_bias = (g * y).sum(rows), g.sum(rows)
    dy = g * scale
    a, b = lax.optimization_barrier((dy.mean(-1, keepdims=True), (dy * y).mean(-1, keepdims=True)))
    dx = (g * scale - a - _normalise(x, mean, inv) * b) * inv
    return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float, dtype=None) -> Array:
    """LayerNorm over the last axis, statistics in float32; returns `dtype` (default x.dtype)."""
    return _layer_norm(x, scale, bias, eps, jnp.dtype(dtype or x.dtype))


@jax.custom_vjp
def gelu_erf(x: Array) -> Array:
    """Exact GELU, x * Phi(x)."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + lax.erf(y * _SQRT_HALF))).astype(x.dtype)


def _gelu_erf_bwd(x, g):
    y = x.astype(jnp.float32)
    slope = 0.5 * (1 + lax.erf(y * _SQRT_HALF)) + y * jnp.exp(-0.5 * y * y) * 0.3989422804014327
    return ((slope * g).astype(x.dtype),)


gelu_erf.defvjp(lambda x: (gelu_erf(x), x), _gelu_erf_bwd)


def gelu_tanh(x: Array) -> Array:
    """GELU's tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of the original CLIP weights."""
    return x * jax.nn.sigmoid(1.702 * x)

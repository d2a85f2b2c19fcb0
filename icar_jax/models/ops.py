"""Operations of the towers as pure functions: matrix products, attention, normalisation, activations.

Every matrix product of a tower is a `dot` or `dot_t`: operands in the compute dtype, accumulation in float32, in forward and
backward pass. Backward passes are written by hand; all functions are differentiable in forward and reverse mode, any number of
times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from icar_jax.errors import ModelError
from icar_jax.models import fused_attention
from icar_jax.models.autodiff import Derivatives, present_sum, with_derivatives
from icar_jax.models.splash_attention import splash_kernel

Array = jax.Array
DType = Any
Arrays = tuple[Any, ...]
Saved = tuple[Array, Arrays]  # (result, residuals)


# --- matrix products -------------------------------------------------------------------------------------------------------


def _row_major(x: Array) -> Array:
    split = x.reshape(*x.shape[:-1], 1, x.shape[-1])
    return lax.optimization_barrier(split).reshape(x.shape)


def _cpu_dot(lhs: Array, rhs: Array, dims: Any) -> Array:
    """A bf16 x bf16 -> f32 dot in the only form that XLA's CPU backend runs on the matrix units.

    Two XLA rewrites must be prevented. An operand produced by a transpose has the transposed layout, and XLA then converts both
    operands to float32, which is several times slower; a reshape resets the layout. Later, XLA folds a transpose of an operand
    or of the result into the dot; that form has no bf16 kernel and fails at run time, so barriers prevent it.
    """
    out = lax.dot_general(_row_major(lhs), _row_major(rhs), dims, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(out)


def _dot_general(lhs: Array, rhs: Array, dims: Any, dtype: DType) -> Array:
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    if dtype == jnp.float32:
        return lax.dot_general(lhs, rhs, dims, precision=lax.Precision.HIGHEST)
    default = partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    return lax.platform_dependent(lhs, rhs, cpu=partial(_cpu_dot, dims=dims), default=default)


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def dot(lhs: Array, rhs: Array, dtype: DType) -> Array:
    """lhs [..., M, K], rhs [..., K, N] -> [..., M, N] float32; leading dimensions must be equal; operands are cast to `dtype`.

    In the backward pass the cotangent is cast to `dtype` and products accumulate in float32; plain autodiff would use float32
    operands. Gradients have the dtypes of the operands (float32 for float32 weights).
    """
    return _dot(lhs, rhs, jnp.dtype(dtype))


def dot_t(lhs: Array, rhs: Array, dtype: DType) -> Array:
    """lhs [..., M, K], rhs [..., N, K] -> [..., M, N] float32: `dot(lhs, rhs^T)` without the transpose."""
    return _dot_t(lhs, rhs, jnp.dtype(dtype))


def _dot_forward(lhs: Array, rhs: Array, dtype: DType) -> Saved:
    batch = tuple(range(lhs.ndim - 2))
    return _dot_general(lhs, rhs, (((lhs.ndim - 1,), (rhs.ndim - 2,)), (batch, batch)), dtype), (lhs, rhs)


def _dot_t_forward(lhs: Array, rhs: Array, dtype: DType) -> Saved:
    batch = tuple(range(lhs.ndim - 2))
    return _dot_general(lhs, rhs, (((lhs.ndim - 1,), (rhs.ndim - 1,)), (batch, batch)), dtype), (lhs, rhs)


def _dot_backward(operands: Arrays, g: Array, dtype: DType) -> Arrays:
    lhs, rhs = operands
    g = g.astype(dtype)
    d_lhs = dot_t(g, rhs, dtype)
    d_rhs = dot(_transpose(lhs.astype(dtype)), g, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


def _dot_t_backward(operands: Arrays, g: Array, dtype: DType) -> Arrays:
    lhs, rhs = operands
    g = g.astype(dtype)
    d_lhs = dot(g, rhs, dtype)
    d_rhs = dot(_transpose(g), lhs, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


def _product_rule(product: Callable[..., Array]) -> Callable[..., Array]:
    """The tangent of a bilinear `product(lhs, rhs, dtype)`."""

    def tangent(operands: Arrays, tangents: Arrays, dtype: DType) -> Array:
        (lhs, rhs), (d_lhs, d_rhs) = operands, tangents
        return present_sum(
            None if d_lhs is None else product(d_lhs, rhs, dtype), None if d_rhs is None else product(lhs, d_rhs, dtype)
        )

    return tangent


_dot = with_derivatives(Derivatives(_dot_forward, _product_rule(dot), _dot_backward), arrays=2)
_dot_t = with_derivatives(Derivatives(_dot_t_forward, _product_rule(dot_t), _dot_t_backward), arrays=2)


def linear(x: Array, kernel: Array, bias: Array | None = None, *, dtype: DType) -> Array:
    """x [..., in], kernel [in, out], bias [out] or None -> x @ kernel + bias [..., out] in `dtype`; weights are cast inside."""
    dtype = jnp.dtype(dtype)
    y = dot(x.astype(dtype).reshape(-1, x.shape[-1]), kernel, dtype)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None]
    return y.astype(dtype).reshape(*x.shape[:-1], kernel.shape[-1])


# --- attention -------------------------------------------------------------------------------------------------------------


def _attend(q: Array, k: Array, v: Array, causal: bool, dtype: DType, bias: Array | None = None) -> tuple[Array, Array, Array]:
    """q, k, v [B, H, L, K] -> output [B, H, L, K] and unnormalised weights [B, H, L, L] in `dtype`, their sums in float32.

    `bias` float32 [B, L] is added to the scaled scores of each key.

    Dividing by the sum after the second product touches [L, K] values instead of [L, L], and prevents XLA on CPU from fusing
    both products and the softmax into one slow kernel.
    """
    scores = dot_t(q, k, dtype)
    if bias is not None:
        scores = scores + (q.shape[-1] ** 0.5 * bias)[:, None, None]
    if causal:
        keep = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(keep, scores, -jnp.inf)
    weights = jnp.exp((scores - scores.max(-1, keepdims=True)) * q.shape[-1] ** -0.5)
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(dtype)
    return (dot(weights, v, dtype) / total).astype(dtype), weights, total


def attention_forward(q: Array, k: Array, v: Array, causal: bool, dtype: DType, bias: Array | None = None) -> Saved:
    """`_attend` and what `attention_backward` and `attention_tangent` need of it."""
    out, weights, total = _attend(q, k, v, causal, dtype, bias)
    return out, (q, k, v, weights, total, out)


def attention_backward(residuals: Arrays, g: Array, causal: bool, dtype: DType) -> Arrays:
    """Cotangents of q, k and v."""
    # With p = weights / total: dv = p^T g, dp = g v^T and ds = p (dp - rowsum(p dp)), where rowsum(p dp) = rowsum(g out).
    # g is divided by total once, so that the unnormalised weights serve as p.
    q, k, v, weights, total, out = residuals
    g = g.astype(jnp.float32) / total
    centre = (g * out.astype(jnp.float32)).sum(-1, keepdims=True)
    g = g.astype(dtype)
    dv = dot(_transpose(weights), g, dtype)
    ds = (weights * (dot_t(g, v, dtype) - centre) * q.shape[-1] ** -0.5).astype(dtype)
    dq = dot(ds, k, dtype)
    dk = dot(_transpose(ds), q, dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def attention_tangent(residuals: Arrays, tangents: Arrays, causal: bool, dtype: DType) -> Array:
    """Tangent of the output; `tangents` of q, k and v, None where constant."""
    # With p = weights / total and the scores' tangent ds: dp = p (ds - rowsum(p ds)); masked positions have p = 0.
    q, k, v, weights, total, _ = residuals
    dq, dk, dv = tangents
    p, out = weights.astype(jnp.float32) / total, None
    if dq is not None or dk is not None:
        ds = present_sum(None if dq is None else dot_t(dq, k, dtype), None if dk is None else dot_t(q, dk, dtype))
        ds = ds * q.shape[-1] ** -0.5
        out = dot(p * (ds - (p * ds).sum(-1, keepdims=True)), v, dtype)
    return present_sum(out, None if dv is None else dot(p, dv, dtype)).astype(dtype)


_attention = with_derivatives(Derivatives(attention_forward, attention_tangent, attention_backward), arrays=3)


def xla_attention(q: Array, k: Array, v: Array, *, causal: bool = False, dtype: DType = None) -> Array:
    """`attention` in plain operations, on every platform."""
    dtype = jnp.dtype(q.dtype if dtype is None else dtype)
    out = _attention(*(jnp.swapaxes(t.astype(dtype), 1, 2) for t in (q, k, v)), causal, dtype)
    return jnp.swapaxes(out, 1, 2)


def attention_formula(q: Array, k: Array, v: Array, causal: bool) -> Array:
    """`xla_attention` as a formula of `fused_attention`."""
    return xla_attention(q, k, v, causal=causal)


_cudnn_attention = fused_attention.fused(fused_attention.CUDNN, attention_formula)


_splash_attention = fused_attention.fused(splash_kernel(), attention_formula)


def cudnn_attention(q: Array, k: Array, v: Array, *, causal: bool = False, dtype: DType = None) -> Array:
    """`attention` by cuDNN's fused kernel; by `xla_attention` where q has another length than k and v, as in attention pools.

    Raises ModelError where cuDNN cannot be used, see `fused_attention.cudnn_obstacle`.
    """
    q, k, v = (t.astype(q.dtype if dtype is None else dtype) for t in (q, k, v))
    if q.shape != k.shape:
        return xla_attention(q, k, v, causal=causal)
    if obstacle := fused_attention.cudnn_obstacle_here(q, k, v):
        raise ModelError(f"cuDNN's attention cannot be used: {obstacle}; use icar_jax.models.ops.xla_attention")
    return _cudnn_attention(q, k, v, causal)


def splash_attention(q: Array, k: Array, v: Array, *, causal: bool = False, dtype: DType = None) -> Array:
    """`attention` by a fused kernel on TPU, also in encoding; by `xla_attention` on other platforms and in attention pools.

    For one chip, or inside `jax.shard_map`: XLA cannot split the kernel over a mesh.
    """
    q, k, v = (t.astype(q.dtype if dtype is None else dtype) for t in (q, k, v))
    return xla_attention(q, k, v, causal=causal) if q.shape != k.shape else _splash_attention(q, k, v, causal)


def attention(q: Array, k: Array, v: Array, *, causal: bool = False, dtype: DType = None) -> Array:
    """Scaled dot-product attention; q, k, v [B, L, H, K] -> [B, L, H, K] in `dtype` (None: q's); softmax in float32.

    `cudnn_attention` where this process has a GPU that can run it, else `xla_attention`. Either can be passed to a tower.
    """
    q, k, v = (t.astype(q.dtype if dtype is None else dtype) for t in (q, k, v))
    if fused_attention.cudnn_obstacle_here(q, k, v):
        return xla_attention(q, k, v, causal=causal)
    return _cudnn_attention(q, k, v, causal)


def stored(x: Array) -> Array:
    """Returns x unchanged; an optimization barrier on CPU, so that XLA computes x once and stores it.

    Without the barrier XLA on CPU recomputes cheap operations in each use. Other platforms gain from fusing them.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


# --- normalisation and activations -----------------------------------------------------------------------------------------


def along(vector: Array, x: Array) -> Array:
    """vector [D] -> [1, ..., 1, D] with the rank of x [..., D], explicit because of `jax.numpy_rank_promotion`."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def _normalise(x: Array, mean: Array, inverse: Array) -> Array:
    return (x.astype(jnp.float32) - mean) * inverse


def _layer_norm_forward(x: Array, scale: Array, bias: Array, eps: float, dtype: DType) -> Saved:
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + eps)
    # The barrier makes the backward pass recompute the normalised values; XLA would otherwise store them.
    mean, inverse = lax.optimization_barrier((mean, inverse))
    out = _normalise(x, mean, inverse) * along(scale, x) + along(bias, x)
    return out.astype(dtype), (x, scale, bias, mean, inverse)


def _layer_norm_backward(residuals: Arrays, g: Array, eps: float, dtype: DType) -> Arrays:
    x, scale, bias, mean, inverse = residuals
    g = g.astype(jnp.float32)
    y = _normalise(x, mean, inverse)
    rows = tuple(range(x.ndim - 1))
    d_scale, d_bias = (g * y).sum(rows), g.sum(rows)
    dy = g * along(scale, x)
    means = dy.mean(-1, keepdims=True), (dy * y).mean(-1, keepdims=True)
    shift, slope = lax.optimization_barrier(means)
    dx = (g * along(scale, x) - shift - _normalise(x, mean, inverse) * slope) * inverse
    return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


def _layer_norm_tangent(residuals: Arrays, tangents: Arrays, eps: float, dtype: DType) -> Array:
    (x, scale, _, mean, inverse), (dx, d_scale, d_bias) = residuals, tangents
    y, out = _normalise(x, mean, inverse), None
    if dx is not None:
        dx = dx.astype(jnp.float32)
        means = dx.mean(-1, keepdims=True), (dx * y).mean(-1, keepdims=True)
        out = (dx - means[0] - y * means[1]) * inverse * along(scale, x)
    of_scale = None if d_scale is None else y * along(d_scale, x)
    out = present_sum(out, of_scale, None if d_bias is None else jnp.broadcast_to(along(d_bias, x), y.shape))
    return out.astype(dtype)


_layer_norm = with_derivatives(Derivatives(_layer_norm_forward, _layer_norm_tangent, _layer_norm_backward), arrays=3)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float, dtype: DType = None) -> Array:
    """LayerNorm over the last axis: x [..., D], scale and bias [D] -> [..., D] in `dtype` (None: x's); float32 statistics."""
    return _layer_norm(x, scale, bias, eps, jnp.dtype(dtype or x.dtype))


def _recomputed(function: Callable[[Array], Array]) -> Callable[..., Array]:
    """Wraps an elementwise function: evaluated in float32, returned in x.dtype; only x is stored for the backward pass."""

    def forward(x: Array) -> Saved:
        return function(x.astype(jnp.float32)).astype(x.dtype), (x,)

    def backward(residuals: Arrays, g: Array) -> Arrays:
        (x,) = residuals
        x32 = lax.optimization_barrier(x).astype(jnp.float32)  # else XLA stores intermediates of the forward pass
        return (jax.vjp(function, x32)[1](g.astype(jnp.float32))[0].astype(x.dtype),)

    def tangent(residuals: Arrays, tangents: Arrays) -> Array:
        (x,), (dx,) = residuals, tangents
        return jax.jvp(function, (x.astype(jnp.float32),), (dx.astype(jnp.float32),))[1].astype(x.dtype)

    return with_derivatives(Derivatives(forward, tangent, backward), arrays=1)


_gelu_erf = _recomputed(lambda x: 0.5 * x * (1 + lax.erf(x * 0.5**0.5)))
_gelu_tanh = _recomputed(partial(jax.nn.gelu, approximate=True))
_quick_gelu = _recomputed(lambda x: x * jax.nn.sigmoid(1.702 * x))


def gelu_erf(x: Array) -> Array:
    """Returns the exact GELU, x * Phi(x), elementwise; computed in float32, shape and dtype of x."""
    return _gelu_erf(x)


def gelu_tanh(x: Array) -> Array:
    """Returns the tanh approximation of GELU, elementwise; computed in float32, shape and dtype of x."""
    return _gelu_tanh(x)


def quick_gelu(x: Array) -> Array:
    """Returns x * sigmoid(1.702 x), the activation of OpenAI's CLIP; computed in float32, shape and dtype of x."""
    return _quick_gelu(x)


def normalise(images: Array, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Array:
    """images uint8 [B, S, S, 3] -> float32 [B, S, S, 3], (x / 255 - mean) / std per channel."""
    shift, scale = (jnp.asarray(each, jnp.float32).reshape(1, 1, 1, 3) for each in (mean, std))
    return images.astype(jnp.float32) * (1 / (255 * scale)) - shift / scale


def require_floats(images: Array) -> None:
    """Raises TypeError if `images` are not floats: towers take normalised images."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be normalised floats, got {images.dtype}; icar_jax.models.ops.normalise(images, mean, std) takes "
            "uint8 pixels"
        )

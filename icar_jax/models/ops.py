"""The arithmetic of the towers: matrix products, attention, depthwise convolution, normalisation, activations.

Pure functions of arrays, no modules. Every matrix product of a tower is a `dot` or `dot_t`: operands in the compute dtype,
accumulation in float32, in the forward and in the backward pass. All functions differentiate in reverse mode only.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


# --- matrix products -------------------------------------------------------------------------------------------------------


def _row_major(x: Array) -> Array:
    split = x.reshape(*x.shape[:-1], 1, x.shape[-1])
    return lax.optimization_barrier(split).reshape(x.shape)


def _cpu_dot(lhs: Array, rhs: Array, dims) -> Array:
    """A bf16 x bf16 -> f32 dot in the one form that XLA's CPU backend runs on the matrix units.

    Two rewrites of XLA would undo it. An operand that comes out of a transpose carries the transposed layout, and XLA then
    converts both operands to float32, several times slower: a reshape resets the layout. Later, XLA folds a transpose of an
    operand or of the result into the dot, a form that has no bf16 kernel and fails at run time: the barriers prevent that.
    """
    out = lax.dot_general(_row_major(lhs), _row_major(rhs), dims, preferred_element_type=jnp.float32)
    return lax.optimization_barrier(out)


def _dot_general(lhs: Array, rhs: Array, dims, dtype) -> Array:
    lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    if dtype == jnp.float32:
        return lax.dot_general(lhs, rhs, dims, precision=lax.Precision.HIGHEST)
    default = partial(lax.dot_general, dimension_numbers=dims, preferred_element_type=jnp.float32)
    return lax.platform_dependent(lhs, rhs, cpu=partial(_cpu_dot, dims=dims), default=default)


def _transpose(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(lhs: Array, rhs: Array, dtype) -> Array:
    """[..., M, K] x [..., K, N] -> [..., M, N] float32; equal leading dimensions; operands are cast to `dtype`.

    The cotangent is cast to `dtype` before the backward dots, which accumulate in float32 too; plain autodiff would run them
    on float32 operands. Cotangents come back in the operands' own dtypes (float32 for float32 weights).
    """
    batch = tuple(range(lhs.ndim - 2))
    return _dot_general(lhs, rhs, (((lhs.ndim - 1,), (rhs.ndim - 2,)), (batch, batch)), dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot_t(lhs: Array, rhs: Array, dtype) -> Array:
    """[..., M, K] x [..., N, K] -> [..., M, N] float32: `dot` with a transposed right operand, without transposing it."""
    batch = tuple(range(lhs.ndim - 2))
    return _dot_general(lhs, rhs, (((lhs.ndim - 1,), (rhs.ndim - 1,)), (batch, batch)), dtype)


def _dot_bwd(dtype, operands, g):
    lhs, rhs = operands
    g = g.astype(dtype)
    d_lhs = dot_t(g, rhs, dtype)
    d_rhs = dot(_transpose(lhs.astype(dtype)), g, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


def _dot_t_bwd(dtype, operands, g):
    lhs, rhs = operands
    g = g.astype(dtype)
    d_lhs = dot(g, rhs, dtype)
    d_rhs = dot(_transpose(g), lhs, dtype)
    return d_lhs.astype(lhs.dtype), d_rhs.astype(rhs.dtype)


dot.defvjp(lambda lhs, rhs, dtype: (dot(lhs, rhs, dtype), (lhs, rhs)), _dot_bwd)
dot_t.defvjp(lambda lhs, rhs, dtype: (dot_t(lhs, rhs, dtype), (lhs, rhs)), _dot_t_bwd)


def linear(x: Array, kernel: Array, bias: Array | None = None, *, dtype) -> Array:
    """x [..., in] @ kernel [in, out] (+ bias [out]) -> [..., out] in `dtype`; float32 master weights are cast inside."""
    dtype = jnp.dtype(dtype)
    y = dot(x.astype(dtype).reshape(-1, x.shape[-1]), kernel, dtype)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(dtype).reshape(*x.shape[:-1], kernel.shape[-1])


# --- attention -------------------------------------------------------------------------------------------------------------


def _attend(q: Array, k: Array, v: Array, causal: bool, dtype) -> tuple[Array, Array, Array]:
    """q, k, v [B, H, L, K] -> output [B, H, L, K] and unnormalised weights [B, H, L, L] in `dtype`, their sums in float32.

    Dividing by the sum after the second product touches [L, K] values in place of [L, L], and keeps XLA on CPU from folding
    both products and the softmax into one slow kernel.
    """
    scores = dot_t(q, k, dtype)
    if causal:
        keep = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(keep, scores, -jnp.inf)
    weights = jnp.exp((scores - scores.max(-1, keepdims=True)) * q.shape[-1] ** -0.5)
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(dtype)
    return (dot(weights, v, dtype) / total).astype(dtype), weights, total


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(q, k, v, causal, dtype):
    return _attend(q, k, v, causal, dtype)[0]


def _attention_fwd(q, k, v, causal, dtype):
    out, weights, total = _attend(q, k, v, causal, dtype)
    return out, (q, k, v, weights, total, out)


def _attention_bwd(causal, dtype, residuals, g):
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


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention(q: Array, k: Array, v: Array, *, causal: bool = False, dtype) -> Array:
    """Scaled dot-product attention; q, k, v [B, L, H, K] -> [B, L, H, K] in `dtype`; softmax in float32."""
    dtype = jnp.dtype(dtype)
    out = _attention(*(jnp.swapaxes(t.astype(dtype), 1, 2) for t in (q, k, v)), causal, dtype)
    return jnp.swapaxes(out, 1, 2)


# --- depthwise convolution -------------------------------------------------------------------------------------------------

_UNROLL = 64  # positions of the cotangent a loop step of the CPU kernel gradient takes


def _conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1], precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )


def _pad_same(x: Array, kernel_shape, extra_h: int = 0, extra_w: int = 0) -> Array:
    rows, cols = kernel_shape[0] // 2, kernel_shape[1] // 2
    return jnp.pad(x, ((0, 0), (rows, rows + extra_h), (cols, cols + extra_w), (0, 0)))


def _shifted_sum(x: Array, kernel: Array) -> Array:
    """The convolution as one multiply-add a kernel tap: XLA's CPU backend has no fast depthwise convolution."""
    height, width = x.shape[1:3]
    padded = _pad_same(x, kernel.shape).astype(jnp.float32)
    taps = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    return sum(padded[:, i : i + height, j : j + width] * kernel[i, j, 0] for i, j in taps).astype(x.dtype)


def _kernel_gradient_conv(x: Array, kernel: Array, g: Array) -> Array:
    return jax.vjp(lambda k: _conv(x, k), kernel)[1](g)[0]


def _kernel_gradient_tiles(x: Array, kernel: Array, g: Array) -> Array:
    """The kernel gradient on CPU: a loop over small tiles of g that holds all accumulators, [rows, C] a kernel column.

    One reduction a tap would read x and g from memory once a tap.
    """
    rows, cols, _, channels = kernel.shape
    batch, height, width = g.shape[:3]
    tile_w = -(-width // -(-width // _UNROLL))
    tile_h = min(height, max(1, _UNROLL // tile_w))
    tiles_h, tiles_w = -(-height // tile_h), -(-width // tile_w)
    extra_h, extra_w = tiles_h * tile_h - height, tiles_w * tile_w - width
    x = _pad_same(x, kernel.shape, extra_h, extra_w)
    g = jnp.pad(g, ((0, 0), (0, extra_h), (0, extra_w), (0, 0)))

    def add_tile(sums, index):
        corner = (index // (tiles_h * tiles_w), index // tiles_w % tiles_h * tile_h, index % tiles_w * tile_w, 0)
        x_tile = lax.dynamic_slice(x, corner, (1, tile_h + rows - 1, tile_w + cols - 1, channels))[0].astype(jnp.float32)
        g_tile = lax.dynamic_slice(g, corner, (1, tile_h, tile_w, channels))[0].astype(jnp.float32)
        places = [(a, b) for a in range(tile_h) for b in range(tile_w)]
        sums = tuple(
            total + sum(x_tile[a : a + rows, b + j] * g_tile[a, b] for a, b in places) for j, total in enumerate(sums)
        )
        return sums, None

    zeros = tuple(jnp.zeros((rows, channels), jnp.float32) for _ in range(cols))
    sums, _ = lax.scan(add_tile, zeros, jnp.arange(batch * tiles_h * tiles_w))
    return jnp.stack(sums, axis=1)[:, :, None].astype(kernel.dtype)


@jax.custom_vjp
def _depthwise(x: Array, kernel: Array) -> Array:
    return lax.platform_dependent(x, kernel, cpu=_shifted_sum, default=_conv)


def _depthwise_bwd(residuals, g):
    x, kernel = residuals
    d_kernel = lax.platform_dependent(x, kernel, g, cpu=_kernel_gradient_tiles, default=_kernel_gradient_conv)
    return _depthwise(g, kernel[::-1, ::-1]), d_kernel


_depthwise.defvjp(lambda x, kernel: (_depthwise(x, kernel), (x, kernel)), _depthwise_bwd)


def depthwise_conv(x: Array, kernel: Array, bias: Array | None = None, *, dtype) -> Array:
    """Depthwise convolution, stride 1, "same" zero padding: x [B, H, W, C], kernel [h, w, 1, C] -> [B, H, W, C] in `dtype`.

    Raises:
      ValueError: the kernel is not [h, w, 1, C] with odd h and w and the channels of x.
    """
    if kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]) or not (kernel.shape[0] % 2 and kernel.shape[1] % 2):
        raise ValueError(
            f"depthwise_conv needs a kernel of shape [odd, odd, 1, {x.shape[-1]}] for x {x.shape}, got {kernel.shape}"
        )
    y = _depthwise(x.astype(dtype), kernel)
    return y if bias is None else (y.astype(jnp.float32) + bias).astype(dtype)


def stored(x: Array) -> Array:
    """x itself, which XLA on CPU then computes once and keeps.

    Between cheap operations it would rather compute x again in each use, or keep a part of it and x's own inputs. Other
    platforms fuse x into its neighbours, and gain by it.
    """
    return lax.platform_dependent(x, cpu=lax.optimization_barrier, default=lambda x: x)


# --- normalisation and activations -----------------------------------------------------------------------------------------


def _normalise(x: Array, mean: Array, inverse: Array) -> Array:
    return (x.astype(jnp.float32) - mean) * inverse


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(x, scale, bias, eps, dtype):
    return _layer_norm_fwd(x, scale, bias, eps, dtype)[0]


def _layer_norm_fwd(x, scale, bias, eps, dtype):
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    inverse = lax.rsqrt(jnp.square(y - mean).mean(-1, keepdims=True) + eps)
    # The barrier has the normalised values computed where they are used; XLA would otherwise store them.
    mean, inverse = lax.optimization_barrier((mean, inverse))
    return (_normalise(x, mean, inverse) * scale + bias).astype(dtype), (x, scale, bias, mean, inverse)


def _layer_norm_bwd(eps, dtype, residuals, g):
    x, scale, bias, mean, inverse = residuals
    g = g.astype(jnp.float32)
    y = _normalise(x, mean, inverse)
    rows = tuple(range(x.ndim - 1))
    d_scale, d_bias = (g * y).sum(rows), g.sum(rows)
    dy = g * scale
    means = dy.mean(-1, keepdims=True), (dy * y).mean(-1, keepdims=True)
    shift, slope = lax.optimization_barrier(means)
    dx = (g * scale - shift - _normalise(x, mean, inverse) * slope) * inverse
    return dx.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


_layer_norm.defvjp(_layer_norm_fwd, _layer_norm_bwd)


def layer_norm(x: Array, scale: Array, bias: Array, *, eps: float, dtype=None) -> Array:
    """LayerNorm over the last axis: x [..., D], scale and bias [D]; statistics in float32; returns `dtype` or x.dtype."""
    return _layer_norm(x, scale, bias, eps, jnp.dtype(dtype or x.dtype))


def _recomputed(function):
    """An elementwise function evaluated in float32 and returned in x.dtype, of which the backward pass stores x alone."""

    def call(x):
        return function(x.astype(jnp.float32)).astype(x.dtype)

    def backward(x, g):
        x32 = lax.optimization_barrier(x).astype(jnp.float32)  # or XLA would store intermediates of the forward pass
        return (jax.vjp(function, x32)[1](g.astype(jnp.float32))[0].astype(x.dtype),)

    activation = jax.custom_vjp(call)
    activation.defvjp(lambda x: (call(x), x), backward)
    return activation


_gelu_erf = _recomputed(lambda x: 0.5 * x * (1 + lax.erf(x * 0.5**0.5)))
_gelu_tanh = _recomputed(partial(jax.nn.gelu, approximate=True))
_quick_gelu = _recomputed(lambda x: x * jax.nn.sigmoid(1.702 * x))


def gelu_erf(x: Array) -> Array:
    """Exact GELU, x * Phi(x)."""
    return _gelu_erf(x)


def gelu_tanh(x: Array) -> Array:
    """GELU's tanh approximation."""
    return _gelu_tanh(x)


def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), the activation of the original CLIP weights."""
    return _quick_gelu(x)

"""Depthwise convolution; value and gradients use the form that is fastest on the platform."""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from icar_jax.models.autodiff import Derivatives, present_sum, with_derivatives
from icar_jax.models.ops import Array, Arrays, DType, Saved, along

_UNROLL = 64  # positions of the cotangent per loop step of the CPU kernel gradient


def _conv(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
    )


def _pad_same(x: Array, kernel_shape: tuple[int, ...], extra_h: int = 0, extra_w: int = 0) -> Array:
    rows, cols = kernel_shape[0] // 2, kernel_shape[1] // 2
    return jnp.pad(x, ((0, 0), (rows, rows + extra_h), (cols, cols + extra_w), (0, 0)))


def _shifted_sum(x: Array, kernel: Array) -> Array:
    """The convolution as one multiply-add per kernel tap, because XLA's CPU backend has no fast depthwise convolution."""
    height, width = x.shape[1:3]
    padded = _pad_same(x, kernel.shape).astype(jnp.float32)
    taps = [(i, j) for i in range(kernel.shape[0]) for j in range(kernel.shape[1])]
    summed = cast(Array, sum(padded[:, i : i + height, j : j + width] * along(kernel[i, j, 0], x) for i, j in taps))
    return summed.astype(x.dtype)


def _kernel_gradient_conv(x: Array, kernel: Array, g: Array) -> Array:
    return jax.vjp(lambda k: _conv(x, k), kernel)[1](g)[0]


def _kernel_gradient_tiles(x: Array, kernel: Array, g: Array) -> Array:
    """The kernel gradient on CPU: a loop over small tiles of g, with one accumulator [rows, C] per kernel column.

    One reduction per tap would instead read x and g from memory once per tap.
    """
    rows, cols, _, channels = kernel.shape
    batch, height, width = g.shape[:3]
    tile_w = -(-width // -(-width // _UNROLL))
    tile_h = min(height, max(1, _UNROLL // tile_w))
    tiles_h, tiles_w = -(-height // tile_h), -(-width // tile_w)
    extra_h, extra_w = tiles_h * tile_h - height, tiles_w * tile_w - width
    x = _pad_same(x, kernel.shape, extra_h, extra_w)
    g = jnp.pad(g, ((0, 0), (0, extra_h), (0, extra_w), (0, 0)))

    def add_tile(sums: tuple[Array, ...], index: Array) -> tuple[tuple[Array, ...], None]:
        corner = (index // (tiles_h * tiles_w), index // tiles_w % tiles_h * tile_h, index % tiles_w * tile_w, 0)
        x_tile = lax.dynamic_slice(x, corner, (1, tile_h + rows - 1, tile_w + cols - 1, channels))[0].astype(jnp.float32)
        g_tile = lax.dynamic_slice(g, corner, (1, tile_h, tile_w, channels))[0].astype(jnp.float32)
        places = [(a, b) for a in range(tile_h) for b in range(tile_w)]
        sums = tuple(
            total + sum(x_tile[a : a + rows, b + j] * g_tile[a, b][None] for a, b in places) for j, total in enumerate(sums)
        )
        return sums, None

    zeros = tuple(jnp.zeros((rows, channels), jnp.float32) for _ in range(cols))
    sums, _ = lax.scan(add_tile, zeros, jnp.arange(batch * tiles_h * tiles_w))
    return jnp.stack(sums, axis=1)[:, :, None].astype(kernel.dtype)


def _depthwise_forward(x: Array, kernel: Array) -> Saved:
    return lax.platform_dependent(x, kernel, cpu=_shifted_sum, default=_conv), (x, kernel)


def _depthwise_backward(residuals: Arrays, g: Array) -> Arrays:
    x, kernel = residuals
    d_kernel = lax.platform_dependent(x, kernel, g, cpu=_kernel_gradient_tiles, default=_kernel_gradient_conv)
    return _depthwise(g, kernel[::-1, ::-1]), d_kernel


def _depthwise_tangent(residuals: Arrays, tangents: Arrays) -> Array:
    (x, kernel), (dx, d_kernel) = residuals, tangents
    return present_sum(None if dx is None else _depthwise(dx, kernel), None if d_kernel is None else _depthwise(x, d_kernel))


_depthwise = with_derivatives(Derivatives(_depthwise_forward, _depthwise_tangent, _depthwise_backward), arrays=2)


def depthwise_conv(x: Array, kernel: Array, bias: Array | None = None, *, dtype: DType) -> Array:
    """Depthwise convolution, stride 1, "same" zero padding: x [B, H, W, C], kernel [h, w, 1, C] -> [B, H, W, C] in `dtype`.

    `bias` is [C] or None. Raises ValueError if the kernel is not [h, w, 1, C] with odd h and w and the channels of x.
    """
    if kernel.ndim != 4 or kernel.shape[2:] != (1, x.shape[-1]) or not (kernel.shape[0] % 2 and kernel.shape[1] % 2):
        raise ValueError(
            f"depthwise_conv needs a kernel of shape [odd, odd, 1, {x.shape[-1]}] for x {x.shape}, got {kernel.shape}"
        )
    y = _depthwise(x.astype(dtype), kernel)
    return y if bias is None else (y.astype(jnp.float32) + along(bias, y)).astype(dtype)

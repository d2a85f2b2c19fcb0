"""Layers of all towers: subclasses of Flax layers with the initialisation of CLIP and the arithmetic of `ops`.

They subclass `nnx.Linear`, `nnx.LayerNorm` and `nnx.Conv`, so LoRA, quantisation and filters work on them. If a setting was
changed (`dot_general`, `precision`, `strides`, ...), the layer falls back to Flax's computation. `dtype` is the dtype of the
result, None that of the input; parameters have `param_dtype` and are cast inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from icar_jax.models import ops
from icar_jax.models.depthwise import depthwise_conv

Array = jax.Array
DType = Any


def draw(rngs: nnx.Rngs, shape: tuple[int, ...], std: float, dtype: DType = jnp.float32) -> nnx.Param:
    """Returns a parameter of the given shape and dtype drawn from N(0, std^2)."""
    return nnx.Param(_normal(std)(rngs.params(), shape, dtype))


def _normal(std: float) -> Callable:
    return lambda key, shape, dtype: (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


class _OneKey:
    """A stream that returns the same key each time, because Flax draws one for the bias too and only the kernel is random."""

    def __init__(self, rngs: nnx.Rngs | None):
        self._key = None if rngs is None else rngs.params()

    def params(self) -> Array | None:
        return self._key


def _one_key(rngs: nnx.Rngs | None) -> nnx.Rngs:
    """`_OneKey` typed as nnx.Rngs."""
    return cast(nnx.Rngs, _OneKey(rngs))


def _plain(layer: Any) -> bool:
    """Whether the settings common to all layers are the defaults."""
    usual = layer.promote_dtype is promote_dtype and getattr(layer, "precision", None) is None
    return usual and getattr(layer, "preferred_element_type", None) is None


def _dtype(layer: Any, x: Array) -> DType:
    return x.dtype if layer.dtype is None else layer.dtype


def _usual_linear(layer: nnx.Linear) -> bool:
    return layer.dot_general is jax.lax.dot_general and _plain(layer)


def _usual_conv(layer: PatchConv | DepthwiseConv) -> bool:
    usual = layer.conv_general_dilated is jax.lax.conv_general_dilated and layer.mask is None
    return usual and _geometry(layer) == layer.built and _plain(layer)


def _geometry(layer: nnx.Conv) -> tuple:
    return layer.strides, layer.padding, layer.input_dilation, layer.kernel_dilation, layer.feature_group_count


class Linear(nnx.Linear):
    """x [..., n_in] -> [..., n_out]; kernel [n_in, n_out], optional bias [n_out], accumulated in float32."""

    def __init__(
        self, n_in: int, n_out: int, *, std: float, bias: bool = True, dtype: DType = None,
        param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(
            n_in, n_out, use_bias=bias, dtype=dtype, param_dtype=param_dtype, kernel_init=_normal(std), rngs=_one_key(rngs)
        )

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        if out_sharding is not None or not _usual_linear(self):
            return super().__call__(x, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        return ops.linear(x, self.kernel[...], bias, dtype=_dtype(self, x))


def columns(layer: nnx.Module, x: Array, start: int, stop: int | None) -> Array:
    """x [..., n_in] -> layer(x)[..., start:stop]; a plain `Linear` computes only these columns."""
    if type(layer) is not Linear or not _usual_linear(layer):
        return layer(x)[..., start:stop]
    bias = None if layer.bias is None else layer.bias[start:stop]
    return ops.linear(x, layer.kernel[:, start:stop], bias, dtype=_dtype(layer, x))


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis, x [..., D] -> [..., D]; statistics in float32, result in `dtype` (None: the input's)."""

    def __init__(self, width: int, eps: float, *, dtype: DType = None, param_dtype: DType = jnp.float32):
        super().__init__(width, epsilon=eps, dtype=dtype, param_dtype=param_dtype, rngs=_one_key(None))

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        axes = (self.reduction_axes, self.feature_axes, self.axis_name)
        if mask is not None or self.scale is None or self.bias is None or axes != (-1, -1, None) or not _plain(self):
            return super().__call__(x, mask=mask)
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.epsilon, dtype=self.dtype)


class PatchConv(nnx.Conv):
    """Convolution with stride equal to kernel size, computed as one matrix product; kernel [P, P, C_in, C_out].

    x [B, H, W, C_in] -> [B, H // P, W // P, C_out]; rows and columns beyond a multiple of P are dropped.
    """

    def __init__(
        self, patch: int, n_in: int, n_out: int, *, std: float, bias: bool, dtype: DType = None,
        param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        super().__init__(
            n_in, n_out, (patch, patch), (patch, patch), padding="VALID", use_bias=bias, dtype=dtype, param_dtype=param_dtype,
            kernel_init=_normal(std), rngs=_one_key(rngs),
        )  # fmt: skip
        self.built = _geometry(self)

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        if out_sharding is not None or not _usual_conv(self):
            return super().__call__(x, out_sharding)
        p, _, c, out = self.kernel[...].shape
        b, h, w = x.shape[0], x.shape[1] // p, x.shape[2] // p
        x = x[:, : h * p, : w * p].reshape(b, h, p, w, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, p * p * c)
        kernel = self.kernel[...].reshape(p * p * c, out)
        return ops.linear(x, kernel, None if self.bias is None else self.bias[...], dtype=_dtype(self, x))


class DepthwiseConv(nnx.Conv):
    """7x7 depthwise convolution, "same" zero padding; kernel [7, 7, 1, C], x [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, width: int, *, std: float, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        super().__init__(
            width, width, (7, 7), feature_group_count=width, dtype=dtype, param_dtype=param_dtype, kernel_init=_normal(std),
            rngs=_one_key(rngs),
        )  # fmt: skip
        self.built = _geometry(self)

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        if out_sharding is not None or self.bias is None or not _usual_conv(self):
            return super().__call__(x, out_sharding)
        return depthwise_conv(x, self.kernel[...], self.bias[...], dtype=_dtype(self, x))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": ops.gelu_erf,
    "gelu_tanh": ops.gelu_tanh,
    "quick_gelu": ops.quick_gelu,
}

"""ConvNeXt V1 and V2 (Liu et al. 2022, Woo et al. 2023), channels last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax import pytree
from icar_jax.models import ops
from icar_jax.models.layers import Bridge, DType, LayerNorm, Linear, PatchConv, normal, zeros

Array = jax.Array
EPS = 1e-6
INIT_STD = 0.02


@dataclass(frozen=True)
class ConvNeXtArch:
    """Blocks and channels of each of the four stages; version 2 has GRN, version 1 a layer scale."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    version: int = 2
    num_classes: int = 0  # 0 returns the pooled, normalised features

    def __post_init__(self):
        if self.version not in (1, 2) or len(self.depths) != 4 or len(self.dims) != 4:
            raise ValueError(f"ConvNeXt needs version 1 or 2 and four stages, found {self}")


class Grn(nnx.Module):
    """Global response normalisation; x [B, H, W, C] -> [B, H, W, C], statistics in float32 per image."""

    def __init__(self, width: int):
        self.gamma = zeros(width)
        self.beta = zeros(width)

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        energy = jnp.sum(jnp.square(y), axis=(1, 2), keepdims=True)
        # The gradient of sqrt at 0 is infinite; a channel that is zero everywhere must not poison the step.
        g = jnp.where(energy > 0, jnp.sqrt(jnp.where(energy > 0, energy, 1.0)), 0.0)
        n = g / (g.mean(axis=-1, keepdims=True) + 1e-6)
        return (y + self.beta[...] + self.gamma[...] * (y * n)).astype(x.dtype)


class ConvMlp(nnx.Module):
    def __init__(self, width: int, version: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, 4 * width, std=INIT_STD, rngs=rngs)
        self.grn = Grn(4 * width) if version == 2 else None
        self.fc2 = Linear(4 * width, width, std=INIT_STD, rngs=rngs)

    def __call__(self, x: Array, dtype: DType) -> Array:
        # XLA on CPU would keep half of the GELU, then finish it once for the norm of GRN and once more for its product.
        x = ops.stored(ops.gelu_erf(ops.stored(self.fc1(x, dtype))))
        return self.fc2(x if self.grn is None else ops.stored(self.grn(x)), dtype)


class ConvNeXtBlock(nnx.Module):
    """Depthwise 7x7, norm, MLP, (layer scale,) residual; x [B, H, W, C] keeps its shape."""

    def __init__(self, width: int, version: int, *, rngs: nnx.Rngs):
        self.conv_dw = DepthwiseConv(width, rngs=rngs)
        self.norm = LayerNorm(width, EPS)
        self.mlp = ConvMlp(width, version, rngs=rngs)
        self.gamma = nnx.Param(jnp.full((width,), 1e-6, jnp.float32)) if version == 1 else None

    def __call__(self, x: Array, dtype: DType) -> Array:
        y = self.mlp(self.norm(self.conv_dw(x, dtype)), dtype)
        return x + (y if self.gamma is None else y * self.gamma[...].astype(dtype))


class DepthwiseConv(nnx.Module):
    """7x7 depthwise convolution, kernel [7, 7, 1, C]."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (7, 7, 1, width), INIT_STD)
        self.bias = zeros(width)

    def __call__(self, x: Array, dtype: DType) -> Array:
        return ops.depthwise_conv(x, self.kernel[...], self.bias[...], dtype=dtype)


class Downsample(nnx.Module):
    """Norm, then 2x2 convolution with stride 2; an odd last row or column is dropped."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(n_in, EPS)
        self.conv = PatchConv(2, n_in, n_out, std=INIT_STD, bias=True, rngs=rngs)

    def __call__(self, x: Array, dtype: DType) -> Array:
        return self.conv(self.norm(x), dtype)


class Stage(nnx.Module):
    def __init__(self, n_in: int, n_out: int, depth: int, version: int, first: bool, *, rngs: nnx.Rngs):
        self.downsample = None if first else Downsample(n_in, n_out, rngs=rngs)
        self.blocks = nnx.List([ConvNeXtBlock(n_out, version, rngs=rngs) for _ in range(depth)])

    def __call__(self, x: Array, dtype: DType) -> Array:
        if self.downsample is not None:
            x = self.downsample(x, dtype)
        for block in self.blocks:
            x = block(x, dtype)
        return x


class Stem(nnx.Module):
    """4x4 convolution with stride 4, then norm."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = PatchConv(4, 3, width, std=INIT_STD, bias=True, rngs=rngs)
        self.norm = LayerNorm(width, EPS)

    def __call__(self, x: Array, dtype: DType) -> Array:
        return self.norm(self.conv(x, dtype))


class Head(nnx.Module):
    """Average pool, norm, optional classifier; x [B, H, W, C] -> [B, C] or [B, classes], float32."""

    def __init__(self, width: int, num_classes: int, *, rngs: nnx.Rngs):
        self.norm = LayerNorm(width, EPS)
        self.fc = Linear(width, num_classes, std=INIT_STD, rngs=rngs) if num_classes else None

    def __call__(self, x: Array, dtype: DType) -> Array:
        x = self.norm(x.astype(jnp.float32).mean(axis=(1, 2)))
        return x if self.fc is None else self.fc(x, dtype).astype(jnp.float32)


class ConvNeXt(nnx.Module):
    """images [B, H, W, 3], normalised -> pooled features [B, C] or logits [B, classes], float32."""

    def __init__(self, arch: ConvNeXtArch, *, rngs: nnx.Rngs):
        dims = arch.dims
        self.stem = Stem(dims[0], rngs=rngs)
        self.stages = nnx.List(
            [
                Stage(dims[max(i - 1, 0)], dims[i], arch.depths[i], arch.version, i == 0, rngs=rngs)
                for i in range(4)
            ]
        )
        self.head = Head(dims[3], arch.num_classes, rngs=rngs)

    def __call__(self, images: Array, dtype: DType) -> Array:
        return self.from_feature_map(self.feature_map(images, len(self.stages), dtype), len(self.stages), dtype)

    def feature_map(self, images: Array, stage: int, dtype: DType) -> Array:
        """images [B, H, W, 3], normalised -> what stage 1 to 4 hands on, [B, H / s, W / s, C] with s = 2 ** (stage + 1)."""
        x = self.stem(images.astype(dtype), dtype)
        for part in self.stages[:stage]:
            x = part(x, dtype)
        return x

    def from_feature_map(self, x: Array, stage: int, dtype: DType) -> Array:
        """The rest of the network on the feature map of a stage; the two together are `__call__`."""
        for part in self.stages[stage:]:
            x = part(x, dtype)
        return self.head(x, dtype)


@dataclass(frozen=True)
class Classifier:
    """Pure functions of one ConvNeXt; also its backbone alone, where it has no classes."""

    arch: ConvNeXtArch

    @cached_property
    def _bridge(self) -> Bridge:
        return Bridge(lambda rngs: ConvNeXt(self.arch, rngs=rngs))

    def shapes(self) -> pytree.Tree:
        """Parameter shapes without allocating them."""
        return self._bridge.shapes()

    def init(self, key: Array) -> pytree.Tree:
        return self._bridge.init(key)

    def apply(self, params: Mapping[str, Any], images: Array, dtype: DType = jnp.float32) -> Array:
        """images float [B, H, W, 3], normalised -> logits [B, classes], or pooled features [B, C], float32."""
        return self._bridge.bind(params)(images, dtype)

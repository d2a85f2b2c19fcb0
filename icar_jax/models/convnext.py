"""ConvNeXt V1 and V2 (Liu et al. 2022, Woo et al. 2023), channels last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.errors import ModelError
from icar_jax.models import ops
from icar_jax.models.functional import Module
from icar_jax.models.layers import DepthwiseConv, DType, LayerNorm, Linear, PatchConv
from icar_jax.models.ops import require_floats
from icar_jax.models.sizes import size_error
from icar_jax.models.statistics import PER_CHANNEL, response_statistics

Array = jax.Array
EPS = 1e-6
INIT_STD = 0.02


@dataclass(frozen=True)
class ConvNeXtArch:
    """Blocks (`depths`) and channels (`dims`) of the four stages; version 2 uses GRN, version 1 a layer scale."""

    depths: tuple[int, int, int, int]
    dims: tuple[int, int, int, int]
    version: int = 2
    num_classes: int = 0  # 0 returns the pooled, normalised features

    def __post_init__(self) -> None:
        if self.version not in (1, 2) or len(self.depths) != 4 or len(self.dims) != 4:
            raise ModelError(f"ConvNeXt needs version 1 or 2 and four stages, got {self}")
        if wrong := size_error(self):
            raise ModelError(f"ConvNeXt: {wrong}")

    @property
    def statistics(self) -> int:
        """Number of statistics that `ConvNeXt.statistics` returns for an image."""
        return PER_CHANNEL * sum(depth * width for depth, width in zip(self.depths, self.dims))


class Grn(nnx.Module):
    """Global response normalisation (Woo et al. 2023); x [B, H, W, C] -> [B, H, W, C], computed per image in float32."""

    def __init__(self, width: int, *, param_dtype: DType = jnp.float32):
        self.gamma = nnx.Param(jnp.zeros((width,), param_dtype))
        self.beta = nnx.Param(jnp.zeros((width,), param_dtype))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        energy = jnp.sum(jnp.square(y), axis=(1, 2), keepdims=True)
        # The gradient of sqrt at 0 is infinite; a channel of zeros must not produce NaN gradients.
        g = jnp.where(energy > 0, jnp.sqrt(jnp.where(energy > 0, energy, 1.0)), 0.0)
        n = g / (g.mean(axis=-1, keepdims=True) + 1e-6)
        gamma, beta = (each[...][None, None, None] for each in (self.gamma, self.beta))
        return (y + beta + gamma * (y * n)).astype(x.dtype)


class ConvMlp(nnx.Module):
    """Linear, GELU, GRN (version 2 only), linear, with 4 C hidden channels; x [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, width: int, version: int, *, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = ops.gelu_erf
        self.fc1 = Linear(width, 4 * width, std=INIT_STD, **types)
        self.grn = nnx.data(Grn(4 * width, param_dtype=param_dtype) if version == 2 else None)
        self.fc2 = Linear(4 * width, width, std=INIT_STD, **types)

    def __call__(self, x: Array) -> Array:
        # Without `stored`, XLA on CPU computes part of the GELU twice: for the norm of GRN and for its product.
        x = ops.stored(self.activation(ops.stored(self.fc1(x))))
        return self.fc2(x if self.grn is None else ops.stored(self.grn(x)))


class ConvNeXtBlock(nnx.Module):
    """Depthwise 7x7 convolution, norm, MLP, layer scale (version 1 only), residual; x [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, width: int, version: int, *, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv_dw = DepthwiseConv(width, std=INIT_STD, **types)
        self.norm = LayerNorm(width, EPS, param_dtype=param_dtype)
        self.mlp = ConvMlp(width, version, **types)
        self.gamma = nnx.Param(jnp.full((width,), 1e-6, param_dtype)) if version == 1 else None

    def __call__(self, x: Array) -> Array:
        return self.after_filters(x, self.conv_dw(x))

    def after_filters(self, x: Array, response: Array) -> Array:
        """Returns the block's output for its input and the response of its depthwise convolution to it."""
        y = self.mlp(self.norm(response))
        return x + (y if self.gamma is None else y * self.gamma[...].astype(y.dtype)[None, None, None])


class Downsample(nnx.Module):
    """Norm, then 2x2 convolution with stride 2; x [B, H, W, n_in] -> [B, H // 2, W // 2, n_out].

    An odd last row or column is dropped.
    """

    def __init__(self, n_in: int, n_out: int, *, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.norm = LayerNorm(n_in, EPS, param_dtype=param_dtype)
        self.conv = PatchConv(2, n_in, n_out, std=INIT_STD, bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(self.norm(x))


class Stage(nnx.Module):
    """A `Downsample`, except in the first stage, and `depth` blocks.

    x [B, H, W, n_in] -> [B, H // 2, W // 2, n_out]; the first stage keeps [B, H, W, n_out] and needs n_in = n_out.
    """

    def __init__(self, n_in: int, n_out: int, depth: int, version: int, first: bool, **types: Any):
        self.downsample = None if first else Downsample(n_in, n_out, **types)
        self.blocks = nnx.List([ConvNeXtBlock(n_out, version, **types) for _ in range(depth)])

    def __call__(self, x: Array) -> Array:
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class Stem(nnx.Module):
    """4x4 convolution with stride 4, then norm; x [B, H, W, 3] -> [B, H // 4, W // 4, C] with C = `width`."""

    def __init__(self, width: int, *, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.conv = PatchConv(4, 3, width, std=INIT_STD, bias=True, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm = LayerNorm(width, EPS, param_dtype=param_dtype)

    def __call__(self, x: Array) -> Array:
        return self.norm(self.conv(x))


class Head(nnx.Module):
    """Average pool, norm, optional classifier; x [B, H, W, C] -> features [B, C] or logits [B, classes], float32."""

    def __init__(self, width: int, num_classes: int, *, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        types = {"dtype": dtype, "param_dtype": param_dtype}
        self.norm = LayerNorm(width, EPS, param_dtype=param_dtype)
        self.fc = Linear(width, num_classes, std=INIT_STD, **types, rngs=rngs) if num_classes else None

    def __call__(self, x: Array) -> Array:
        x = self.norm(x.astype(jnp.float32).mean(axis=(1, 2)))
        return x if self.fc is None else self.fc(x).astype(jnp.float32)


class ConvNeXt(Module):
    """images float [B, H, W, 3], normalised -> pooled features [B, C] or logits [B, classes], float32.

    Args:
        arch: architecture.
        dtype: dtype of activations; parameters are cast to it in each layer.
        param_dtype: dtype of parameters.
        rngs: random keys for initialisation.
    """

    def __init__(self, arch: ConvNeXtArch, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        dims, types = arch.dims, {"dtype": jnp.dtype(dtype), "param_dtype": param_dtype, "rngs": rngs}
        self.arch, self.dtype = arch, jnp.dtype(dtype)
        self.stem = Stem(dims[0], **types)
        self.stages = nnx.List(
            [Stage(dims[max(i - 1, 0)], dims[i], arch.depths[i], arch.version, i == 0, **types) for i in range(4)]
        )
        self.head = Head(dims[3], arch.num_classes, **types)

    def __call__(self, images: Array) -> Array:
        return self.head(self._features(images, len(self.stages)))

    def feature_map(self, images: Array, stage: int) -> Array:
        """images float [B, H, W, 3], normalised -> output of a stage, [B, H // s, W // s, C] with s = 2 ** (stage + 1).

        `stage` is 1 to 4; C = arch.dims[stage - 1]; the dtype is the compute dtype. Raises ValueError for other shapes or sizes
        below 32 pixels, and TypeError for integers.
        """
        return self._features(images, stage)

    def _features(self, images: Array, stage: int) -> Array:
        if images.ndim != 4 or images.shape[3] != 3 or min(images.shape[1:3]) < 32:
            raise ValueError(
                f"images must be [batch, height, width, 3], channels last, of at least 32 pixels; got {list(images.shape)}"
            )
        require_floats(images)
        x = self.stem(images.astype(self.dtype))
        for part in self.stages[:stage]:
            x = part(x)
        return x

    def stem_map(self, images: Array) -> Array:
        """images float [B, H, W, 3], normalised -> output of the stem [B, H // 4, W // 4, arch.dims[0]]; as `feature_map`."""
        return self._features(images, 0)

    def statistics(self, x: Array) -> Array:
        """x, output of `stem_map` -> float32 [B, arch.statistics]: statistics of the response of each depthwise convolution."""
        found = []
        for stage in self.stages:
            x = x if stage.downsample is None else stage.downsample(x)
            for block in stage.blocks:
                response = block.conv_dw(x)
                found.append(response_statistics(response))
                x = block.after_filters(x, response)
        return jnp.concatenate(found, axis=-1)

    def from_feature_map(self, x: Array, stage: int) -> Array:
        """x [B, h, w, C], output of `feature_map(images, stage)` -> features [B, arch.dims[3]] or logits [B, classes], float32.

        Runs the stages after `stage` and the head: from_feature_map(feature_map(images, stage), stage) equals __call__(images).
        """
        for part in self.stages[stage:]:
            x = part(x)
        return self.head(x)

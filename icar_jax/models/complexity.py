"""ConvNeXt-IC: predicts the complexity of an image as a score in [0, 1].

Two heads: a classifier whose score is the probability of the class 'complex' (ICAR's router), and a regression of human
ratings (IC9600). Both start with a LayerNorm in addition to that of the backbone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.errors import ModelError
from icar_jax.models.convnext import INIT_STD, ConvNeXt, ConvNeXtArch
from icar_jax.models.filters import filter_start
from icar_jax.models.functional import Module, Params
from icar_jax.models.layers import DType, LayerNorm, Linear
from icar_jax.models.sizes import size_error
from icar_jax.models.statistics import LinearHead

Array = jax.Array
Drop = Callable[[Array, int], Array]  # (x, layer) -> x with some of its values zeroed
HEADS = ("classification", "regression")
MAP_STAGES = (2, 3, 4)  # strides 8, 16, 32; stage 1 responds to edges, not objects
MAP_STAGE = 2  # localises the objects of scenes best, see benchmarks/explain.py


@dataclass(frozen=True)
class ComplexityArch:
    """A ConvNeXt backbone without classifier, the head ('classification' | 'regression'), and the image size in pixels."""

    backbone: ConvNeXtArch
    head: str
    image_size: int
    dropout: float = 0.2  # regression head only, while training
    pool: str = "mean"  # mean: of the last stage | statistics: of the filter responses of all layers (ConvNeXt.statistics)
    readout: str = "mlp"  # regression head: mlp (RegressionHead) | linear (LinearHead)

    def __post_init__(self) -> None:
        require_head(self.head, self.readout)
        if self.pool not in ("mean", "statistics"):
            raise ModelError(f"pool {self.pool!r} must be 'mean' or 'statistics'")
        if self.backbone.num_classes:
            raise ModelError(f"the backbone of a complexity model needs num_classes=0, got {self.backbone.num_classes}")
        if wrong := size_error(self):
            raise ModelError(f"complexity model: {wrong}")
        if self.image_size < 32:
            raise ModelError(f"image size {self.image_size} is below 32 pixels, the backbone's total stride")

    @property
    def features(self) -> int:
        """Width of the features that the head reads."""
        return self.backbone.dims[3] if self.pool == "mean" else self.backbone.statistics


class ClassificationHead(nnx.Module):
    """LayerNorm and a linear layer; features [B, C] -> logits (simple, complex) [B, 2], float32."""

    def __init__(
        self, width: int, *, dropout: float = 0.0, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        """`dropout` is ignored; it exists for the same signature as `RegressionHead`."""
        self.norm = LayerNorm(width, 1e-5, param_dtype=param_dtype)
        self.fc = Linear(width, 2, std=INIT_STD, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        return self.fc(self.norm(x)).astype(jnp.float32)


class RegressionHead(nnx.Module):
    """LayerNorm -> 512 -> ReLU -> 256 -> ReLU -> 1; features [B, C] -> logit [B, 1], float32.

    Dropout after each ReLU if a `dropout_key` is given.
    """

    def __init__(
        self, width: int, *, dropout: float = 0.0, dtype: DType = None, param_dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        self.dropout = dropout
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.norm = LayerNorm(width, 1e-5, param_dtype=param_dtype)
        self.fc1 = Linear(width, 512, std=width**-0.5, **types)
        self.fc2 = Linear(512, 256, std=512**-0.5, **types)
        self.fc3 = Linear(256, 1, std=256**-0.5, **types)

    def __call__(self, x: Array, dropout_key: Array | None = None) -> Array:
        drop = dropout(self.dropout, dropout_key)
        x = drop(jax.nn.relu(self.fc1(self.norm(x))), 0)
        x = drop(jax.nn.relu(self.fc2(x)), 1)
        return self.fc3(x).astype(jnp.float32)


READOUTS: dict[str, type[RegressionHead | LinearHead]] = {"mlp": RegressionHead, "linear": LinearHead}


def require_head(head: str, readout: str) -> None:
    """Raises ModelError for an unknown head or readout, or a classifier with another readout than its own."""
    if head not in HEADS:
        raise ModelError(f"complexity head {head!r} must be one of {HEADS}")
    if readout not in READOUTS or (head != "regression" and readout != "mlp"):
        raise ModelError(f"readout {readout!r} must be one of {tuple(READOUTS)}, and 'mlp' unless the head is 'regression'")


def head_module(head: str, readout: str) -> type[ClassificationHead | RegressionHead | LinearHead]:
    """Returns the module class of a head."""
    return ClassificationHead if head == "classification" else READOUTS[readout]


def dropout(rate: float, key: Array | None) -> Drop:
    """Returns drop(x, layer), inverted dropout with probability `rate`; the identity if `key` is None."""

    def drop(x: Array, layer: int) -> Array:
        if key is None or rate == 0:
            return x
        keep = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, x.shape)
        return jnp.where(keep, x / (1 - rate), 0)

    return drop


def log_odds(logits: Array, head: str) -> Array:
    """logits [B, 2] (classification) or [B, 1] (regression) -> log odds of 'complex' [B]; the score is their sigmoid."""
    return logits[:, 1] - logits[:, 0] if head == "classification" else logits[:, 0]


def activation_map(function: Callable[[Array], Array], features: Array) -> tuple[Array, Array]:
    """features [B, h, w, C] -> (function(features) [B], class-activation map [B, h, w] float32).

    The map is the sum over channels of the features times the gradient of the output with respect to the pooled features
    (Grad-CAM, Selvaraju et al. 2017, without its ReLU). If `function` is linear in the average pool, it is the map of Zhou et
    al. 2016, and its mean over positions is the output without the bias.
    """
    values, pull_back = jax.vjp(function, features)
    (gradient,) = pull_back(jnp.ones_like(values))
    # Average pooling divides by the number of positions, so their sum is the gradient with respect to the pooled features.
    weights = gradient.astype(jnp.float32).sum(axis=(1, 2))
    return values, jnp.einsum("bhwc,bc->bhw", features.astype(jnp.float32), weights)


class ComplexityModel(Module):
    """A ConvNeXt and a head; images float [B, S, S, 3], normalised -> complexity [B] in [0, 1], float32.

    Args:
        arch: architecture.
        dtype: dtype of activations; parameters are cast to it in each layer.
        param_dtype: dtype of parameters.
        rngs: random keys for initialisation.
    """

    def __init__(self, arch: ComplexityArch, *, dtype: DType = jnp.float32, param_dtype: DType = jnp.float32, rngs: nnx.Rngs):
        types = {"dtype": jnp.dtype(dtype), "param_dtype": param_dtype, "rngs": rngs}
        self.arch = arch
        self.backbone = ConvNeXt(arch.backbone, **types)
        self.head = head_module(arch.head, arch.readout)(arch.features, dropout=arch.dropout, **types)

    def __call__(self, images: Array) -> Array:
        return self.score(images)

    def logits(self, images: Array, dropout_key: Array | None = None) -> Array:
        """images float [B, S, S, 3], normalised -> logits [B, 2] (classification) or [B, 1] (regression), float32.

        `dropout_key` enables dropout in the regression head; None disables it.
        """
        return self.head(self.pooled(images), dropout_key)

    def pooled(self, images: Array) -> Array:
        """images float [B, S, S, 3], normalised -> the features that the head reads, float32 [B, arch.features]."""
        if self.arch.pool == "mean":
            return self.backbone(images)
        return self.backbone.statistics(self.backbone.stem_map(images))

    @classmethod
    def init(cls, key: Array, arch: ComplexityArch, **kwargs: Any) -> Params:
        """Random parameters; for pool 'statistics' with the filters of `filters.filter_start`."""
        params = super().init(key, arch, **kwargs)
        if arch.pool == "mean":
            return params
        return {**params, "backbone": filter_start(params["backbone"], arch.backbone, jax.random.fold_in(key, 1))}

    def score(self, images: Array) -> Array:
        """images float [B, S, S, 3], normalised -> complexity [B] in [0, 1], float32; higher is more complex."""
        return jax.nn.sigmoid(log_odds(self.logits(images), self.arch.head))

    def score_and_map(self, images: Array, stage: int = MAP_STAGE) -> tuple[Array, Array]:
        """Returns the score and the class-activation map of the log odds of 'complex'.

        images float [B, S, S, 3], normalised -> (complexity [B], as `score`; map [B, h, w], float32), with h = w = S // stride
        and stride 8, 16, 32 after stage 2, 3, 4. Positive values raise the score, negative values lower it; the mean of a map
        is its contribution to the log odds to first order. The two LayerNorms before the head are invariant to a common scale
        of all channels, so after stage 4 the mean is close to 0 and the map is relative to the rest of the same image.
        With pool 'statistics' every layer is read: each cell sums the contributions of the stem's output there, and `stage`
        only sets the size of the cells.
        Raises ModelError if `stage` is not in MAP_STAGES.
        """
        if stage not in MAP_STAGES:
            raise ModelError(f"a map can be taken after stage {', '.join(map(str, MAP_STAGES))}, not {stage}")
        if self.arch.pool == "statistics":
            return self._contributions(images, stage)
        features = self.backbone.feature_map(images, stage)

        def logit(features: Array) -> Array:
            pooled = self.backbone.from_feature_map(features, stage)
            return log_odds(self.head(pooled), self.arch.head)

        logits, activation = activation_map(logit, features)
        return jax.nn.sigmoid(logits), activation

    def _contributions(self, images: Array, stage: int) -> tuple[Array, Array]:
        stem = self.backbone.stem_map(images)
        odds, pull_back = jax.vjp(lambda x: log_odds(self.head(self.backbone.statistics(x)), self.arch.head), stem)
        (gradient,) = pull_back(jnp.ones_like(odds))
        each = jnp.sum(stem.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1)
        side, step = self.arch.image_size // 2 ** (stage + 1), 2 ** (stage - 1)
        cells = each[:, : side * step, : side * step].reshape(-1, side, step, side, step).mean(axis=(2, 4))
        return jax.nn.sigmoid(odds), cells * each[0].size

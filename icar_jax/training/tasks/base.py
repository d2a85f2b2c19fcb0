"""A task: the model that a run trains, its loss on a batch, and how the finished checkpoint describes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from icar_jax import pytree
from icar_jax.config import ExperimentConfig
from icar_jax.data import images
from icar_jax.data.images import Preprocess

Metrics = dict[str, jax.Array]
Frozen = Mapping[str, Any]
NORMALISE = {
    "half": (images.HALF_MEAN, images.HALF_STD),
    "openai": (images.OPENAI_MEAN, images.OPENAI_STD),
    "imagenet": (images.IMAGENET_MEAN, images.IMAGENET_STD),
}
NOTHING: Frozen = {}


@dataclass(frozen=True)
class Task:
    """A model to train. The loop is the same for every task.

    A loss is a pure function (params, batch, key, frozen) -> (loss, metrics). `frozen` holds arrays that do not learn, such as
    the parameters of a teacher: an argument of the step, placed on the mesh once, with the entries and shapes of `Task.frozen`.

    Attributes:
        arch: ClipArch, ComplexityArch or BlocksArch.
        kind: 'clip' or 'complexity', the kind of the finished checkpoint.
        shapes: of the parameters.
        init: key -> random parameters.
        embed, contrast, draw: the same loss in parts, for gradient accumulation. draw(batch, key, frozen) -> the batch with
            everything that is drawn or computed once for each of its rows; embed(params, batch) -> embeddings with one row a
            pair; contrast(params, embeddings, key) -> (loss, metrics). None where a loss does not compare pairs.
        preprocess: how images are prepared; others: how they are prepared a second time, {entry of the batch: Preprocess}.
        context_length: tokens of a caption; 0 where captions are not read.
        fields: entries of the batch that travel to the device.
        description: of the finished checkpoint.
    """

    arch: Any
    kind: str
    shapes: dict[str, Any]
    init: Callable[[jax.Array], dict[str, Any]]
    loss: Callable[..., tuple[jax.Array, Metrics]]
    preprocess: Preprocess
    fields: tuple[str, ...]
    description: dict[str, Any]
    context_length: int = 0
    draw: Callable[..., dict[str, Any]] | None = None
    embed: Callable[[dict, dict], dict[str, Any]] | None = None
    contrast: Callable[[dict, dict, jax.Array], tuple[jax.Array, Metrics]] | None = None
    frozen: dict[str, pytree.Tree] = field(default_factory=dict)
    others: dict[str, Preprocess] = field(default_factory=dict)


def preprocess_of(config: ExperimentConfig, image_size: int) -> Preprocess:
    """The preprocessing that `config.data` describes, to `image_size` pixels."""
    mean, std = NORMALISE[config.data.normalise]
    return Preprocess(image_size, config.data.resize, config.data.interpolation, mean, std)

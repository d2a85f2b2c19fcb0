"""A task: the model that a run trains, its loss on a batch, and the description of the finished checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from icar_jax import pytree
from icar_jax.config import ConfigError, ExperimentConfig
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
INIT = "init"  # a setting that takes the value of the weights that the run starts from


@dataclass(frozen=True)
class Task:
    """A model to train and its loss; the training loop is the same for every task.

    A loss is a pure function (params, batch, key, frozen) -> (loss, metrics). `frozen` holds arrays that are not trained, such
    as the parameters of a teacher. It is an argument of the step, placed on the mesh once, with the entries and shapes of
    `Task.frozen`.

    Attributes:
        arch: ClipArch, ComplexityArch or BlocksArch.
        kind: 'clip' or 'complexity', the kind of the finished checkpoint.
        shapes: parameters as ShapeDtypeStructs.
        init: key -> random parameters.
        embed, contrast, draw: the same loss in parts, for gradient accumulation. draw(batch, key, frozen) -> the batch with
            all per-row random draws and teacher embeddings added; embed(params, batch) -> embeddings with one row per pair;
            contrast(params, embeddings, key) -> (loss, metrics). None if the loss does not compare pairs.
        preprocess: image preprocessing. others: further preprocessing of the same images, {entry of the batch: Preprocess}.
        context_length: tokens per caption; 0 if captions are not read.
        fields: entries of the batch that are transferred to the device.
        description: description of the finished checkpoint.
        frozen: shapes of the arrays that are not trained.
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


def preprocess_of(config: ExperimentConfig, image_size: int, start: Mapping[str, Any] = NOTHING) -> Preprocess:
    """Returns the preprocessing described by `config.data`, to `image_size` pixels.

    start: the preprocessing of the weights that the run starts from, for settings of value 'init'. Raises ConfigError if these
    are needed and absent.
    """
    data = config.data
    for name in ("resize", "interpolation", "normalise"):
        if getattr(data, name) == INIT and not start:
            raise ConfigError(
                f"config.data.{name}='init' takes the preprocessing of the weights that a run starts from, and this run starts "
                f"from none; name them with config.train.init, or use another value"
            )
    taken = Preprocess.from_dict(dict(start)) if start else None
    mean, std = (taken.mean, taken.std) if taken and data.normalise == INIT else NORMALISE[data.normalise]
    interpolation = taken.interpolation if taken and data.interpolation == INIT else data.interpolation
    if not taken or data.resize != INIT:
        return Preprocess(image_size, data.resize, interpolation, mean, std)
    # The same part of the image at another size.
    shortest = round(taken.resize_to * image_size / taken.image_size)
    return Preprocess(image_size, taken.resize_mode, interpolation, mean, std, shortest)

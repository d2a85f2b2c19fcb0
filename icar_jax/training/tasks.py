"""What is trained: the model, its loss on a batch, and how the result describes itself.

The loop is the same for every task. A loss is a pure function `(params, batch, key) -> (loss, metrics)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from icar_jax.config import ExperimentConfig, unknown
from icar_jax.data import images
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import registry
from icar_jax.models.clip import Clip
from icar_jax.models.complexity import Complexity
from icar_jax.models.pixels import normalise
from icar_jax.training import losses

NORMALISE = {
    "half": (images.HALF_MEAN, images.HALF_STD),
    "openai": (images.OPENAI_MEAN, images.OPENAI_STD),
    "imagenet": (images.IMAGENET_MEAN, images.IMAGENET_STD),
}


@dataclass(frozen=True)
class Task:
    """A model to train; `fields` names the batch entries that travel to the device."""

    kind: str  # clip | complexity: the kind of the finished checkpoint
    shapes: dict[str, Any]
    init: Callable[[jax.Array], dict[str, Any]]
    loss: Callable[[dict, dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    preprocess: Preprocess
    context_length: int  # tokens per caption; 0 where captions are not read
    fields: tuple[str, ...]
    description: dict[str, Any]


def make_task(config: ExperimentConfig, tokenizer: Tokenizer | None) -> Task:
    """The task that `config.task` names. Raises ConfigError for what does not fit the architecture."""
    if config.task == "clip":
        assert tokenizer is not None, "the clip task reads captions and needs a tokenizer"
        return _clip_task(config, tokenizer)
    if config.task == "complexity":
        return _complexity_task(config)
    raise unknown("config.task", config.task, ("clip", "complexity"))


def _preprocess(config: ExperimentConfig, image_size: int, resize: str) -> Preprocess:
    mean, std = NORMALISE[config.data.normalise]
    return Preprocess(image_size, resize, config.data.interpolation, mean, std)


def _clip_task(config: ExperimentConfig, tokenizer: Tokenizer) -> Task:
    arch = registry.clip_arch(config.clip, tokenizer.vocab_size, tokenizer.end_id)
    clip = Clip(arch)
    exits = arch.vision.all_exits
    weights = losses.exit_weights(config.loss.exit_weights, exits)
    preprocess = _preprocess(config, arch.vision.image_size, config.data.resize)
    dtype = jnp.dtype(config.train.dtype)

    def loss(params, batch, key):
        pixels = normalise(batch["image"], preprocess.mean, preprocess.std)
        image = clip.encode_image_exits(params, pixels, dtype=dtype)
        text = clip.encode_text(params, batch["tokens"], dtype)
        scales = clip.logit_scales(params)
        per_exit = {e: losses.contrastive(image[e], text, scales[e], config.loss.direction) for e in exits}
        metrics = {f"loss_{e}": value for e, value in per_exit.items()}
        metrics |= {f"scale_{e}": scales[e] for e in exits}
        return sum(weights[e] * per_exit[e] for e in exits), metrics

    return Task(
        "clip",
        clip.shapes(),
        lambda key: clip.init(key, config.clip.exit_start),
        loss,
        preprocess,
        arch.text.context_length,
        ("image", "tokens"),
        {"arch": dataclasses.asdict(arch), "preprocess": preprocess.to_dict()},
    )


def _complexity_task(config: ExperimentConfig) -> Task:
    arch = registry.complexity_arch(config.complexity)
    model = Complexity(arch)
    preprocess = _preprocess(config, arch.image_size, config.data.resize)
    dtype, threshold = jnp.dtype(config.train.dtype), config.complexity.threshold

    def loss(params, batch, key):
        pixels = normalise(batch["image"], preprocess.mean, preprocess.std)
        logits = model.logits(params, pixels, key, dtype)
        return losses.complexity_loss(logits, batch["complexity"], arch.head, threshold), {}

    return Task(
        "complexity",
        model.shapes(),
        model.init,
        loss,
        preprocess,
        0,
        ("image", "complexity"),
        {"arch": dataclasses.asdict(arch), "preprocess": preprocess.to_dict()},
    )

"""Distillation from the initial weights: the frozen vision tower of config.train.init is the teacher of the trained tower.

A tower made cheaper by token merging or early exits learns the original tower's embedding of every image, in addition to the
contrastive loss, and recovers in few steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data.images import Preprocess
from icar_jax.files import json_file
from icar_jax.models.clip import Clip
from icar_jax.models.encoders import unit_norm
from icar_jax.models.functional import Graph
from icar_jax.models.layers import DType
from icar_jax.models.ops import normalise
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import VisionTower
from icar_jax.training import init_weights
from icar_jax.training.start import Start, describe, named, start_of

PARAMS = "init"  # entry of the frozen arrays: {'vision': parameters of the tower}
IMAGE = "init_image"  # entry of a batch: the teacher's embeddings [B, D]


@dataclass(frozen=True)
class InitTeacher:
    """The vision tower with its initial weights, as a graph; holds no arrays."""

    tower: Graph[VisionTower]
    preprocess: Preprocess

    @property
    def shapes(self) -> pytree.Tree:
        """Shapes of the frozen entry PARAMS."""
        return {"vision": self.tower.shapes}

    def embed(self, frozen: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """images uint8 [B, S, S, 3] -> [B, D] float32, unit norm, with the parameters frozen[PARAMS]; stop-gradient.

        Embeds the whole batch at once even with gradient accumulation, because no activations are kept for a backward pass.
        """
        params = jax.lax.stop_gradient(frozen[PARAMS])["vision"]
        pixels, full = normalise(images, self.preprocess.mean, self.preprocess.std), self.tower.arch.depth
        return jax.lax.stop_gradient(unit_norm(self.tower(params, pixels, (full,))[full]))


def teacher(config: ExperimentConfig, preprocess: Preprocess, execution: Execution, dtype: DType) -> InitTeacher:
    """Returns the teacher of a run with this preprocessing. Raises ConfigError if the teacher needs another image size."""
    try:
        found = Preprocess.from_dict(_describe(config)["preprocess"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{_named(config)} has no valid image preprocessing: {error}") from error
    if found.image_size != preprocess.image_size:
        raise ConfigError(
            f"config.loss.distill_init={config.loss.distill_init} needs the image size of "
            f"{_named(config)}, {found.image_size} pixels, but this run has {preprocess.image_size}; set "
            f"config.clip.image_size={found.image_size}, or config.loss.distill_init=0"
        )
    arch = init_weights.saved_clip(_start(config)).vision
    return InitTeacher(VisionTower.graph(arch, execution=execution, dtype=dtype), found)


def params(config: ExperimentConfig) -> pytree.Tree:
    """Returns the teacher's parameters, read lazily. Raises ConfigError if they are damaged or do not match the description."""
    saved = init_weights.saved_clip(_start(config))
    return {"vision": init_weights.load_params(_start(config), config.task, saved, Clip.graph(saved).shapes)["vision"]}


def require_same(config: ExperimentConfig, kept: Path, workdir: Path) -> None:
    """Raises ConfigError if a resumed run would distil from other weights than before, or if these no longer exist.

    kept: file with the description of the checkpoint that the run was initialised from.
    """
    if not config.loss.distill_init or not kept.is_file():
        return
    why = "the teacher of config.loss.distill_init, which a resumed run still needs"
    try:
        now, began = _describe(config), json_file.read_object(kept)
    except ValueError as error:  # ConfigError and damaged JSON
        raise ConfigError(f"{workdir} was initialised from {_named(config)}, {why}: {error}") from error
    if checkpoint.identity(now) != checkpoint.identity(began):
        raise ConfigError(
            f"{_named(config)} differs from the model that {workdir} was initialised from, {why}; restore "
            "the original one, or use another --workdir"
        )


def _start(config: ExperimentConfig) -> Start:
    found = start_of(config)
    assert found is not None, "config.loss.distill_init needs weights to start from"
    return found


def _named(config: ExperimentConfig) -> str:
    return named(_start(config))


def _describe(config: ExperimentConfig) -> dict[str, Any]:
    return describe(_start(config), config.task)

"""Distillation from the initial weights: the frozen vision tower of config.train.init is the teacher of the run's own tower.

A tower that was made cheaper, by merging tokens or by exits, learns from every image the embedding that the tower it came from
gives, and not only which captions fit. It recovers in few steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data.images import Preprocess
from icar_jax.models.clip import Clip, unit_norm
from icar_jax.models.functional import Graph
from icar_jax.models.layers import DType
from icar_jax.models.ops import normalise
from icar_jax.models.transformer import Execution
from icar_jax.models.vision import VisionTower
from icar_jax.training import init_weights

PARAMS = "init"  # entry of the frozen arrays: {'vision': parameters of the tower}
IMAGE = "init_image"  # entry of a batch: the teacher's embeddings [B, D]


@dataclass(frozen=True)
class InitTeacher:
    """The tower with its initial weights; holds no arrays."""

    tower: Graph[VisionTower]
    preprocess: Preprocess

    @property
    def shapes(self) -> pytree.Tree:
        """Of PARAMS."""
        return {"vision": self.tower.shapes}

    def embed(self, frozen: Mapping[str, Any], images: jax.Array) -> jax.Array:
        """Embeddings [B, D], float32, unit norm, of images [B, S, S, 3] through the parameters frozen[PARAMS]. No gradient.

        All images at once, also where gradients are accumulated: without a backward pass nothing is kept of them.
        """
        params = jax.lax.stop_gradient(frozen[PARAMS])["vision"]
        pixels, full = normalise(images, self.preprocess.mean, self.preprocess.std), self.tower.arch.depth
        return jax.lax.stop_gradient(unit_norm(self.tower(params, pixels, (full,))[full]))


def teacher(config: ExperimentConfig, preprocess: Preprocess, execution: Execution, dtype: DType) -> InitTeacher:
    """The tower of config.train.init, for a run with this preprocessing. Raises ConfigError where it takes another size."""
    try:
        found = Preprocess.from_dict(_describe(config)["preprocess"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"config.train.init={config.train.init} does not say how pictures are prepared: {error}") from error
    if found.image_size != preprocess.image_size:
        raise ConfigError(
            f"config.loss.distill_init={config.loss.distill_init} shows config.train.init={config.train.init} the run's "
            f"pictures: it takes {found.image_size} pixels, this run {preprocess.image_size}; set "
            f"config.clip.image_size={found.image_size}, or config.loss.distill_init=0"
        )
    arch = init_weights.saved_clip(config.train.init).vision
    return InitTeacher(VisionTower.graph(arch, execution=execution, dtype=dtype), found)


def params(config: ExperimentConfig) -> pytree.Tree:
    """The tower's parameters, read when asked for. Raises ConfigError where they are damaged or not as described."""
    saved = init_weights.saved_clip(config.train.init)
    return {"vision": init_weights.load_params(config.train.init, config.task, saved, Clip.graph(saved).shapes)["vision"]}


def require_same(config: ExperimentConfig, kept: Path, workdir: Path) -> None:
    """Raises ConfigError where a continued run would learn from other weights than before, or these are gone.

    kept: the description of the checkpoint that the run was initialised from.
    """
    if not config.loss.distill_init or not kept.is_file():
        return
    why = "at whose embeddings config.loss.distill_init aims, also when a run is continued"
    try:
        now, began = _describe(config), json.loads(kept.read_text(encoding="utf-8"))
    except ValueError as error:  # ConfigError and damaged JSON
        raise ConfigError(f"{workdir} began with config.train.init={config.train.init}, {why}: {error}") from error
    if checkpoint.identity(now) != checkpoint.identity(began):
        raise ConfigError(
            f"config.train.init={config.train.init} is another model than the one {workdir} began with, {why}; put the first "
            "one back, or start in another --workdir"
        )


def _describe(config: ExperimentConfig) -> dict[str, Any]:
    return checkpoint.describe(init_weights.find(config.train.init, config.task))

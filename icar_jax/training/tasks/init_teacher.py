"""Where a run began: a frozen copy of the vision tower of config.train.init, whose embeddings config.loss.distill_init aims at.

A tower that gets cheaper on the way, by merging patches or by exits, learns from every image what the tower that it was made
of says, and not only which captions fit; so it comes back to it in few steps.
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
from icar_jax.training.tasks import origin

PARAMS = "init"  # entry of a batch: {'vision': parameters of the tower}
IMAGE = "init_image"  # entry of a batch: its embeddings [B, D], which take the place of PARAMS


@dataclass(frozen=True)
class InitTeacher:
    """The tower as it was; holds no arrays."""

    tower: Graph[VisionTower]
    preprocess: Preprocess

    @property
    def shapes(self) -> pytree.Tree:
        """Of PARAMS."""
        return {"vision": self.tower.shapes}

    def embed(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch with IMAGE [B, D], float32, unit norm, in place of PARAMS. No gradient flows through.

        All images at once, also where gradients are accumulated: without a backward pass nothing is kept of them.
        """
        params = jax.lax.stop_gradient(batch[PARAMS])["vision"]
        pixels, full = normalise(batch["image"], self.preprocess.mean, self.preprocess.std), self.tower.arch.depth
        found = unit_norm(self.tower(params, pixels, (full,))[full])
        return {**{name: each for name, each in batch.items() if name != PARAMS}, IMAGE: jax.lax.stop_gradient(found)}


def anchor(config: ExperimentConfig, preprocess: Preprocess, execution: Execution, dtype: DType) -> InitTeacher:
    """The tower of config.train.init, for a run that prepares pictures so. Raises ConfigError where it takes another size."""
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


def require_same(config: ExperimentConfig, workdir: Path) -> None:
    """Raises ConfigError where a continued run would aim at other weights than it began with, or these are gone."""
    kept = origin.described(workdir)
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

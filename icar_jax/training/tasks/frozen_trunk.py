"""The frozen CLIP blocks below a complexity model of variant 'blocks': weights, preprocessing and origin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from icar_jax import checkpoint, pytree
from icar_jax.architectures import routed_clip
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data.images import Preprocess
from icar_jax.models.token_router import shared_paths


def preprocess(config: ExperimentConfig) -> Preprocess:
    """Returns the preprocessing of the CLIP, so that routing and embedding share the same pixels. Raises ConfigError."""
    return Preprocess.from_dict(_describe(config)["preprocess"])


def origin(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the record of the CLIP for the finished checkpoint: its path and the SHA-256 of its weights."""
    return {"clip": config.complexity.clip, "sha256": _describe(config).get("hashes", {}).get(checkpoint.WEIGHTS)}


def params(config: ExperimentConfig, shapes: pytree.Tree, fresh: Callable[[], Mapping[str, Any]]) -> pytree.Tree:
    """Returns parameters with the paths and shapes of `shapes`: the tower's from the CLIP, the head's from `fresh()`.

    Raises ConfigError naming config.complexity.clip if the checkpoint is damaged or has other shapes.
    """
    try:
        clip = pytree.flatten(checkpoint.read(folder(config), _describe(config)["kind"]).params)
    except CheckpointError as error:
        raise _error(config, error) from error
    shared = shared_paths(shapes)
    absent = [path for path in shared.values() if path not in clip]
    if absent:
        raise _error(config, f"its weights have no {', '.join(absent[:3])} ({len(absent)} parameters missing)")
    found = pytree.map_with_path(lambda path, leaf: clip[shared[path]] if path in shared else leaf, fresh())
    differing = pytree.differences(shapes, found)
    if differing:
        raise _error(config, f"its weights do not match its description: {differing[0]} ({len(differing)} differences)")
    return found


def folder(config: ExperimentConfig) -> Path:
    """Returns the folder of the CLIP checkpoint. Raises ConfigError if there is none."""
    return routed_clip(config.complexity)


def _describe(config: ExperimentConfig) -> dict[str, Any]:
    return checkpoint.describe(folder(config))


def _error(config: ExperimentConfig, error: Any) -> ConfigError:
    return ConfigError(f"config.complexity.clip={config.complexity.clip}: {error}")

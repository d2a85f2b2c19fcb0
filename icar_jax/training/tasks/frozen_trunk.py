"""The CLIP tower under a complexity model of variant 'blocks': its weights, its preprocessing, and where it came from."""

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
    """The CLIP's own: the tower sees the same pixels when it embeds."""
    return Preprocess.from_dict(_describe(config)["preprocess"])


def origin(config: ExperimentConfig) -> dict[str, Any]:
    """What the finished checkpoint says of the CLIP: where it was, and the SHA-256 of its weights."""
    return {"clip": config.complexity.clip, "sha256": _describe(config).get("hashes", {}).get(checkpoint.WEIGHTS)}


def params(config: ExperimentConfig, shapes: pytree.Tree, fresh: Callable[[], Mapping[str, Any]]) -> pytree.Tree:
    """Parameters like `shapes`: the tower's are the CLIP's, the head's those of `fresh()`.

    Raises ConfigError naming config.complexity.clip where the checkpoint is damaged or of other shapes.
    """
    try:
        clip = pytree.flatten(checkpoint.read(folder(config), "clip").params)
    except CheckpointError as error:
        raise _error(config, error) from error
    shared = shared_paths(shapes)
    absent = [path for path in shared.values() if path not in clip]
    if absent:
        raise _error(config, f"its weights lack {', '.join(absent[:3])} ({len(absent)} parameters)")
    found = pytree.map_with_path(lambda path, leaf: clip[shared[path]] if path in shared else leaf, fresh())
    differing = pytree.differences(shapes, found)
    if differing:
        raise _error(config, f"its weights do not fit its description: {differing[0]} ({len(differing)} differences)")
    return found


def folder(config: ExperimentConfig) -> Path:
    """The folder of the CLIP checkpoint. Raises ConfigError."""
    return routed_clip(config.complexity)


def _describe(config: ExperimentConfig) -> dict[str, Any]:
    return checkpoint.describe(folder(config))


def _error(config: ExperimentConfig, error: Any) -> ConfigError:
    return ConfigError(f"config.complexity.clip={config.complexity.clip}: {error}")

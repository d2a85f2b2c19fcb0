"""Opening a model: a bundle, a checkpoint, a workdir, or weights of another library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from icar_jax import checkpoint
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError, MeshConfig
from icar_jax.inference import pretrained
from icar_jax.inference.model import Model
from icar_jax.inference.scorer import require_fits
from icar_jax.parallel.mesh import batch_shards, make_mesh


def local_mesh(batch_size: int) -> Mesh:
    """All devices of this process along the data axis, for `load`. Raises ConfigError where they do not divide a batch."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    if batch_size % batch_shards(mesh):
        raise ConfigError(f"a batch of {batch_size} images cannot be cut over {batch_shards(mesh)} devices; choose a multiple")
    return mesh


def load(
    path: str | os.PathLike, *, batch_size: int = 64, dtype: str = "float32", mesh: Mesh | None = None, **options: Any
) -> Model:
    """Opens a bundle, a CLIP or complexity checkpoint, or a workdir of train.py; or weights of another library.

    A folder or file of Hugging Face, OpenCLIP, OpenAI or ICAR is converted in memory; `options` say what it leaves open, as the
    flags of `icar convert` do: activation, exits, heads, image_size, pool, preprocess, tokenizer.
    `batch_size` is the largest static batch, `dtype` that of activations ('float32' or 'bfloat16'). With a `mesh` of this
    process's devices (`icar_jax.parallel.mesh.make_mesh(MeshConfig(data=-1))`) each batch is cut over its data axes, which must
    divide it; parameters lie whole on every device.
    Raises CheckpointError or ConvertError saying what was expected at `path` and what was found.
    """
    if options or (Path(path).exists() and not checkpoint.is_own(path)):
        loaded = pretrained.read(path, ("clip", "complexity"), **options)
        clip, complexity = (loaded, None) if loaded.kind == "clip" else (None, loaded)
        return Model(clip, complexity, loaded.description, batch_size, dtype, mesh)
    folder = checkpoint.find(path)
    description = checkpoint.describe(folder)
    if description["kind"] == "bundle":
        clip, complexity = checkpoint.read(folder / "clip", "clip"), checkpoint.read(folder / "complexity", "complexity")
    elif description["kind"] == "convnext":
        raise CheckpointError(
            f"{folder} holds a ConvNeXt backbone, which neither embeds nor scores images; load a CLIP or a complexity model"
        )
    else:
        loaded = checkpoint.read(folder, description["kind"])
        clip, complexity = (loaded, None) if loaded.kind == "clip" else (None, loaded)
    return Model(clip, complexity, description, batch_size, dtype, mesh)


def load_parts(clip: str | os.PathLike, complexity: str | os.PathLike, *, batch_size: int, dtype: str) -> tuple[Model, Model]:
    """The CLIP and the complexity checkpoint of a bundle to be.

    Raises CheckpointError where one is of the wrong kind, or the complexity model is a head on another CLIP.
    """
    parts = checkpoint.find(clip, ("clip",)), checkpoint.find(complexity, ("complexity",))
    first, second = checkpoint.read(parts[0], "clip"), checkpoint.read(parts[1], "complexity")
    models = (
        Model(first, None, first.description, batch_size, dtype), Model(None, second, second.description, batch_size, dtype)
    )  # fmt: skip
    require_fits(first, models[0].arch, second, models[1].scorer.complexity.arch)
    return models

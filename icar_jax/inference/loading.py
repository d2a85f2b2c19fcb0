"""Loads a model from a bundle, a checkpoint, a workdir, or weights of another library."""

from __future__ import annotations

import os
from typing import Any

import jax
from jax.sharding import Mesh

from icar_jax import checkpoint, program_cache
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError, MeshConfig
from icar_jax.inference import ahead, pretrained
from icar_jax.inference.ahead import Programs
from icar_jax.inference.model import Model
from icar_jax.inference.scorer import require_compatible
from icar_jax.parallel.mesh import batch_shards, make_mesh


def local_mesh(batch_size: int) -> Mesh:
    """A mesh of this process's devices along the data axis, for `load`. Raises ConfigError if they do not divide a batch."""
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    if batch_size % batch_shards(mesh):
        raise ConfigError(f"a batch of {batch_size} images cannot be sharded over {batch_shards(mesh)} devices; use a multiple")
    return mesh


def load(
    path: str | os.PathLike, *, batch_size: int = 64, dtype: str = "float32", mesh: Mesh | None = None,
    programs: Programs | None = None, **options: Any,
) -> Model:  # fmt: skip
    """Loads a model from a bundle, a checkpoint, a workdir of train.py, or weights of another library.

    A vision tower alone embeds images, a text tower alone embeds texts.

    Args:
        path: weights of other libraries (a folder or file) are converted in memory. A name on the Hugging Face hub (owner/name,
            hf://owner/name@revision) is downloaded first, unless a folder or file here has it.
        batch_size: the largest static batch.
        dtype: of activations, 'float32' or 'bfloat16'.
        mesh: devices of this process (`icar_jax.parallel.mesh.make_mesh(MeshConfig(data=-1))`): batches are sharded over the
            data axes, which must divide them, and parameters are replicated.
        programs: where the model takes its programs from; None uses those of `icar compile` if they fit, except on a mesh.
        options: what other libraries' weights do not specify, as the flags of `icar convert`: activation, exits, heads,
            image_size, pool, preprocess, tokenizer.

    Compiled programs are kept for later processes (icar_jax/program_cache.py; ICAR_JAX_CACHE=off switches it off).

    Raises CheckpointError or ConvertError, which name what was expected at `path` and what was found.
    """
    program_cache.enable()
    path = pretrained.local(path)
    if options or (path.exists() and not checkpoint.is_own(path)):
        loaded = pretrained.read_pretrained(path, (*checkpoint.TOWERS, "complexity"), **options)
        clip, complexity = (loaded, None) if loaded.kind in checkpoint.TOWERS else (None, loaded)
        return Model(clip, complexity, loaded.description, batch_size, dtype, mesh)
    folder = checkpoint.find(path)
    description = checkpoint.describe(folder)
    if description["kind"] == "bundle":
        clip, complexity = checkpoint.read(folder / "clip", "clip"), checkpoint.read(folder / "complexity", "complexity")
    elif description["kind"] == "convnext":
        raise CheckpointError(
            f"{folder} is a ConvNeXt backbone, which can neither embed nor score images; load a CLIP or a complexity model"
        )
    else:
        loaded = checkpoint.read(folder, description["kind"])
        clip, complexity = (loaded, None) if loaded.kind in checkpoint.TOWERS else (None, loaded)
    if programs is None:
        parts = [part for part in (clip, complexity) if part is not None]
        identity = {checkpoint.role(part.kind): checkpoint.identity(part.description) for part in parts}
        programs = ahead.find(folder, identity, dtype) if mesh is None else ahead.Programs()
    return Model(clip, complexity, description, batch_size, dtype, mesh, programs)


def load_parts(clip: str | os.PathLike, complexity: str | os.PathLike, *, batch_size: int, dtype: str) -> tuple[Model, Model]:
    """Loads the CLIP and the complexity checkpoint from which a bundle is made, as two Models.

    Raises CheckpointError if one is of the wrong kind or the complexity model is a head on a different CLIP.
    """
    parts = checkpoint.find(clip, ("clip",)), checkpoint.find(complexity, ("complexity",))
    first, second = checkpoint.read(parts[0], "clip"), checkpoint.read(parts[1], "complexity")
    models = (
        Model(first, None, first.description, batch_size, dtype), Model(None, second, second.description, batch_size, dtype)
    )  # fmt: skip
    require_compatible(first, models[0].arch, second, models[1].scorer.complexity.arch)
    return models

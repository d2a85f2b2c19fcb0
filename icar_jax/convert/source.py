"""Opens a source: finds its file of weights, reads the configuration files beside it, and detects its layout."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from icar_jax.convert.fields import ConvertError, read_json
from icar_jax.convert.files.tensors import Tensor, read_weights
from icar_jax.convert.layouts import registry
from icar_jax.convert.layouts.base import Source

WEIGHT_FILES = (  # in a folder the first that exists is taken; a layout may name more
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def open_source(path: str | os.PathLike) -> Source:
    """The weights at `path` (a file or a folder) with their layout, which is detected; no values are read yet.

    Raises ConvertError for files that cannot be read, and for an unknown layout, listing the known ones.
    """
    path = Path(path)
    weights = read_weights(_weights_file(path))
    source = Source(path, "", weights, _configs(weights.path.parent))
    for layout in registry.by_precedence():
        stripped = replace(source, weights=replace(weights, tensors=_strip(weights.tensors, layout.prefixes)))
        if layout.detect(stripped):
            return replace(stripped, layout=layout.name)
    first = ", ".join(list(weights.tensors)[:5])
    raise ConvertError(
        f"{path}: unknown layout; expected the names of one of {', '.join(registry.names())}, found {len(weights.tensors)} "
        f"tensors: {first}, ..."
    )


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise ConvertError(f"{path} does not exist; expected a file of weights or a folder that holds one")
    usual = (*WEIGHT_FILES, *registry.weight_files())
    for name in usual:
        if (path / name).is_file():
            return path / name
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) == 1:
        return others[0]
    if others:
        raise ConvertError(f"{path} holds several files of weights, name one of them: {', '.join(f.name for f in others)}")
    raise ConvertError(f"{path} holds no weights; expected {', '.join(usual)} or one file {', '.join(SUFFIXES)}")


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: read_json(folder / name) for name in registry.config_files() if (folder / name).is_file()}


def _strip(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    for prefix in prefixes:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return dict(tensors)

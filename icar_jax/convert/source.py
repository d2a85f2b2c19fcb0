"""Opens a source: finds its file of weights, reads the configuration files beside it, and detects its layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from icar_jax.convert import adapters, folder
from icar_jax.convert.fields import ConvertError, read_json
from icar_jax.convert.files.tensors import Tensor, read_weights
from icar_jax.convert.hub import download as hub
from icar_jax.convert.layouts import registry
from icar_jax.convert.layouts.base import Source

# What training programs put before every name, in any order and nesting; some stand within names too.
WRAPPERS = ("module.", "model.", "net.", "teacher.", "backbone.", "clip.", "base_model.model.", "_forward_module.")
_WITHIN = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_DEEPEST = 8  # wrappers


def open_source(path: str | os.PathLike, base: str | os.PathLike = "", weights: str = "") -> Source:
    """The weights at `path` (a file, folder or name on the hub) with their layout, which is detected; no values are read yet.

    A LoRA adapter beside the weights is merged into them; a folder that holds one alone needs the `base` weights. `weights`
    'ema' or 'plain' chooses where a file holds both.
    Raises ConvertError for files that cannot be read, and for an unknown layout, listing the known ones.
    """
    path = hub.local(path)
    adapter = adapters.find(path) if path.is_dir() else None
    alone = adapter is not None and not any((path / name).is_file() for name in folder.usual_weights())
    if alone and not base:
        about = adapters.base_of(adapter)
        raise ConvertError(
            f"{path} is a LoRA adapter alone; pass --base WEIGHTS, the file, folder or name of what it was trained on"
            + (f" (it says {about})" if about else "")
        )
    if base and not alone:
        raise ConvertError(f"--base={base} is for a folder that holds a LoRA adapter alone; {path} has weights of its own")
    found = read_weights(folder.weights_file(hub.local(base) if alone else path), chosen=weights)
    merged = None
    if adapter is not None:
        tensors, merged = adapters.merge(found.tensors, adapter)
        found = replace(found, tensors=tensors)
    source = Source(path, "", found, _configs(found.path.parent), merged)
    for tensors in _unwrapped(found.tensors):
        stripped = replace(source, weights=replace(found, tensors=tensors))
        for layout in registry.by_precedence():
            if layout.detect(stripped):
                return replace(stripped, layout=layout.name)
    first = ", ".join(list(found.tensors)[:5])
    raise ConvertError(
        f"{path}: unknown layout; expected the names of one of {', '.join(registry.names())}, found {len(found.tensors)} "
        f"tensors: {first}, ..."
    )


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: read_json(folder / name) for name in registry.config_files() if (folder / name).is_file()}


def _unwrapped(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The tensors by their own names, then without the wrapper before all of them, and so on."""
    inner = {_without(name): tensor for name, tensor in tensors.items()}
    found = dict(tensors) if len(inner) < len(tensors) else inner
    yield found
    for _ in range(_DEEPEST):
        wrapper = next((w for w in WRAPPERS if found and all(name.startswith(w) and name != w for name in found)), None)
        if wrapper is None:
            return
        found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
        yield found


def _without(name: str) -> str:
    for wrapper in _WITHIN:
        name = name.replace(wrapper, "")
    return name

"""What a source is: which file holds the weights, which layout their names have, and the configuration files beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import Tensor, Weights, read_weights

LAYOUTS = ("openai", "open_clip", "hf_clip", "siglip", "timm", "icar", "icc")
WEIGHT_FILES = (  # in a folder, the first that is there
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
CONFIG_FILES = (
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_ICC_PREFIXES = ("model.", "net.")


@dataclass(frozen=True)
class Source:
    """Weights with their layout. `configs` holds the JSON files beside them by name; `path` is what the user named."""

    path: Path
    layout: str
    weights: Weights
    configs: dict[str, dict[str, Any]]

    @property
    def folder(self) -> Path:
        return self.weights.path.parent

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.weights.tensors


def open_source(path: str | os.PathLike) -> Source:
    """Finds the weights at `path` (a file or a folder) and tells their layout by their names. Reads no weights yet.

    Raises ConvertError for what cannot be read and for layouts that are not known, listing those that are.
    """
    path = Path(path)
    weights = read_weights(_weights_file(path))
    layout = _layout(weights, path)
    if layout == "icc":
        weights = replace(weights, tensors=_strip(weights.tensors, _ICC_PREFIXES))
    return Source(path, layout, weights, _configs(weights.path.parent))


def _weights_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.exists():
        raise ConvertError(f"{path} does not exist; expected a file of weights or a folder that holds one")
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    others = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES and file.is_file())
    if len(others) == 1:
        return others[0]
    if others:
        raise ConvertError(f"{path} holds several files of weights, name one of them: {', '.join(f.name for f in others)}")
    raise ConvertError(f"{path} holds no weights; expected {', '.join(WEIGHT_FILES)} or one file {', '.join(SUFFIXES)}")


def _configs(folder: Path) -> dict[str, dict[str, Any]]:
    configs = {}
    for name in CONFIG_FILES:
        if (folder / name).is_file():
            configs[name] = read_json(folder / name)
    return configs


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ConvertError naming the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _layout(weights: Weights, path: Path) -> str:
    names = weights.tensors
    bare = _strip(names, _ICC_PREFIXES)
    if any(name.startswith(("text_model.", "vision_model.")) for name in names):
        return "siglip" if "vision_model.head.probe" in names or "text_model.head.weight" in names else "hf_clip"
    if any(name.startswith(("early_proj.", "early_ln.", "clip.visual.")) for name in names):
        return "icar"
    if any(name.startswith("visual.trunk.") for name in names):
        raise ConvertError(
            f"{path}: the vision tower is a timm model (visual.trunk.*), which is not supported; a SigLIP is read from its "
            "Hugging Face folder"
        )
    if any(name.startswith("visual.") for name in names):
        return "openai" if weights.kind == "torchscript" or "input_resolution" in names else "open_clip"
    if any(name.startswith("classifier.") for name in bare) and any(name.startswith("backbone.") for name in bare):
        return "icc"
    if any(name.startswith("stages.") for name in names):
        return "timm"
    if any(name.startswith("downsample_layers.") for name in names):
        raise ConvertError(f"{path}: this is the original ConvNeXt layout; load it with timm and save its state dict")
    first = ", ".join(list(names)[:5])
    raise ConvertError(
        f"{path}: unknown layout; expected the names of one of {', '.join(LAYOUTS)}, found {len(names)} tensors: {first}, ..."
    )


def _strip(tensors: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    for prefix in prefixes:
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: tensor for name, tensor in tensors.items()}
    return dict(tensors)


def shape_of(source: Source, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that the architecture is read from. Raises ConvertError where it is missing or of another rank."""
    tensor = source.tensors.get(name)
    if tensor is None:
        raise ConvertError(f"{source.path} ({source.layout} layout) lacks {name}, which the architecture is read from")
    if len(tensor.shape) != rank or 0 in tensor.shape:
        raise ConvertError(f"{source.path}: {name} has shape {tensor.shape}, expected {rank} axes")
    return tensor.shape


def square_side(source: Source, name: str, tokens: int) -> int:
    """The side of a square grid of `tokens` patches. Raises ConvertError for any other count."""
    side = round(tokens**0.5)
    if side < 1 or side * side != tokens:
        raise ConvertError(f"{source.path}: {name} holds {tokens} patch positions, which is no square grid")
    return side


def require_agreement(source: Source, file: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ConvertError where a config says otherwise than the shapes; pairs: {field: (config's value or None, found)}."""
    wrong = [f"{k}: {file} says {said}, the weights say {found}" for k, (said, found) in pairs.items()
             if said is not None and said != found]  # fmt: skip
    if wrong:
        raise ConvertError(f"{source.path}: the weights are not those of the config beside them:\n  " + "\n  ".join(wrong))

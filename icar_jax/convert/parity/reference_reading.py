"""Reads weights with their library's own readers, and checks what the user specified of them. Imports nothing of torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import STATE_KEYS
from icar_jax.convert.parity.reference_inputs import ReferenceRequest
from icar_jax.convert.source import Source


def read_state_dict(torch: ModuleType, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors as float32 by name, and the rest of the file, read by torch's or safetensors' own reader."""
    path, kind = source.weights.path, source.weights.kind
    try:
        if kind == "safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        elif kind == "torchscript":
            found = dict(torch.jit.load(path, map_location="cpu").state_dict())
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own errors for a damaged or refused file
        raise ConvertError(f"{path}: torch cannot read it: {error}") from error
    keys = [key for key in STATE_KEYS if isinstance(found.get(key), Mapping)]
    extra = {key: value for key, value in found.items() if key not in keys} if keys else {}
    state = strip(dict(found[keys[0]] if keys else found), "module.")
    unwrapped = {tensor.name: name for name, tensor in source.tensors.items()}
    state = {unwrapped.get(name, name): value for name, value in state.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}, extra


def strip(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The tensors with `prefix` removed from their names, where every name has it."""
    return {k.removeprefix(prefix): v for k, v in state.items()} if all(k.startswith(prefix) for k in state) else dict(state)


def load_strictly(model: Any, state: Mapping[str, Any], source: Source, what: str) -> Any:
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConvertError(f"{source.path}: the weights do not fit the model of {what}: {error}") from error
    return model.float().eval()


def class_of(source: Source, classes: Mapping[str, str]) -> str:
    """The model_type in config.json. Raises ConvertError for one that is not among `classes`, {model_type: class}."""
    kind = source.configs.get("config.json", {}).get("model_type")
    if kind not in classes:
        raise ConvertError(f"{source.folder}: config.json describes a {kind!r} model; expected {', '.join(classes)}")
    return kind


def load_transformers(transformers: ModuleType, source: Source, classes: Mapping[str, str], may_lack: tuple[str, ...]) -> Any:
    """The model of transformers in float32; tensors whose names contain one of `may_lack` may be missing.

    Raises ConvertError where the library cannot load it, or lacks other tensors.
    """
    folder, safe = source.folder, ".safetensors" in source.weights.path.name
    cls = getattr(transformers, classes[class_of(source, classes)])
    try:
        model, info = cls.from_pretrained(folder, local_files_only=True, use_safetensors=safe, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConvertError(f"{folder}: transformers cannot load it as {cls.__name__}: {error}") from error
    # transformers initialises tensors that the file lacks at random, with only a warning.
    missing = [name for name in map(str, info["missing_keys"]) if not any(part in name for part in may_lack)]
    if missing or info["mismatched_keys"]:
        raise ConvertError(
            f"{folder}: the weights are not those of the {cls.__name__} in config.json: missing {missing}, mismatched "
            f"{sorted(map(str, info['mismatched_keys']))}"
        )
    return model.float().eval()


def refuse_options(source: Source, asked: ReferenceRequest, why: str, *names: str) -> None:
    """Raises ConvertError for an option that has no effect on this source."""
    given = [name for name in names if getattr(asked, name)]
    if given:
        raise ConvertError(f"{source.path}: {', '.join(given)} cannot be given for this source: {why}")


def require_stated(source: Source, asked: ReferenceRequest, file: str, activation: str, heads: tuple[int, ...]) -> None:
    """Raises ConvertError where the user contradicts a configuration file."""
    pairs = (("activation", asked.activation, activation), ("heads", asked.heads, heads))
    wrong = [f"{name} is {said}, not {given}" for name, given, said in pairs if given and given != said]
    if wrong:
        raise ConvertError(f"{source.path}: {file} says otherwise: {', '.join(wrong)}; leave the option out")

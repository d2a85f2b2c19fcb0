"""LoRA adapters of PEFT: a Hugging Face folder may hold one beside its weights, or alone; it is merged into the weights.

A matrix W with the factors A and B becomes W + scaling B A, in float32 and when it is read. Anything else that an adapter may
change (other kinds, DoRA, tokens) is refused by name.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax.convert.fields import ConvertError, Fields, read_json
from icar_jax.convert.files.tensors import Tensor, read_weights

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
# Settings under which the product above is not what PEFT computes, with the values that leave it so.
_NEUTRAL: dict[str, tuple] = {
    "use_dora": (None, False), "fan_in_fan_out": (None, False), "layer_replication": (None, []), "lora_bias": (None, False),
    "trainable_token_indices": (None, [], {}), "alora_invocation_tokens": (None, []), "use_qalora": (None, False),
    "corda_config": (None,), "eva_config": (None,),
}  # fmt: skip
_PARTS = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(\.default)?(\.weight)?")
_HOW = "merge it with peft (model.merge_and_unload().save_pretrained(FOLDER)) and convert that folder"


@dataclass(frozen=True)
class Adapter:
    """What was merged: its file, the rank and the number of tensors that changed."""

    path: Path
    rank: int
    changed: int


def find(folder: Path) -> Path | None:
    """The weights of the adapter in `folder`; None without one. Raises ConvertError for one without its configuration."""
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None and (folder / CONFIG).is_file():
        raise ConvertError(f"{folder} holds {CONFIG} but none of {', '.join(FILES)}; copy the adapter's weights too")
    if file is not None and not (folder / CONFIG).is_file():
        raise ConvertError(f"{folder} holds {file.name} but no {CONFIG}, which says how to merge it; copy the whole adapter")
    return file


def base_of(file: Path) -> str:
    """What the adapter in `file` was trained on, as its configuration says; '' where it does not."""
    config = file.with_name(CONFIG)
    return Fields(str(config), read_json(config)).get("base_model_name_or_path", str, "")


def merge(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], Adapter]:
    """The tensors with the adapter in `file` merged into them, and what was merged; values are computed when they are read.

    Raises ConvertError for an adapter of another kind, and for tensors that do not belong to the base weights.
    """
    config = Fields(str(file.with_name(CONFIG)), read_json(file.with_name(CONFIG)))
    kind = config.get("peft_type", str, "")
    if kind != "LORA":
        raise ConvertError(f"{config.where}: adapters of the kind {kind!r} are not supported, only 'LORA'; {_HOW}")
    wrong = [f"{k}={config.content[k]!r}" for k, values in _NEUTRAL.items() if config.content.get(k) not in values]
    if wrong:
        raise ConvertError(f"{config.where}: {', '.join(wrong)} is not supported; {_HOW}")
    pairs, whole, strange = _sorted(read_weights(file).tensors)
    faults = [f"{name}: not a part of a LoRA adapter" for name in strange]
    merged = dict(tensors)
    for module, parts in pairs.items():
        target = _target(tensors, f"{module}.weight")
        lacking = [name for name in ("A", "B") if name not in parts]
        if target is None or lacking:
            what = f"lacks lora_{lacking[0]}" if lacking else f"the weights have no {module}.weight"
            faults.append(f"{module}: {what}")
            continue
        base, (a, b) = tensors[target], (parts["A"], parts["B"])
        if _shape(a, b, parts["embedding"]) != base.shape:
            faults.append(f"{module}: A {a.shape} and B {b.shape} do not make {target} {base.shape}")
            continue
        merged[target] = _with_product(base, a, b, parts["embedding"], _scaling(config, module, a.shape[0]))
    for name, tensor in whole.items():
        target = _target(tensors, name)
        if target is None or tensors[target].shape != tensor.shape:
            faults.append(f"{name} {tensor.shape}: the weights have no such tensor")
        else:
            merged[target] = dataclasses.replace(tensor, name=target)
    if faults:
        lines = "\n  ".join(faults[:10])
        raise ConvertError(f"{file}: {len(faults)} parts of the adapter do not belong to these weights:\n  {lines}")
    return merged, Adapter(file, config.positive("r", int, 8), len(pairs) + len(whole))


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Any]], dict[str, Tensor], list[str]]:
    """({module: its factors}, {name: a tensor trained as a whole}, names that are neither)."""
    pairs: dict[str, dict[str, Any]] = {}
    whole: dict[str, Tensor] = {}
    strange = []
    for full, tensor in tensors.items():
        name = full.removeprefix(_PREFIX)
        if match := _PARTS.fullmatch(name):
            embedding = "embedding" in match["part"]
            pairs.setdefault(match["module"], {"embedding": embedding})[match["part"][-1]] = tensor
        elif "lora_" in name or name == full:
            strange.append(full)
        else:  # a bias, or a module of modules_to_save
            whole[re.sub(r"\.(modules_to_save|base_layer)(\.default)?\.", ".", name)] = tensor
    return pairs, whole, strange


def _target(tensors: Mapping[str, Tensor], name: str) -> str | None:
    """The base weights' name of a tensor: the same, or the only one that ends so where a wrapper's prefix differs."""
    if name in tensors:
        return name
    found = [key for key in tensors if key.endswith(f".{name}") or name.endswith(f".{key}")]
    return found[0] if len(found) == 1 else None


def _scaling(config: Fields, module: str, rank: int) -> float:
    """The factor of the product B A for one module."""
    alpha = _pattern(config, "alpha_pattern", module) or config.get("lora_alpha", float, 8.0)
    return alpha / (math.sqrt(rank) if config.get("use_rslora", bool, False) else rank)


def _pattern(config: Fields, name: str, module: str) -> float | None:
    """The value of the first pattern that matches the end of the module's name, as PEFT matches them."""
    patterns = config.section(name)
    found = next((key for key in patterns.content if re.match(rf"(.*\.)?({key})$", module)), None)
    return None if found is None else patterns.get(found, float)


def _shape(a: Tensor, b: Tensor, embedding: bool) -> tuple[int, ...] | None:
    if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[0] != b.shape[1]:
        return None
    if embedding:
        return (a.shape[1], b.shape[0])
    return (b.shape[0], *a.shape[1:]) if all(side == 1 for side in b.shape[2:]) else None


def _with_product(base: Tensor, a: Tensor, b: Tensor, embedding: bool, scaling: float) -> Tensor:
    def load() -> np.ndarray:
        first, second = (np.asarray(part.load(), np.float32) for part in (a, b))
        product = second.reshape(second.shape[0], -1) @ first.reshape(first.shape[0], -1)
        product = product.T if embedding else product.reshape(base.shape)
        return np.asarray(base.load(), np.float32) + np.float32(scaling) * product

    return dataclasses.replace(base, dtype="float32", load=load)

"""Parity cases: a tiny model of another library as its files would lie on disk, its inputs, and what that library computed.

A case is kept in tests/fixtures/golden/<name>.safetensors, or built afresh by tests/fixtures/make_reference.py, which needs
PyTorch and the libraries. Nothing here does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from icar_jax import pytree
from icar_jax.convert.files.torch_writer import write_torch
from icar_jax.convert.layouts.open_clip import open_clip_rules
from icar_jax.convert.rules import export_weights
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch
from tests.support.places import FIXTURES

GOLDEN = FIXTURES / "golden"


@dataclass(frozen=True)
class Case:
    """One source with its reference outputs.

    `weights` are the tensors by the source's own names and in its dtypes. `files` are the JSON files beside them. Where
    `state_key` is set the weights file is a dict that holds the tensors under that key, next to `extra`. `options` are the
    fields of `Options` that a user has to give for this source. Images are uint8 [N, S, S, 3]; `repeat` says that they are
    one tile repeated so many times along each side.
    """

    name: str
    layout: str
    kind: str  # of the checkpoint it becomes: clip | vision | text | complexity | convnext
    weights: dict[str, np.ndarray]
    weights_file: str
    files: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    state_key: str = ""
    extra: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    repeat: int = 1
    compact: bool = False  # weights are int8 multiples of a power of two, and kept as such

    @property
    def images(self) -> np.ndarray:
        """float32 [N, S, S, 3], normalised as both sides of the comparison do."""
        return (self.inputs["images"].astype(np.float32) / 255 - 0.5) / 0.5

    @property
    def layers(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """{path of a layer: (its input, its output)}."""
        names = [name.removesuffix("/in") for name in self.outputs if name.startswith("layers/") and name.endswith("/in")]
        return {name.removeprefix("layers/"): (self.outputs[f"{name}/in"], self.outputs[f"{name}/out"]) for name in names}


TEXT_FIELDS = ("name", "layout", "kind", "weights_file", "files", "options", "state_key", "extra", "repeat", "compact")


def names() -> list[str]:
    """Every golden case."""
    return sorted(file.stem for file in GOLDEN.glob("*.safetensors"))


def save(case: Case, file: Path) -> None:
    """Writes a golden file; weights of compact cases as int8, exactly or with a ValueError."""
    tensors, dtypes, steps = {}, {}, {}
    for name, array in case.weights.items():
        dtypes[name] = str(array.dtype)
        if case.compact and array.dtype.kind == "f":
            array, steps[name] = to_int8(name, array)
        tensors[f"weights/{name}"] = array
    tensors |= {f"inputs/{name}": array for name, array in case.inputs.items()}
    if "images" in case.inputs:
        side = case.inputs["images"].shape[1] // case.repeat
        tensors["inputs/images"] = case.inputs["images"][:, :side, :side]
    tensors |= {f"outputs/{name}": array for name, array in case.outputs.items()}
    meta = {name: getattr(case, name) for name in TEXT_FIELDS} | {"dtypes": dtypes, "steps": steps}
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    save_file(tensors, file, metadata={"case": json.dumps(meta)})


def to_int8(name: str, array: np.ndarray) -> tuple[np.ndarray, float]:
    """(int8 array, step) with array == int8 * step; the step is the least power of two that reaches every value."""
    step = 2.0 ** np.ceil(np.log2(max(float(np.abs(array).max()), 1e-6) / 127))
    multiples = np.round(array.astype(np.float64) / step).astype(np.int8)
    if not np.array_equal(multiples * step, array.astype(np.float64)):
        raise ValueError(f"{name} does not consist of multiples of {step}")
    return multiples, step


@cache
def load(name: str) -> Case:
    """The golden case of that name."""
    groups = {"weights": {}, "inputs": {}, "outputs": {}}
    with safe_open(GOLDEN / f"{name}.safetensors", "numpy") as file:
        meta = json.loads(file.metadata()["case"])
        for key in file.keys():
            group, rest = key.split("/", 1)
            groups[group][rest] = file.get_tensor(key)
    dtypes, steps = meta.pop("dtypes"), meta.pop("steps")
    # In the order of the source, so that errors that list names are the same every time.
    groups["weights"] = {
        key: (groups["weights"][key] * np.float32(steps.get(key, 1)) if key in steps else groups["weights"][key]).astype(dtype)
        for key, dtype in dtypes.items()
    }
    if "images" in groups["inputs"]:
        groups["inputs"]["images"] = np.tile(groups["inputs"]["images"], (1, meta["repeat"], meta["repeat"], 1))
    return Case(**meta, **groups)


@cache
def build(name: str, seed: int) -> Case:
    """The same case with other weights and inputs, computed by the source's library now; needs PyTorch."""
    from tests.fixtures import make_reference

    return make_reference.build(name, seed)


def write_source(case: Case, folder: Path) -> Path:
    """Writes the source as a user would have it; the folder where configuration lies beside the weights, else the file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / case.weights_file
    if file.suffix == ".safetensors":
        save_file({name: np.asarray(array, order="C") for name, array in case.weights.items()}, file, metadata={"format": "pt"})
    else:
        write_torch(file, {**case.extra, case.state_key: case.weights} if case.state_key else case.weights)
    for name, content in case.files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    return folder if case.files else file


def openai_source(folder: Path) -> tuple[Path, dict]:
    """A small state dict as OpenAI's loader demands it (heads 64 wide, MLPs four times the width), and its parameters."""
    arch = ClipArch(
        VisionArch(12, 6, 64, 2, 1, 256, 32, "quick_gelu"), TextArch(10, 64, 64, 2, 1, 256, 32, "quick_gelu", end_id=63)
    )
    rng = np.random.default_rng(0)
    params = pytree.map_with_path(
        lambda _, leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), Clip.graph(arch).shapes
    )
    state = dict(export_weights(params, open_clip_rules(), "source"))
    state |= {name: np.array(size) for name, size in (("input_resolution", 12), ("context_length", 10), ("vocab_size", 64))}
    write_torch(folder / "openai.pt", state)
    return folder / "openai.pt", params

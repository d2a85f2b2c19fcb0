"""Opens weight files: named tensors that are read one at a time, from safetensors, PyTorch and TorchScript files.

The format is detected from the content. PyTorch files are read by icar_jax.convert.files.torch_reader, which runs no code and
has bounds of time and memory that torch lacks; torch itself can be asked for, to compare both.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files import safetensors_reader, torch_reader
from icar_jax.convert.files.torch_pickle import StoredTensor
from icar_jax.files import json_file
from icar_jax.files.opening import open_regular

READERS = ("own", "torch")
PLAIN_KEYS = ("model_state_dict", "state_dict", "model", "module")  # of state dicts; the last is DeepSpeed's
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "teacher")  # of weights averaged over training
OPTIMIZER_GROUPS = "optimizer_groups"  # in `Weights.extra`, of a training checkpoint
STATE_KEYS = (*PLAIN_KEYS, *EMA_KEYS)
_OTHER = {
    b"\x1f\x8b": "gzip; unpack it first",
    b"\x93NUMPY": "a numpy array; expected weights of a whole model",
    b"\x89HDF": "HDF5; get the PyTorch or safetensors file",
    b"GGUF": "GGUF; get the PyTorch or safetensors file",
}
# Mapped pages count as memory until the file is mapped anew.
_REMAP_AFTER = 1 << 27
_MOST_VALUES, _DEEPEST_VALUE = 1_000_000, 64


@dataclass(frozen=True)
class Tensor:
    """One tensor of a source file. `load` reads it, C-contiguous and of `dtype` (bfloat16 as ml_dtypes.bfloat16)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array = self.load()
        return array if dtype is None else array.astype(dtype, copy=False)


@dataclass(frozen=True)
class Weights:
    """The tensors of one file, or of the shards of an index; `extra` holds the plain values stored beside the state dict."""

    path: Path
    kind: str
    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    key: str = ""  # that the state dict stands under; '' at the top
    others: tuple[str, ...] = ()  # keys of further state dicts, which were not read


def read_weights(path: str | os.PathLike, reader: str = "own", chosen: str = "") -> Weights:
    """The tensors of a weight file or of a Hugging Face index of shards; values are read when a tensor's `load` is called.

    `kind` of the result is 'safetensors', 'torch' or 'torchscript'. The prefix 'module.' is removed where every name has it.
    `reader` of PyTorch files: 'own', or 'torch' (weights_only, after the checks of 'own'; needs torch).
    `chosen`: 'ema' or 'plain' weights of a file that may hold both; '' takes the plain ones where there are any.
    Raises ConvertError for a file that is missing, damaged, not weights, or that holds more than tensors and plain values.
    """
    if reader not in READERS:
        raise ConvertError(f"unknown reader {reader!r}; expected one of {', '.join(READERS)}")
    path = Path(path)
    head = _head(path)
    index = _is_json(head) and not safetensors_reader.matches(head)
    if index and chosen:
        raise ConvertError(f"{path} is an index of shards, which hold one state dict; leave --weights {chosen} out")
    kind, tensors, read = _read_index(path, reader) if index else _read_file(path, head, reader, chosen)
    if not tensors:
        raise ConvertError(f"{path} holds no tensors; expected the weights of a model")
    if all(name.startswith("module.") and name != "module." for name in tensors):
        short = {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
        tensors = {name: replace(tensor, name=name) for name, tensor in short.items()}
    return Weights(path, kind, tensors, read.extra, read.key, read.others)


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise ConvertError(f"{path} is a folder; expected a weight file in it, such as model.safetensors")
    try:
        with open_regular(path) as stream:
            head = stream.read(512)
    except FileNotFoundError as error:
        raise ConvertError(f"{path} does not exist") from error
    except OSError as error:
        raise ConvertError(f"{path} cannot be read: {error}") from error
    if not head:
        raise ConvertError(f"{path} is empty; get the file again")
    return head


def _is_json(head: bytes) -> bool:
    return head.lstrip()[:1] in (b"{", b"[")


class _State(NamedTuple):
    """A state dict of a file, the plain values beside it, the key it stands under, and the keys of other state dicts."""

    tensors: dict[str, Any]
    extra: dict[str, Any] = {}
    key: str = ""
    others: tuple[str, ...] = ()


def _read_file(path: Path, head: bytes, reader: str, chosen: str = "") -> tuple[str, dict[str, Tensor], _State]:
    # First: a header's length may spell the beginning of any other format. No other one has '{' at this place.
    if safetensors_reader.matches(head):
        if chosen:
            raise ConvertError(f"{path} is a safetensors file, which holds one state dict; leave --weights {chosen} out")
        entries = safetensors_reader.read(path)
        return "safetensors", {name: Tensor(name, *entry) for name, entry in entries.items()}, _State({})
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        archive = torch_reader.open_archive(path)
        if archive.script:
            if reader == "torch":
                raise ConvertError(f"{path} is TorchScript: torch would run the code inside; use reader 'own'")
            return "torchscript", *_from_own(torch_reader.read_archive(archive), path, chosen)
        found = torch_reader.read_archive(archive)
        compressed = any(region.member for region in archive.members.values())
        if _use_torch(reader) and not compressed:  # torch would unpack all members, needed or not
            return "torch", *_from_torch(path, True, chosen)
        return "torch", *_from_own(found, path, chosen)
    if head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        found = torch_reader.read_legacy(path)
        if _use_torch(reader):
            return "torch", *_from_torch(path, False, chosen)
        return "torch", *_from_own(found, path, chosen)
    raise ConvertError(f"{path} is {_other_kind(path, head)}")


def _other_kind(path: Path, head: bytes) -> str:
    start = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights themselves; fetch the real file (git lfs pull, or download it again)"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not weights; the download went wrong, get the file again"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it and name the weight file in it (or save it again with torch >= 1.6)"
    for magic, text in _OTHER.items():
        if head.startswith(magic):
            return text
    return f"neither safetensors nor a torch file: it starts with {head[:16]!r} and has {path.stat().st_size} bytes"


def _use_torch(reader: str) -> bool:
    if reader == "torch" and importlib.util.find_spec("torch") is None:
        raise ConvertError("reader 'torch' needs torch installed; use 'own'")
    return reader == "torch"


def _read_index(path: Path, reader: str) -> tuple[str, dict[str, Tensor], _State]:
    try:
        index = json_file.read(path, ConvertError, pairs=json_file.without_duplicates)
    except ConvertError as error:
        raise ConvertError(f"{error}; the file looks like JSON but cannot be parsed") from error
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
        keys = ", ".join(list(map(str, index))[:8]) if isinstance(index, dict) else "a list"
        raise ConvertError(f"{path} is a JSON file, not weights: expected an index with a weight_map, found {keys[:200]}")
    faults, kinds, found = [], set(), {}
    for shard in dict.fromkeys(listed.values()):
        if Path(shard).name != shard or not (path.parent / shard).is_file():
            faults.append(f"shard {shard!r} is not in {path.parent}")
            continue
        kind, tensors, _ = _read_file(path.parent / shard, _head(path.parent / shard), reader)
        kinds.add(kind)
        strays = [name for name in tensors if listed.get(name) != shard]
        faults += [f"{shard} holds {name}, which the index places in {listed.get(name)}" for name in strays]
        faults += [f"{shard} lacks {name}" for name, place in listed.items() if place == shard and name not in tensors]
        found |= tensors
    if len(kinds) > 1:
        faults.append(f"shards of different kinds: {', '.join(sorted(kinds))}")
    if faults:
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ConvertError(f"{path} and its shards disagree: {'; '.join(faults[:10])}{more}; get the missing files again")
    return kinds.pop(), {name: found[name] for name in listed}, _State({})


def _from_own(file: torch_reader.TorchFile, path: Path, chosen: str) -> tuple[dict[str, Tensor], _State]:
    located = _locate(file.tree, lambda value: isinstance(value, StoredTensor), path, chosen)
    state = located.tensors
    loads = {name: torch_reader.loader(file, name, stored) for name, stored in state.items()}
    return {name: Tensor(name, stored.shape, stored.dtype, loads[name]) for name, stored in state.items()}, located


def _from_torch(path: Path, mapped: bool, chosen: str) -> tuple[dict[str, Tensor], _State]:
    import torch

    def is_tensor(value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def open_state() -> _State:
        try:
            tree = torch.load(path, weights_only=True, mmap=mapped, map_location="cpu")
        # torch raises RuntimeError, UnpicklingError, KeyError, EOFError and more, by what is wrong with the file.
        except Exception as error:
            raise ConvertError(_torch_fault(path, str(error))) from error
        return _locate(tree, is_tensor, path, chosen)

    located = open_state()
    state = located.tensors
    opened, read = [state], [0]

    def loader(name: str, tensor: Tensor) -> Callable[[], np.ndarray]:
        def load() -> np.ndarray:
            if mapped and read[0] > _REMAP_AFTER:
                opened[0], read[0] = {}, 0
                opened[0] = open_state().tensors
            found = opened[0].get(name)
            if found is None or (tuple(found.shape), _torch_dtype(found)) != (tensor.shape, tensor.dtype):
                raise ConvertError(f"{path}: tensor {name!r} has changed since the file was opened")
            array = _to_numpy(found, torch_reader.DTYPES[tensor.dtype])
            read[0] += array.nbytes
            return array

        return load

    tensors = {}
    for name, tensor in state.items():
        where, dtype = f"{path}: tensor {name!r}", _torch_dtype(tensor)
        if dtype not in torch_reader.DTYPES or tensor.layout != torch.strided:
            raise ConvertError(f"{where} is {tensor.layout} of {tensor.dtype}; expected a dense float or integer tensor")
        entry = Tensor(name, tuple(tensor.shape), dtype, np.zeros)
        torch_reader.size_of(entry.shape, where, torch_reader.DTYPES[dtype], tensor.untyped_storage().nbytes())
        tensors[name] = replace(entry, load=loader(name, entry))
    return tensors, located


def _torch_dtype(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _to_numpy(tensor: Any, dtype: np.dtype) -> np.ndarray:
    import torch

    tensor = tensor.detach()
    if dtype.isbuiltin != 1:
        # numpy has no such type of its own, and torch does not hand these over; the bits travel as integers.
        bits = {1: torch.uint8, 2: torch.int16}[dtype.itemsize]
        return tensor.contiguous().view(bits).numpy().copy().view(dtype)
    return tensor.numpy(force=True).copy(order="C")


def _torch_fault(path: Path, text: str) -> str:
    refused = re.search(r"GLOBAL ([\w.]+)", text)
    if refused:
        return (
            f"{path} was refused by torch's weights_only reader: its pickle names {refused[1]}, where only tensors and plain "
            "values are allowed, and loading it in full could run code; save the state dict alone or as .safetensors"
        )
    # torch's own message begins with advice to switch its protection off; the fault comes after.
    text = " ".join(text.split()).rpartition("WeightsUnpickler error: ")[2].partition(" Check the documentation")[0]
    return f"{path} cannot be read by torch's weights_only reader: {text[:300]}; get the file again"


def _locate(tree: Any, is_tensor: Callable[[Any], bool], path: Path, chosen: str) -> _State:
    """The state dict: the whole tree, or the one under a key of the `chosen` kind ('ema' or 'plain'; '' plain before EMA)."""
    if not isinstance(tree, dict):
        raise ConvertError(f"{path} holds a {type(tree).__name__}; expected a state dict, or one under {_names(STATE_KEYS)}")

    def holds_tensors(value: Any) -> bool:
        return isinstance(value, dict) and any(map(is_tensor, value.values()))

    bare = bool(tree) and all(map(is_tensor, tree.values()))
    there = [] if bare else [name for name in STATE_KEYS if holds_tensors(tree.get(name))]
    wanted = {"": STATE_KEYS, "plain": PLAIN_KEYS, "ema": EMA_KEYS}[chosen]
    key = next((name for name in there if name in wanted), None)
    if chosen and key is None:
        raise ConvertError(
            f"{path} holds no {chosen} weights: expected tensors under {_names(wanted)}, found {_names(there) or 'others'}"
        )
    if key is None and not holds_tensors(tree):
        raise ConvertError(
            f"{path} holds no state dict: expected tensors at its top or under {_names(STATE_KEYS)}, found the keys "
            f"{_names(map(str, tree)) or '(none)'}"
        )
    state = tree if key is None else tree[key]
    wrong = [name for name, value in state.items() if not isinstance(name, str) or not (is_tensor(value) or key is None)]
    if wrong:
        raise ConvertError(f"{path}: {key or 'the state dict'} holds more than named tensors: {_names(map(str, wrong))}")
    rest = {name: value for name, value in tree.items() if name != key and not str(name).startswith("optimizer")}
    others = tuple(name for name in there if name != key)
    extra = _plain(rest, path)
    if groups := _optimizer_groups(tree):
        extra[OPTIMIZER_GROUPS] = groups
    return _State({name: value for name, value in state.items() if is_tensor(value)}, extra, key or "", others)


def _optimizer_groups(tree: dict) -> list[str]:
    """Names of the parameter groups of the optimizer that a training checkpoint holds: what was trained."""
    optimizer = tree.get("optimizer_state_dict")
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    names = [group.get("name") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return [name for name in names if isinstance(name, str)]


def _names(names: Iterable[str]) -> str:
    names = [name[:80] for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


_DROPPED = object()


def _plain(value: Any, path: Path) -> Any:
    """The strings, numbers, None, dicts and lists among a checkpoint's other entries, without tensors and other objects."""
    budget = [_MOST_VALUES]

    def convert(node: Any, depth: int) -> Any:
        budget[0] -= 1
        if depth > _DEEPEST_VALUE or budget[0] < 0:
            raise ConvertError(f"{path}: too many values beside the state dict, or nested too deep; save the state dict alone")
        if isinstance(node, dict):
            pairs = ((key, convert(item, depth + 1)) for key, item in node.items() if isinstance(key, str | int | float))
            return {key: item for key, item in pairs if item is not _DROPPED}
        if isinstance(node, list | tuple | set):
            items = (convert(item, depth + 1) for item in node)
            return [item for item in items if item is not _DROPPED]
        return node if node is None or isinstance(node, str | int | float) else _DROPPED

    return convert(value, 0)

"""Writes files in PyTorch's zip format without PyTorch, for torch.load(weights_only=True, mmap=True)."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from icar_jax.convert.fields import ConvertError

_STORAGES = {
    **{"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "bool": "Bool"},
    **{"int64": "Long", "int32": "Int", "int16": "Short", "int8": "Char", "uint8": "Byte"},
}
_ROOT = "archive"
_ALIGNMENT = 64
# Members of at least this size have headers with 64-bit sizes.
_ZIP64_FROM = 1 << 30


@dataclass
class _Pickle:
    """A pickle while it is written, and the tensors that it refers to by the number of their storage."""

    parts: list[bytes] = field(default_factory=lambda: [b"\x80\x02"])
    tensors: list[Any] = field(default_factory=list)
    storage_of: dict[int, int] = field(default_factory=dict)


def write_torch(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` (dicts, lists and tuples of plain values and tensors) to `path`, replacing a file there.

    A tensor is anything with shape, dtype (or its name) and __array__: numpy and JAX arrays, numpy scalars, Tensor of
    icar_jax.convert.files.tensors. Their values are computed one at a time; one that occurs twice is stored once.
    Raises ConvertError, naming the place, for any other value.
    """
    pickle = _Pickle()
    _emit(pickle, obj, "the saved object")
    content = b"".join([*pickle.parts, b"."])
    with open(Path(path), "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        _add(archive, stream, "data.pkl", content)
        _add(archive, stream, "byteorder", b"little")
        for number, tensor in enumerate(pickle.tensors):
            _add(archive, stream, f"data/{number}", _bytes_of(tensor, number))
        _add(archive, stream, "version", b"3\n")


def _add(archive: zipfile.ZipFile, stream: Any, name: str, content: bytes | memoryview) -> None:
    """Adds a member whose bytes begin at a multiple of 64, as mapped files need."""
    info = zipfile.ZipInfo(f"{_ROOT}/{name}")
    large = len(content) >= _ZIP64_FROM
    header = 30 + len(info.filename) + (20 if large else 0) + 4
    padding = -(stream.tell() + header) % _ALIGNMENT
    info.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(content)


def _bytes_of(tensor: Any, number: int) -> memoryview:
    array = np.asarray(tensor)
    if array.shape != tuple(tensor.shape) or array.dtype != _dtype(tensor):
        raise ConvertError(
            f"tensor {number} was announced as {_dtype(tensor)}{tuple(tensor.shape)} and is {array.dtype}{array.shape}"
        )
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _dtype(tensor: Any) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if str(tensor.dtype) == "bfloat16" else np.dtype(tensor.dtype)


def _emit(pickle: _Pickle, value: Any, where: str) -> None:
    out = pickle.parts
    if hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__array__"):
        _emit_tensor(pickle, value, where)
    elif value is None:
        out.append(b"N")
    elif isinstance(value, bool):
        out.append(b"\x88" if value else b"\x89")
    elif isinstance(value, int):
        out.append(_integer(value))
    elif isinstance(value, float):
        out.append(b"G" + struct.pack(">d", value))
    elif isinstance(value, str):
        out.append(_text(value))
    elif isinstance(value, dict):
        out.append(b"}(")
        for key, item in value.items():
            if not isinstance(key, str | int):
                raise ConvertError(f"{where}: key {key!r} is a {type(key).__name__}; expected a string or an integer")
            _emit(pickle, key, where)
            _emit(pickle, item, f"{where}[{key!r}]")
        out.append(b"u")
    elif isinstance(value, list | tuple):
        out.append(b"](" if isinstance(value, list) else b"(")
        for index, item in enumerate(value):
            _emit(pickle, item, f"{where}[{index}]")
        out.append(b"e" if isinstance(value, list) else b"t")
    else:
        raise ConvertError(f"{where} is a {type(value).__name__}; expected a tensor, a plain value, a dict, a list or a tuple")


def _emit_tensor(pickle: _Pickle, tensor: Any, where: str) -> None:
    name = str(tensor.dtype)
    if name not in _STORAGES:
        raise ConvertError(f"{where} has dtype {name}; expected one of {', '.join(_STORAGES)}")
    if id(tensor) not in pickle.storage_of:
        pickle.storage_of[id(tensor)] = len(pickle.tensors)
        pickle.tensors.append(tensor)
    number, shape, strides, count = pickle.storage_of[id(tensor)], tuple(tensor.shape), [], 1
    for length in reversed(shape):
        strides.append(count)
        count *= length
    pickle.parts += [
        b"ctorch._utils\n_rebuild_tensor_v2\n((",
        *(_text("storage"), f"ctorch\n{_STORAGES[name]}Storage\n".encode(), _text(str(number)), _text("cpu"), _integer(count)),
        b"tQK\x00",
        *(b"(", *map(_integer, shape), b"t("),
        *(*map(_integer, reversed(strides)), b"t\x89"),
        b"ccollections\nOrderedDict\n)RtR",
    ]


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    if len(content) > 255:
        raise ConvertError("an integer of more than 255 bytes cannot be saved")
    return b"\x8a" + bytes([len(content)]) + content


def _text(value: str) -> bytes:
    content = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(content)) + content

"""Reads safetensors files one tensor at a time, including dtypes that numpy lacks.

The library's numpy interface refuses bfloat16 and maps the file, whose pages then count as memory. The format is a JSON header
in front of the values; it is checked as strictly as by the library.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files import torch_reader
from icar_jax.files import json_file
from icar_jax.files.opening import open_regular

_LARGEST_HEADER = 100_000_000
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64", "BOOL": "bool"},
    **{f"{sign}{bits}": f"{kind}{bits}" for sign, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
}


def matches(head: bytes) -> bool:
    """Whether a file that begins with `head` looks like safetensors."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER


def read(path: str | os.PathLike) -> dict[str, tuple[tuple[int, ...], str, Callable[[], np.ndarray]]]:
    """{name: (shape, dtype name, a function that reads the tensor)}.

    Raises ConvertError, naming the tensor, where the header is damaged or does not cover the file exactly.
    """
    path = Path(path)
    try:
        with open_regular(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size - 8 - length
            if size < 0 or length > _LARGEST_HEADER:
                raise ValueError(f"it states {length:,} bytes, the file has {size + 8 + length:,}")
            text = stream.read(length)
        header = json_file.require_object(
            json_file.parse(text, path, ConvertError, json_file.without_duplicates), path, ConvertError
        )
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path} has a damaged or truncated safetensors header: {str(error)[:200]}") from error
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        where = f"{path}: tensor {name!r}"
        entry = entry if isinstance(entry, dict) else {}
        code, shape, span = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not isinstance(code, str) or not _sizes(shape) or not _sizes(span) or len(span) != 2:
            raise ConvertError(f"{where} has a damaged header entry; expected dtype, shape and two data_offsets")
        if code not in _DTYPES:
            raise ConvertError(f"{where} has dtype {code[:20]}; expected one of {', '.join(_DTYPES)}")
        dtype, shape, (start, end) = torch_reader.DTYPES[_DTYPES[code]], tuple(shape), span
        if end > size:
            raise ConvertError(f"{where} ends at byte {end} of {size}: the file is truncated; get it again")
        needed = torch_reader.size_of(shape, where, dtype, size) * dtype.itemsize
        if end - start != needed:
            raise ConvertError(f"{where} of {code}{shape} needs {needed} bytes, its offsets give {end - start}")
        spans.append((start, end, name))
        tensors[name] = (shape, dtype.name, _loader(path, 8 + length + start, needed, dtype, shape, where))
    reached = 0
    for start, end, name in sorted(spans):
        if start != reached:
            fault = "overlaps the one before it" if start < reached else "leaves a gap before it"
            raise ConvertError(f"{path}: tensor {name!r} {fault}; the file is damaged, get it again")
        reached = end
    if reached != size:
        raise ConvertError(f"{path} holds {size - reached} bytes that belong to no tensor; the file is damaged, get it again")
    return tensors


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def _loader(path: Path, offset: int, nbytes: int, dtype: np.dtype, shape: tuple[int, ...], where: str):
    return lambda: torch_reader.typed(torch_reader.read_bytes(path, offset, nbytes, where), dtype).reshape(shape)

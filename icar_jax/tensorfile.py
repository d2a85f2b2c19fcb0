"""Writes a safetensors file one tensor at a time.

The writer of the safetensors package keeps a second copy of all tensors in memory. Here a converted model is read, changed and
written leaf by leaf, so memory does not grow with the model.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_NAMES = {"float32": "F32", "float16": "F16"}


@dataclass(frozen=True)
class WrittenFile:
    """Hex SHA-256 of the file, and the names of the tensors that contain NaN or infinity."""

    sha256: str
    not_finite: list[str]


def write(
    path: str | os.PathLike,
    leaves: Mapping[str, Any],
    dtype: str = "float32",
    metadata: Mapping[str, str] | None = None,
    on_leaf: Callable[[str], None] = lambda name: None,
) -> WrittenFile:
    """Writes {name: array, or object with `shape` and `__array__`} as `dtype` ('float32' or 'float16').

    Each leaf is read once and released; `on_leaf(name)` is called after it. Raises ValueError if the array of a leaf does not
    have the leaf's shape, OSError if the disk fails.
    """
    itemsize = np.dtype(dtype).itemsize
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, leaf in leaves.items():
        shape = list(np.shape(leaf))
        start, end = end, end + itemsize * math.prod(shape)
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest, broken = hashlib.sha256(), []
    with open(path, "wb") as file:
        for head in (len(text).to_bytes(8, "little"), text):
            digest.update(head)
            file.write(head)
        for name, leaf in leaves.items():
            # Not np.ascontiguousarray, which turns scalars into vectors of length one.
            array = np.asarray(leaf, np.float32).astype(dtype, order="C", copy=False)
            if list(array.shape) != header[name]["shape"]:
                raise ValueError(f"{name} has shape {array.shape}, declared as {header[name]['shape']}")
            if not np.isfinite(array).all():
                broken.append(name)
            data = memoryview(array.reshape(-1)).cast("B") if array.size else b""
            digest.update(data)
            file.write(data)
            on_leaf(name)
    return WrittenFile(digest.hexdigest(), broken)

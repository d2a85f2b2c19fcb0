"""Outputs of frozen towers, kept in files: one row for each image (or for each augmented view of it) and for each caption.

A folder holds `rows.bin` (the outputs, one after the other), `first.bin` (int64: for each image the number of its first row, -1
if it cannot be read, and at the end the number of all rows), for captions also `truncated.bin` (a byte each), and `done.json`,
which is written last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from icar_jax.files import json_file

DONE, ROWS, FIRST, TRUNCATED = "done.json", "rows.bin", "first.bin", "truncated.bin"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class KeptRows:
    """The rows of one folder; opened when first read, so that it can be sent to worker processes.

    Attributes:
        folder: where the files lie.
        shape: of one row.
        dtype: 'float32' or 'bfloat16'.
        views: rows of one image; 0 for captions, of which each image has its own number.
    """

    folder: Path
    shape: tuple[int, ...]
    dtype: str
    views: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the rows that were written, perhaps by a computation that was stopped."""
        file = self.folder / ROWS
        return file.stat().st_size if file.is_file() else 0

    @property
    def complete(self) -> bool:
        """Whether all rows were written."""
        return (self.folder / DONE).is_file()

    @cached_property
    def first(self) -> np.ndarray:
        """int64 [images + 1]."""
        return np.fromfile(self.folder / FIRST, np.int64)

    @cached_property
    def truncated(self) -> np.ndarray:
        """bool [captions]."""
        return np.fromfile(self.folder / TRUNCATED, np.uint8).astype(bool)

    @cached_property
    def _rows(self) -> np.ndarray:
        count = json_file.Fields.read(self.folder / DONE).required("rows", int)
        return np.memmap(self.folder / ROWS, DTYPES[self.dtype], "r", shape=(count, *self.shape))

    def readable(self, image: int) -> bool:
        """Whether the image with this index has rows."""
        return bool(self.first[image] >= 0)

    def row(self, image: int, which: int) -> int:
        """Returns the number of row `which` (a view, or a caption) of an image."""
        return int(self.first[image]) + which

    def take(self, rows: list[int]) -> np.ndarray:
        """Returns rows [n, *shape]."""
        return np.stack([self._rows[row] for row in rows])

    def __getstate__(self) -> dict:
        return {name: getattr(self, name) for name in ("folder", "shape", "dtype", "views")}

    def __setstate__(self, state: dict) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class KeptOutputs:
    """What replaces the images, or the captions, of training batches; None: they are read as usual."""

    image: KeptRows | None = None
    text: KeptRows | None = None

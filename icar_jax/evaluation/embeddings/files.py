"""Embeddings in files, of this package or of other libraries: .npz, .npy and Parquet; and which text belongs to which image."""

from __future__ import annotations

import csv
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax.errors import DataError
from icar_jax.files import arrays, json_file, limits
from icar_jax.files.opening import open_regular

ROWS = ("embeddings", "embedding")  # name of the array or column of vectors
NAMES = ("names", "name", "file", "path", "url", "id", "ids", "key")
IMAGE = ("image", "caption_image")  # of a text: name or row of its image
_CHUNK = 8192  # rows converted at a time
_UNIT = 1e-3  # lengths that differ from 1 by less are left as they are


@dataclass(frozen=True)
class Embeddings:
    """N vectors of a file.

    where: the file. rows: float32 [N, D], of length 1 if `normalise`. names: of the rows, or None. image: name or row of the
    image that each text belongs to, [N], or None. normalised: whether lengths were changed.
    """

    where: str
    rows: np.ndarray
    names: list[str] | None
    image: np.ndarray | None
    normalised: bool

    def __len__(self) -> int:
        return len(self.rows)


def read_embeddings(path: str | os.PathLike, normalise: bool = True) -> Embeddings:
    """Reads an .npz with one array [N, D] and optionally names, an .npy, or a Parquet table with a column of lists of numbers.

    Raises DataError for another file, several arrays that could be meant, and vectors that are not finite or zero.
    """
    path = Path(path).expanduser()
    readers = {".npz": _from_npz, ".npy": _from_npy, ".parquet": _from_parquet}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: expected embeddings in an .npz, .npy or .parquet file, found {path.suffix or 'no suffix'}")
    rows, beside = readers[path.suffix.lower()](path)
    if not len(rows):
        raise DataError(f"{path}: expected embeddings, found none (shape {list(rows.shape)})")
    rows, normalised = _checked(path, rows, normalise)
    names, image = _column(beside, NAMES), _column(beside, IMAGE)
    for name, column in (("names", names), ("image", image)):
        if column is not None and column.shape != (len(rows),):
            raise DataError(f"{path}: {name} has shape {list(column.shape)}; expected [{len(rows)}], one for each vector")
    return Embeddings(str(path), rows, None if names is None else list(map(str, names.tolist())), image, normalised)


def write_embeddings(path: Path, rows: np.ndarray, **beside: np.ndarray) -> None:
    """Writes an .npz with `embeddings` (float32) and arrays beside it, atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.npz")
    try:
        np.savez(temporary, embeddings=np.asarray(rows, np.float32), **beside)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_pairs(path: str | os.PathLike, images: Embeddings, texts: Embeddings) -> np.ndarray:
    """int64 [M]: row of the image of each text, from a file.

    A table (.csv, .tsv, .parquet) has the column `image` and, if its rows are not those of the texts, `text`; both hold names
    or row numbers from 0. A .json is a list, an .npy or .npz an array, of the image of each text. Raises DataError.
    """
    path = Path(path).expanduser()
    kind = path.suffix.lower()
    text: Sequence[Any] | None = None
    if kind in (".csv", ".tsv", ".txt"):
        image, text = _pairs_of_table(path)
    elif kind == ".parquet":
        columns = _parquet_columns(path, ("image", "text"))
        if "image" not in columns:
            raise DataError(f"{path}: expected the column image and optionally text, found neither")
        image, text = columns["image"], columns.get("text")
    elif kind == ".json":
        image = json_file.read(path)
        if not isinstance(image, list):
            raise DataError(f"{path}: expected a list with the image of each text, found {type(image).__name__}")
    elif kind in (".npy", ".npz"):
        image = _array(path, "image").tolist()
    else:
        raise DataError(f"{path}: expected pairs in a .csv, .tsv, .json, .npy, .npz or .parquet file")
    found = rows_of(image, images, f"{path}: image")
    if text is None:
        order = np.arange(len(found))
    else:
        order = rows_of(text, texts, f"{path}: text")
    return _complete(order, found, texts, str(path))


def _complete(order: np.ndarray, found: np.ndarray, texts: Embeddings, where: str) -> np.ndarray:
    if len(order) != len(texts) or len(np.unique(order)) != len(texts) or (len(order) and order.max() >= len(texts)):
        distinct = len(np.unique(order))
        raise DataError(
            f"{where}: {len(order)} pairs name {distinct} texts, and {texts.where} has {len(texts)}; every text "
            "belongs to one image"
        )
    owner = np.empty(len(texts), np.int64)
    owner[order] = found
    return owner


def rows_of(values: Sequence[Any], among: Embeddings, where: str) -> np.ndarray:
    """int64 [n]: the rows that names, or row numbers from 0, mean. Raises DataError that names the first without a row."""
    known = {name: row for row, name in enumerate(among.names)} if among.names is not None else {}
    if among.names is not None and len(known) != len(among.names):
        double = next(name for row, name in enumerate(among.names) if known[name] != row)
        raise DataError(f"{among.where}: the name {double!r} stands for several rows; names must be unique to pair them")
    numbers = [_number(value) if not known or not isinstance(value, str) else None for value in values]
    named = [known.get(str(value)) for value in values]
    in_range = [number is not None and 0 <= number < len(among) for number in numbers]
    if known and all(in_range) and named != numbers and None not in named:
        raise DataError(
            f"{where}: the numbers could be names of {among.where} and could be its rows, which differ; write names that are "
            "no numbers, or leave the names out"
        )
    found = numbers if None in named and all(in_range) else named if known else numbers
    for place, row in enumerate(found):
        if row is None or not 0 <= row < len(among):
            if among.names:
                expected = f"one of its names, such as {among.names[0]!r}"
            else:
                expected = f"a row number from 0 to {len(among) - 1}, since it holds no names"
            raise DataError(f"{where}, entry {place}: {values[place]!r:.80} is no row of {among.where}; expected {expected}")
    return np.array(found, np.int64)


def _number(value: Any) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isinstance(value, str) or number == value else None


def _pairs_of_table(path: Path) -> tuple[list[str], list[str] | None]:
    try:
        with open_regular(path) as stream:
            lines = stream.read().decode("utf-8-sig").splitlines()
        reader = csv.DictReader(lines, delimiter="\t" if lines and "\t" in lines[0] else ",", strict=True)
        columns = reader.fieldnames or []
        if "image" not in columns:
            raise DataError(f"{path}, line 1: expected the column image and optionally text, found {', '.join(columns)}")
        rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not readable as a table in UTF-8: {error}") from error
    if any(row["image"] is None or ("text" in columns and row["text"] is None) for row in rows):
        raise DataError(f"{path}: some lines have fewer than {len(columns)} columns ({', '.join(columns)})")
    return [row["image"] for row in rows], [row["text"] for row in rows] if "text" in columns else None


def _array(path: Path, name: str) -> np.ndarray:
    if path.suffix.lower() == ".npy":
        found = arrays.map_npy(path, DataError)
    else:
        named = arrays.read_npz(path, DataError, limits.EMBEDDING_BYTES)
        found = named[name] if name in named else next(iter(named.values())) if len(named) == 1 else None
        if found is None:
            raise DataError(f"{path}: expected the array {name}, found {', '.join(named)}")
    if found.ndim != 1:
        raise DataError(f"{path}: expected one image for each text, found shape {list(found.shape)}")
    return np.asarray(found)


def _column(beside: Mapping[str, np.ndarray], names: Sequence[str]) -> np.ndarray | None:
    return next((beside[name] for name in names if name in beside), None)


def _from_npy(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    rows = arrays.map_npy(path, DataError)
    if rows.ndim != 2 or not _are_numbers(rows):
        raise DataError(f"{path}: expected an array [rows, dimensions] of numbers, found {rows.dtype} {list(rows.shape)}")
    return rows, {}


def _from_npz(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    found = arrays.read_npz(path, DataError, limits.EMBEDDING_BYTES)
    vectors = [name for name, array in found.items() if array.ndim == 2 and _are_numbers(array)]
    name = next((name for name in ROWS if name in vectors), vectors[0] if len(vectors) == 1 else None)
    if name is None:
        listed = ", ".join(f"{n} {a.dtype} {list(a.shape)}" for n, a in found.items())
        raise DataError(f"{path}: expected one array [rows, dimensions] of numbers, or `embeddings`; found {listed or 'none'}")
    return found[name], {n: a for n, a in found.items() if a.ndim == 1}


def _are_numbers(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.floating)


def _from_parquet(path: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyarrow.types as t

    try:
        with pq.ParquetFile(path) as file:
            listed = [field.name for field in file.schema_arrow if _is_vector(field.type)]
            column = next((name for name in ROWS if name in listed), listed[0] if len(listed) == 1 else None)
            if column is None:
                columns = ", ".join(f"{field.name} ({field.type})"[:80] for field in file.schema_arrow)
                raise DataError(
                    f"{path}: expected one column of lists of floating-point numbers, or `embeddings`; it has {columns}"
                )
            total, rows, start = file.metadata.num_rows, None, 0
            for batch in file.iter_batches(_CHUNK, columns=[column]):
                part = batch.column(0)
                if t.is_list(part.type) or t.is_large_list(part.type):
                    lengths = np.diff(part.offsets.to_numpy())
                else:
                    lengths = np.full(len(part), part.type.list_size)
                width = int(lengths[0]) if rows is None else rows.shape[1]
                values = part.flatten()
                if part.null_count or values.null_count or (lengths != width).any():
                    raise DataError(f"{path}: rows from {start}: expected {width} numbers in each of the column {column}")
                rows = np.empty((total, width), np.float32) if rows is None else rows
                rows[start : start + len(part)] = values.to_numpy(zero_copy_only=False).reshape(-1, width)
                start += len(part)
            rest = [n for n in (*NAMES, *IMAGE) if n in file.schema_arrow.names]
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a complete Parquet file: {error}; fetch or write it again") from error
    beside = {name: np.array(values) for name, values in _parquet_columns(path, rest).items()}
    return (np.empty((0, 0), np.float32) if rows is None else rows), beside


def _is_vector(kind: Any) -> bool:
    import pyarrow.types as t

    listed = t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)
    return listed and t.is_floating(kind.value_type)


def _parquet_columns(path: Path, wanted: Sequence[str]) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = [name for name in wanted if name in file.schema_arrow.names]
            table = file.read(columns=names)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from error
    return {name: table.column(name).to_pylist() for name in names}


def _checked(path: Path, rows: np.ndarray, normalise: bool) -> tuple[np.ndarray, bool]:
    """(float32 [N, D], whether they were normalised). Raises DataError for rows that are not finite, or zero if normalised."""
    found = np.empty(rows.shape, np.float32) if rows.dtype != np.float32 or not rows.flags.writeable else rows
    lengths = np.empty(len(rows), np.float64)
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        with np.errstate(over="ignore", invalid="ignore"):
            found[part] = rows[part]
            lengths[part] = np.sqrt(np.einsum("nd,nd->n", found[part], found[part], dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(lengths) | ((lengths == 0) & normalise))
    if bad.size:
        raise DataError(f"{path}: {bad.size} of {len(rows)} vectors are zero or not finite (first: row {bad[0]})")
    if not normalise or np.abs(lengths - 1).max() < _UNIT:
        return found, False
    for start in range(0, len(rows), _CHUNK):
        part = slice(start, start + _CHUNK)
        found[part] /= lengths[part, None].astype(np.float32)
    return found, True

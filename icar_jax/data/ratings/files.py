"""Readers of rating files: IC9600's text format, JSON annotations, and CSV or Parquet tables.

Invalid lines are returned with the reason, to be counted; an invalid file raises an error.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from icar_jax.errors import DataError
from icar_jax.files import json_file

CATEGORY = "category"  # column
SUFFIXES = (".txt", ".json", ".csv", ".parquet")


class RatingsError(DataError):
    """A rating file that cannot be used; the message starts with its path."""


class Line(NamedTuple):
    """One rating of a file.

    place: 'line 7', "key 'a.jpg'" or 'row 7', counted from 1. value: the number found, not yet checked. fault: why the line
    is invalid, or ''. category: of the column `category`, or ''.
    """

    place: str
    name: str
    value: float = float("nan")
    fault: str = ""
    category: str = ""


class Lines(NamedTuple):
    """The lines of a file; `key` is the kind of their names, 'file' or 'url'."""

    key: str
    lines: list[Line]


def read_lines(path: Path) -> Lines:
    """Reads the lines of a rating file by its suffix. Raises FileNotFoundError, OSError, RatingsError."""
    readers = {".txt": _text, ".json": _annotations, ".csv": _table, ".parquet": _parquet}
    if path.suffix.lower() not in readers:
        raise RatingsError(f"{path}: expected ratings in a {', '.join(SUFFIXES)} file, found {path.suffix or 'no suffix'}")
    if not path.is_file():
        beside = ", ".join(sorted(p.name for s in SUFFIXES for p in path.parent.glob(f"*{s}"))[:5])
        raise FileNotFoundError(f"ratings file {path} not found; {path.parent} has {beside or 'no such files'}")
    return readers[path.suffix.lower()](path)


def _text(path: Path) -> Lines:
    """Reads IC9600's format, `name<two spaces>score`; names may contain single spaces."""
    lines = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as stream:
        for number, text in enumerate(stream, start=1):
            if not text.strip():
                continue
            name, _, score = text.rstrip().rpartition("  ")
            place = f"line {number}"
            if not name.strip():
                lines.append(Line(place, "", fault=f"expected `name<two spaces>score`, found {text.strip()!r:.80}"))
            else:
                lines.append(_line(place, name, score))
    return Lines("file", lines)


def _table(path: Path) -> Lines:
    """Reads a CSV file with the columns `file` or `url`, `score` and optionally `category`; other columns are ignored."""
    lines = []
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            key, columns = _key(path, reader.fieldnames or []), reader.fieldnames or []
            for row in reader:
                place = f"line {reader.line_num}"
                if None in row or None in row.values():
                    found = len(row.get(None) or ()) + sum(v is not None for k, v in row.items() if k is not None)
                    expected = f"expected {len(columns)} columns ({', '.join(columns)}), found {found}"
                    lines.append(Line(place, "", fault=expected))
                else:
                    lines.append(_line(place, row[key], row["score"], row.get(CATEGORY, "")))
        except csv.Error as error:
            raise RatingsError(f"{path}, line {reader.line_num + 1}: not readable as CSV: {error}") from error
    return Lines(key, lines)


def _key(path: Path, columns: Any) -> str:
    named = [key for key in ("file", "url") if key in columns]
    if len(named) != 1 or "score" not in columns:
        raise RatingsError(
            f"{path}, header: expected the columns score and either file or url, found {', '.join(columns) or 'nothing'}"
        )
    return named[0]


def _parquet(path: Path) -> Lines:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            key = _key(path, file.schema_arrow.names)
            columns = [key, "score", *([CATEGORY] if CATEGORY in file.schema_arrow.names else [])]
            table = file.read(columns=columns)
    except pa.ArrowInvalid as error:
        raise RatingsError(f"{path}: not a complete Parquet file: {error}; fetch or write it again") from error
    rows = zip(*(table.column(name).to_pylist() for name in columns), strict=True)
    return Lines(key, [_line(f"row {number}", *row) for number, row in enumerate(rows, start=1)])


def _annotations(path: Path) -> Lines:
    """Reads JSON `{file: score}` or `{file: 0 | 1 | -1}`; duplicate keys are kept as separate lines. Keys may all be URLs."""

    class Pairs(list):
        pass

    found = json_file.read(path, RatingsError, pairs=Pairs)
    if not isinstance(found, Pairs):
        raise RatingsError(f"{path}: expected an object {{file: score}}, found {type(found).__name__}")
    urls = bool(found) and all(name.startswith(("http://", "https://")) for name, _ in found)
    return Lines("url" if urls else "file", list(_checked_keys(found)))


def _checked_keys(pairs: list[tuple[str, Any]]) -> Iterator[Line]:
    for name, value in pairs:
        if isinstance(value, str):  # numbers must not be strings in JSON
            yield Line(f"key {name!r}", name, fault=f"expected a number, found the text {value!r:.80}")
        else:
            yield _line(f"key {name!r}", name, value)


def _line(place: str, name: Any, value: Any, category: Any = "") -> Line:
    if not isinstance(name, str) or not name.strip():
        return Line(place, "", fault=f"expected a name, found {name!r:.80}")
    name = name.strip()
    if any("\udc80" <= letter <= "\udcff" for letter in name):
        return Line(place, "", fault=f"the name is not UTF-8: {ascii(name):.80}")
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None:
        return Line(place, name, fault=f"{name}: expected a number, found {value!r:.80}")
    return Line(place, name, number, category=str(category or "").strip())

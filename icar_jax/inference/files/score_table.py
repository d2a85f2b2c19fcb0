"""Score tables on disk: CSV, JSON, JSON lines or Parquet, written atomically."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from icar_jax.config import ConfigError
from icar_jax.data.sources.files import ImagePaths
from icar_jax.inference.files.scoring import ScoreRow, score_files
from icar_jax.inference.model import Model
from icar_jax.inference.reading import BadFile
from icar_jax.models.reduction.routes import route_name

COLUMNS = ("file", "score", "exit", "milliseconds")
ROW_GROUP = 65_536  # rows of a Parquet file buffered in memory
_DECIMALS = 3  # of the milliseconds


class _Csv:
    def __init__(self, path: Path, columns: tuple[str, ...] = COLUMNS):
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(columns)

    def add(self, *values: Any) -> None:
        self._writer.writerow(values)  # None is an empty field

    def close(self) -> None:
        _close(self._file)


class _JsonLines:
    before, between, after = "", "\n", "\n"

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8")
        self._file.write(self.before)
        self._first = True

    def add(self, *values: Any) -> None:
        self._file.write("" if self._first else self.between)
        self._file.write(json.dumps(dict(zip(COLUMNS, values, strict=True)), ensure_ascii=False))
        self._first = False

    def close(self) -> None:
        self._file.write(self.after if not self._first or self.before else "")
        _close(self._file)


class _Json(_JsonLines):
    before, between, after = "[\n", ",\n", "\n]\n"


class _Parquet:
    schema = pa.schema([("file", pa.string()), ("score", pa.float32()), ("exit", pa.int32()), ("milliseconds", pa.float64())])

    def __init__(self, path: Path):
        self._writer = pq.ParquetWriter(path, self.schema)
        self._rows: list[tuple] = []

    def add(self, *values: Any) -> None:
        self._rows.append(values)
        if len(self._rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True) if self._rows else [[]] * len(COLUMNS)
        arrays = [pa.array(list(column), kind) for column, kind in zip(columns, self.schema.types, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


def _close(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


FORMATS = {".csv": _Csv, ".json": _Json, ".jsonl": _JsonLines, ".parquet": _Parquet}


class _Atomic:
    """Writes a temporary file next to `path`; `keep` moves it there, `drop` leaves an existing file unchanged."""

    def __init__(self, path: Path, writer: Any):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self.table = writer(self._temporary)

    def keep(self) -> None:
        self.table.close()
        os.replace(self._temporary, self.path)

    def drop(self) -> None:
        if self._temporary.exists():
            with contextlib.suppress(OSError):
                self.table.close()
            self._temporary.unlink(missing_ok=True)


@dataclass
class ScoreSummary:
    """Scores and counts of a run of `write_scores`.

    Attributes:
        scores: float32 [N], in the order of the table.
        files: paths of the scored files with `keep_files`; otherwise empty.
        exits: executed blocks -> images; empty without a bundle.
        bad: number of files that could not be scored; `first_bad` lists the first of them.
        duplicates: number of paths given or found more than once.
        empty: folders and patterns without an image file. left_out: report of what walks left out.
        seconds: wall time, including compilation.
    """

    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    files: list[str] = field(default_factory=list)
    exits: Counter = field(default_factory=Counter)
    bad: int = 0
    first_bad: list[BadFile] = field(default_factory=list)
    duplicates: int = 0
    empty: list[str] = field(default_factory=list)
    left_out: str = ""
    seconds: float = 0.0

    def report(self, threshold: float | None = None) -> str:
        """Summary text: speed, score quantiles, images per exit, and images above a classifier's decision `threshold`."""
        n = len(self.scores)
        low, middle, high = np.quantile(self.scores, [0.05, 0.5, 0.95])
        lines = [
            f"Scored {n:,} images in {self.seconds:.1f} s ({n / self.seconds:.1f} images/s, including start-up): mean "
            f"{self.scores.mean():.3f}, median {middle:.3f}, 90% of them from {low:.3f} to {high:.3f}"
        ]
        lines += [f"  {route_name(depth)}: {count:,} images ({count / n:.1%})" for depth, count in sorted(self.exits.items())]
        if threshold is not None:
            count = int((self.scores > np.float32(threshold)).sum())
            lines.append(f"  complex (score above {threshold:.4g}): {count:,} images ({count / n:.1%})")
        return "\n".join(lines)


def require_writable(path: str | os.PathLike, flag: str, overwrite: bool, suffixes: tuple[str, ...] = ()) -> Path:
    """The path as a Path. Raises ConfigError for another suffix, a folder, or an existing file without `overwrite`."""
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ConfigError(f"{flag} {path} must end in {', '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; give a file name in it")
    if path.exists() and not overwrite:
        raise ConfigError(f"{flag} {path} exists; choose another name, or pass --overwrite to replace it")
    return path


def write_scores(
    model: Model,
    paths: ImagePaths,
    out: str | os.PathLike,
    *,
    bad: str | os.PathLike | None = None,
    overwrite: bool = False,
    threads: int = 0,
    keep_files: bool = False,
    bad_shown: int = 20,
) -> ScoreSummary:
    """Scores files into a table with columns COLUMNS and a progress bar; the suffix of `out` selects the format.

    Unusable files are listed in `bad` (default: OUT.bad.csv) with the reason; the file is absent if there are none. Both files
    are moved into place at the end, so an interrupted run writes neither and keeps an existing table. If no file could be
    scored, no table is written. Rows are in the order of `paths`; see `ScoreRow` for units.
    Raises ConfigError for an unknown suffix or an existing file, NoImages if `paths` contains none, and as `score_files`.
    """
    out = require_writable(out, "--out", overwrite, tuple(FORMATS))
    bad = require_writable(bad or f"{out}.bad.csv", "--bad", overwrite)
    table = _Atomic(out, FORMATS[out.suffix.lower()])
    faults = _Atomic(bad, lambda path: _Csv(path, ("file", "reason")))
    summary, scores = ScoreSummary(), array("f")
    start = time.perf_counter()
    try:
        for row in _with_progress(model, paths, threads):
            if isinstance(row, BadFile):
                faults.table.add(row.file, row.reason)
                summary.bad += 1
                if len(summary.first_bad) < bad_shown:
                    summary.first_bad.append(row)
                continue
            table.table.add(row.file, row.score, row.exit, round(row.milliseconds, _DECIMALS))
            scores.append(row.score)
            if row.exit is not None:
                summary.exits[row.exit] += 1
            if keep_files:
                summary.files.append(row.file)
        if summary.bad:
            faults.keep()
        else:
            bad.unlink(missing_ok=True)  # from an earlier run
        if scores:
            table.keep()
    finally:
        table.drop()
        faults.drop()
    summary.scores = np.array(scores, np.float32)
    summary.duplicates, summary.empty, summary.left_out = paths.duplicates, list(paths.empty), paths.left_out.report()
    summary.seconds = time.perf_counter() - start
    return summary


def _with_progress(model: Model, paths: ImagePaths, threads: int) -> Iterator[ScoreRow | BadFile]:
    with tqdm(total=paths.count(), desc="score", unit=" images") as bar:
        for row in score_files(model, paths.each(bar.update), threads=threads):
            bar.update()
            yield row

"""A corpus of image embeddings on disk: memory-mapped float16 shards with Parquet metadata.

    DIR/
      corpus.json        identity of the model, encoding options, and whether the last run finished
      000000.npy         float16 [rows, D], unit norm up to rounding
      000000.parquet     metadata of the same rows: path, sha256, complexity, exit, milliseconds
      bad.csv            files that could not be embedded, with reasons; absent if there are none

The Parquet file of a shard is moved into place last, and a shard without one is ignored. A killed writer therefore leaves
only complete shards, and the next run continues after them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from icar_jax import workdir
from icar_jax.config import require_local
from icar_jax.errors import IcarError, ModelError
from icar_jax.files import json_file
from icar_jax.files.arrays import map_npy
from icar_jax.files.opening import open_regular

FORMAT = 1
MANIFEST, BAD = "corpus.json", "bad.csv"
SCHEMA = pa.schema(
    [
        ("path", pa.string()), ("sha256", pa.string()), ("complexity", pa.float32()), ("exit", pa.int32()),
        ("milliseconds", pa.float64()),
    ]
)  # fmt: skip
FIXED = ("format", "model", "encoding", "embed_dim", "shard_rows")  # manifest entries that must be equal in later runs


class CorpusError(IcarError, ValueError):
    """A corpus is missing, damaged, in use, or made with another model; the message names the path and the fix."""


class _Fields(json_file.Fields):
    error = CorpusError


class Corpus:
    """A corpus opened by `open_corpus`; embeddings are memory-mapped.

    Attributes:
        manifest: contents of corpus.json; `manifest['model']` is the `Model.identity` it was made with.
        complete: whether the last run embedded all of its input.
        shards: memory-mapped float16 [rows, D] arrays, in row order.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any], names: Sequence[str]):
        self.path, self.manifest = path, dict(manifest)
        self.complete = bool(manifest.get("complete"))
        self.shards = [_open_shard(path, name, manifest["embed_dim"]) for name in names]
        self._names = list(names)
        self._ends = np.cumsum([len(shard) for shard in self.shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Embeddings float16 [n, D] of row indices int [n] or of a slice. Raises IndexError out of range."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, np.int64)
        if rows.ndim != 1 or (len(rows) and (rows.min() < 0 or rows.max() >= len(self))):
            raise IndexError(f"{self.path} expects a list or a slice of row indices from 0 to {len(self) - 1}")
        out = np.empty((len(rows), self.manifest["embed_dim"]), np.float16)
        shard_of = np.searchsorted(self._ends, rows, side="right")
        for shard in np.unique(shard_of):
            mine = shard_of == shard
            out[mine] = self.shards[shard][rows[mine] - (self._ends[shard] - len(self.shards[shard]))]
        return out

    def rows(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Metadata table with one row per embedding; columns of SCHEMA, all by default."""
        tables = [pq.read_table(self.path / f"{name}.parquet", columns=columns) for name in self._names]
        return pa.concat_tables(tables) if tables else SCHEMA.empty_table().select(columns or SCHEMA.names)


def open_corpus(path: str | os.PathLike) -> Corpus:
    """Opens a corpus written by `icar embed`, also while it is being written. Raises CorpusError if it cannot be read."""
    path = Path(path)
    return Corpus(path, read_manifest(path), shard_names(path))


def read_manifest(path: Path) -> dict[str, Any]:
    """Contents of corpus.json. Raises CorpusError if it is missing, unreadable or of another format."""
    file = path / MANIFEST
    if not file.is_file():
        raise CorpusError(f"{path} has no {MANIFEST}; expected a folder written by `icar embed`")
    fields = _Fields.read(file)
    if fields.content.get("format") != FORMAT:
        raise CorpusError(f"{file} has format {fields.content.get('format')!r:.80}; this version reads format {FORMAT}")
    for name in ("embed_dim", "shard_rows"):
        fields.required(name, int)
        fields.positive(name, int)
    for name in ("model", "encoding"):
        fields.section(name)
    fields.get("complete", bool)
    return dict(fields.content)


def shard_names(path: Path) -> list[str]:
    """Names of the complete shards, in order. Raises CorpusError if one is missing in the sequence."""
    names = sorted(file.stem for file in path.glob("[0-9]*.parquet"))
    for number, name in enumerate(names):
        if name != f"{number:06}":
            raise CorpusError(f"{path} is missing {number:06}.parquet; copy the whole folder again, or embed into another one")
    return names


def _open_shard(path: Path, name: str, embed_dim: int) -> np.ndarray:
    try:
        with open_regular(path / f"{name}.parquet") as stream:
            rows = pq.read_metadata(stream).num_rows
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise CorpusError(f"cannot read {path / name}.parquet: {error}; copy the whole folder again") from error
    file = path / f"{name}.npy"
    try:
        array = map_npy(file, CorpusError)
    except CorpusError as error:
        raise CorpusError(f"{error}; copy the whole folder again") from error
    if array.shape != (rows, embed_dim) or array.dtype != np.float16:
        found, wanted = f"{array.dtype} {list(array.shape)}", f"float16 [{rows}, {embed_dim}]"
        raise CorpusError(f"{file} is {found}, expected {wanted}; copy the whole folder again")
    return array


def path_key(path: str) -> bytes:
    """16-byte hash of the absolute path."""
    return hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).digest()


class CorpusWriter:
    """Appends shards to a new or existing corpus; only one writer at a time.

    Args:
        path: folder of the corpus; created if missing.
        manifest: the entries of FIXED except 'format'; they must equal those of an existing corpus.

    Attributes:
        done: `path_key` of every image in the corpus.
        images: number of images in the corpus.

    Use it as a context manager. Raises CorpusError for another model or encoding, for a folder that is not a corpus, and
    while another process writes to it.
    """

    def __init__(self, path: str | os.PathLike, manifest: Mapping[str, Any]):
        require_local("corpus", path)
        self.path = Path(path)
        self._manifest = {"format": FORMAT, **json.loads(json.dumps(manifest))}
        self.done: set[bytes] = set()

    @property
    def images(self) -> int:
        """Number of images in the corpus."""
        return len(self.done)

    def __enter__(self) -> CorpusWriter:
        if self.path.exists() and not self.path.is_dir():
            raise CorpusError(f"{self.path} is a file; name a folder")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released when the process ends, even if killed
        except BlockingIOError:
            os.close(self._lock)
            raise CorpusError(f"another process is writing to {self.path}; wait for it, or choose another folder") from None
        try:
            self._open()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        with suppress(OSError):
            if [entry.name for entry in self.path.iterdir()] == [MANIFEST]:  # no shard was written
                (self.path / MANIFEST).unlink()
            self.path.rmdir()  # fails unless the folder is empty
        os.close(self._lock)

    def _open(self) -> None:
        entries = [entry for entry in self.path.iterdir()]
        for entry in entries:
            if entry.name.startswith(".") and entry.suffix == ".tmp":
                entry.unlink(missing_ok=True)  # left by a killed writer
        if not (self.path / MANIFEST).exists():
            if any(not entry.name.startswith(".") for entry in entries):
                raise CorpusError(f"{self.path} exists and is not a corpus; choose another folder or remove it")
            self._next = 0
            return
        before = read_manifest(self.path)
        now = self._manifest
        changed = [f"{key} was {before.get(key)}, now {now[key]}" for key in FIXED if before.get(key) != now[key]]
        if changed:
            raise CorpusError(
                f"{self.path} was embedded with other settings, and its rows are not comparable with new ones; use the same "
                f"checkpoint and options, or another folder: {'; '.join(changed)}"
            )
        names = shard_names(self.path)
        for name in names:
            _open_shard(self.path, name, self._manifest["embed_dim"])
            for batch in pq.ParquetFile(self.path / f"{name}.parquet").iter_batches(columns=["path"]):
                self.done.update(path_key(path) for path in batch.column(0).to_pylist())
        self._next = len(names)

    def update_manifest(self, **entries: Any) -> None:
        """Writes the manifest with additional entries."""
        workdir.write_text(self.path / MANIFEST, json.dumps({**self._manifest, **entries}, indent=2) + "\n")

    def add_shard(self, embeddings: np.ndarray, columns: Mapping[str, Sequence[Any]]) -> None:
        """Writes a shard: embeddings float [n, D] and the columns of SCHEMA, each of length n.

        Raises ModelError for a non-finite embedding.
        """
        if not np.isfinite(embeddings).all():
            row = int(np.argmin(np.isfinite(embeddings).all(axis=1)))
            raise ModelError(f"the embedding of {columns['path'][row]} is not finite; the model is broken")
        name = f"{self._next:06}"
        buffer = io.BytesIO()
        np.save(buffer, embeddings.astype(np.float16))
        workdir.write_bytes(self.path / f"{name}.npy", buffer.getvalue())
        table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA}, schema=SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        workdir.write_bytes(self.path / f"{name}.parquet", sink.getvalue().to_pybytes())
        self.done.update(path_key(path) for path in columns["path"])
        self._next += 1

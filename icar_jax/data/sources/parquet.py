"""Source for Parquet files with captions and image bytes or paths; random access by row group.

Reading a row reads the image and caption columns of its whole row group. Recent groups are cached, but in shuffled training
order nearly every image is in another group. So write small groups (100 rows, as Hugging Face does for images), or use tar
shards, which need one read per image regardless of their size.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import logging

from icar_jax.config import ConfigError
from icar_jax.data.images import decode
from icar_jax.data.records import Record, Source
from icar_jax.data.sources.shard_paths import find_shards
from icar_jax.data.sources.shards import ShardError, Shards, attempt, texts_or_fault, unusable

if TYPE_CHECKING:
    import pyarrow as pa

_LARGE_GROUP = 32 << 20  # row group size in bytes above which a warning is logged


class Parquet(Source):
    """Random access to the rows of .parquet files, given as a folder, glob or brace range.

    Args:
        root, split, bad_share: see `shard_paths.find_shards`.
        image_column: bytes, a struct with `bytes` (and `path`), or a path relative to the file's folder or to `root`.
        caption_column: text or a list of texts; dots select fields of structs and lists of structs ('sentences.raw'). A row
            without captions is reported like an unreadable image. Empty: captions are not read.
        cache_bytes: memory for cached row groups, per process.

    Raises:
        ConfigError: no files found, or a column is missing or of another type; lists the columns found.
        ShardError: a file is unreadable or damaged.
    """

    def __init__(
        self,
        root: str,
        split: str = ".",
        image_column: str = "image",
        caption_column: str = "caption",
        cache_bytes: int = 256 << 20,
        bad_share: float = 0.0,
    ):
        self.cache_bytes = cache_bytes
        self._paths, labels = find_shards(root, split, ".parquet", bad_share)
        self.name = f"{Path(root).name}/{split}" if split != "." else Path(root).name
        self._root, self._image = os.path.expanduser(root), image_column
        self._captions = [c for c in caption_column.split(".") if c]
        counts, groups, largest = [], [], 0
        for path in self._paths:
            rows, size = attempt(path, functools.partial(self._describe, path))
            groups.append(np.cumsum(rows, dtype=np.int64))
            counts.append(sum(rows))
            largest = max(largest, size)
        self._groups = groups  # per file: cumulative number of rows at the end of each row group
        sizes = [attempt(path, functools.partial(os.path.getsize, path)) for path in self._paths]
        self.shards = Shards(tuple(labels), np.array(counts, np.int64), np.array(sizes, np.int64))
        if not len(self):
            raise ShardError(f"{self._paths[0]} and {len(self._paths) - 1} more: no rows")
        if largest > _LARGE_GROUP:
            logging.warning(
                "%s: row groups of up to %d MiB are slow, because reading an image reads its whole group: write fewer rows "
                "per group (row_group_size=100), or use tar shards", self.name, largest >> 20,
            )  # fmt: skip
        self._make_cache()

    def _make_cache(self) -> None:
        self._lock, self._cache, self._cached = threading.Lock(), OrderedDict(), 0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache", "_cached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_cache()

    @property
    def paths(self) -> tuple[str, ...]:
        """Absolute paths of the shards."""
        return tuple(self._paths)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Record:
        shard, row = self.shards.locate(i)
        group = int(np.searchsorted(self._groups[shard], row, side="right"))
        begin = int(self._groups[shard][group - 1]) if group else 0
        image, *read = (column[row - begin].as_py() for column in self._group(shard, group))
        name = f"{self.shards.labels[shard]}/{row}"
        if not self._captions:
            return Record(name, functools.partial(self._open, image, self._paths[shard], name), ())
        (captions,) = read
        for key in self._captions[1:]:
            captions = _inner(captions, key)
        found, fault = texts_or_fault(captions, f"column {'.'.join(self._captions)!r}")
        if fault:
            return Record(name, functools.partial(unusable, name, fault), ())
        return Record(name, functools.partial(self._open, image, self._paths[shard], name), found)

    def _open(self, image: Any, file: str, name: str) -> Any:
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if not image:
            return unusable(name, f"no image in column {self._image!r}")
        if isinstance(image, bytes):
            return decode(image, name)
        beside = os.path.join(os.path.dirname(file), image)
        path = beside if os.path.exists(beside) else os.path.join(self._root, image)
        return decode(path, f"{name} ({image})")

    def urls(self) -> list[str | None]:
        """Returns the column `url` of every row. Raises ConfigError if a file has none, ShardError if it is damaged."""
        return [url for path in self._paths for url in attempt(path, functools.partial(_urls_of, path))]

    def _group(self, shard: int, group: int) -> tuple[pa.ChunkedArray, ...]:
        """Returns the image column of a row group and, if captions are read, the caption column."""
        with self._lock:
            if (shard, group) in self._cache:
                self._cache.move_to_end((shard, group))
                return self._cache[shard, group][0]
        columns = attempt(self._paths[shard], functools.partial(self._read, self._paths[shard], group))
        size = sum(column.nbytes for column in columns)
        with self._lock:
            if (shard, group) not in self._cache:
                self._cache[shard, group] = columns, size
                self._cached += size
            while self._cached > self.cache_bytes and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1][1]
        return columns

    def _read(self, path: str, group: int) -> tuple[pa.ChunkedArray, ...]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                names = [self._image, *self._captions[:1]]
                table = file.read_row_group(group, columns=names, use_threads=False)
        except pa.ArrowInvalid as error:
            raise ShardError(f"{path}: row group {group} is damaged: {error}") from error
        return tuple(table.column(name) for name in names)

    def _describe(self, path: str) -> tuple[list[int], int]:
        """Checks the columns and returns (rows of each row group, bytes of the largest)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
                groups = [metadata.row_group(g) for g in range(metadata.num_row_groups)]
        except pa.ArrowInvalid as error:
            raise ShardError(f"{path}: not a complete Parquet file: {error}; fetch or write it again") from error
        self._check(path, schema)
        return [g.num_rows for g in groups], max((g.total_byte_size for g in groups), default=0)

    def _check(self, path: str, schema: pa.Schema) -> None:
        found = ", ".join(f"{f.name} ({f.type})"[:80] for f in schema)
        for field, column in (("image_column", self._image), *(("caption_column", c) for c in self._captions[:1])):
            if column not in schema.names:
                raise ConfigError(f"config.data.{field}={column!r}: {path} has no such column; it has {found}")
        if not _is_image(schema.field(self._image).type):
            raise ConfigError(
                f"config.data.image_column={self._image!r} of {path}: expected bytes, a struct with bytes, or paths; it has "
                f"{found}"
            )
        if self._captions and not _is_text(schema.field(self._captions[0]).type, self._captions[1:]):
            raise ConfigError(
                f"config.data.caption_column={'.'.join(self._captions)!r} of {path}: expected text or a list of texts; it has "
                f"{found}"
            )


def _urls_of(path: str) -> list[str | None]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if "url" not in file.schema_arrow.names:
                raise ConfigError(
                    f"{path} has no column 'url', which joins config.data.ratings; it has {', '.join(file.schema_arrow.names)}"
                )
            return file.read(columns=["url"]).column("url").to_pylist()
    except pa.ArrowInvalid as error:
        raise ShardError(f"{path}: damaged: {error}; fetch or write it again") from error


def _is_image(kind: pa.DataType) -> bool:
    import pyarrow.types as t

    if t.is_struct(kind):
        return any(field.name in ("bytes", "path") and _is_image(field.type) for field in kind)
    if t.is_dictionary(kind):
        kind = kind.value_type
    return any(is_(kind) for is_ in (t.is_binary, t.is_large_binary, t.is_string, t.is_large_string, t.is_fixed_size_binary))


def _is_text(kind: pa.DataType, inner: list[str]) -> bool:
    import pyarrow.types as t

    if t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind):
        return _is_text(kind.value_type, inner)
    if t.is_struct(kind):
        return bool(inner) and any(f.name == inner[0] and _is_text(f.type, inner[1:]) for f in kind)
    if t.is_dictionary(kind):
        kind = kind.value_type
    return not inner and any(is_(kind) for is_ in (t.is_string, t.is_large_string, t.is_binary, t.is_large_binary))


def _inner(value: Any, key: str) -> Any:
    if isinstance(value, list):
        return [_inner(item, key) for item in value]
    return None if value is None else value[key]

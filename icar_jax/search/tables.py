"""Tables of a store: schemas, conversion of vectors, and filters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa


def primary_key(name: str) -> pa.Field:
    """A string primary key: Lance rejects a commit whose new keys another writer has added concurrently."""
    return pa.field(name, pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"})


FORMAT = 1
TIME = pa.timestamp("us", tz="UTC")
STATE = ("path", "size", "mtime_ns", "sha256", "exit", "complexity")  # columns of `Store.state`
BAD = pa.schema(
    [primary_key("path"), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("reason", pa.string()), ("found_at", TIME)]
)
RETURNED = pa.schema([primary_key("path"), ("times", pa.int64())])
META = pa.schema([primary_key("key"), ("value", pa.string())])
TABLES = ("images", "bad", "returned", "meta")
SMALL_FRAGMENTS = 8  # a table with more small fragments is compacted
MANY_VERSIONS = 32  # with more versions of a table, replaced ones are kept for a shorter time
KEEP_ALL = timedelta(days=1)  # added to the age of the oldest version, so that none is deleted
_NAMES = 2000  # values in one filter


def image_schema(embed_dim: int) -> pa.Schema:
    """Schema of `images`: `exit` in executed blocks, `milliseconds` of wall time, `vector` float16 [D] with unit norm."""
    return pa.schema(
        [
            primary_key("path"), ("sha256", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()),
            ("caption", pa.string()), ("complexity", pa.float32()), ("exit", pa.int32()), ("milliseconds", pa.float32()),
            ("embedded_at", TIME), ("vector", pa.list_(pa.float16(), embed_dim)),
        ]
    )  # fmt: skip


def vectors(array: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Embeddings float16 [n, D] of a `vector` column of n rows."""
    chunks = array.chunks if isinstance(array, pa.ChunkedArray) else [array]
    parts = [chunk.flatten().to_numpy(zero_copy_only=False).reshape(len(chunk), array.type.list_size) for chunk in chunks]
    return np.concatenate(parts) if parts else np.zeros((0, array.type.list_size), np.float16)


def vector_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """A float16 `vector` column of embeddings float [n, D]."""
    values = np.ascontiguousarray(values, np.float16)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def now() -> datetime:
    """The current UTC time."""
    return datetime.now(UTC)


def meta_table(entries: Mapping[str, Any]) -> pa.Table:
    """Rows of `meta` for some entries, with values as JSON."""
    return pa.table({"key": list(entries), "value": [json.dumps(value) for value in entries.values()]}, META)


def cleanup_age(table: Any, keep: timedelta, keep_of_many: timedelta) -> timedelta | None:
    """Age beyond which old versions of a table should be deleted while compacting it now; None if no compaction is due.

    Replaced versions are kept for `keep`, or for `keep_of_many` if there are more than MANY_VERSIONS.
    """
    made = [version["timestamp"] for version in table.list_versions()]  # local time, oldest first
    keep = min(keep, keep_of_many) if len(made) > MANY_VERSIONS else keep
    # A version is replaced when the next one is created, but LanceDB deletes by creation time: all versions up to `last`.
    since = datetime.now()
    last = max((made[i] for i in range(len(made) - 1) if made[i + 1] < since - keep), default=None)
    small = table.stats()["fragment_stats"]["num_small_fragments"]
    if last is None:
        return since - made[0] + KEEP_ALL if small > SMALL_FRAGMENTS else None
    # LanceDB warns about an age of zero.
    return max(since - last - timedelta(microseconds=1), timedelta(milliseconds=1))


def rows_where_in(table: Any, column: str, values: Iterable[Any], columns: Sequence[str] | None = None) -> pa.Table:
    """The rows whose text `column` is one of `values`, in any order; all columns by default."""
    columns = list(columns or table.schema.names)
    parts = [table.search().where(filter_in(column, some)).select(columns).to_arrow() for some in chunked(list(values))]
    return pa.concat_tables(parts) if parts else pa.schema([table.schema.field(name) for name in columns]).empty_table()


def filter_in(column: str, values: Sequence[str]) -> str:
    """SQL condition: the text `column` is one of `values`."""
    return f"{column} IN ({', '.join(quoted(value) for value in values)})"


def quoted(value: str) -> str:
    """A string as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"


def chunked(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Slices of at most 2000 values, the limit of one filter."""
    return (values[start : start + _NAMES] for start in range(0, len(values), _NAMES))

"""The table of tiles of a store (see icar_jax.search.tiles), for reading and writing; needs no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from icar_jax.search.access import store_errors
from icar_jax.search.tables import chunked, filter_in, primary_key, vector_column, vectors

if TYPE_CHECKING:
    from icar_jax.search.store import Store

TABLE = "tiles"
_PER_PICTURE = 4  # tiles asked for, as a multiple of the pictures wanted: several may belong to one picture


def tile_schema(embed_dim: int) -> pa.Schema:
    """Schema of `tiles`: `key` is path, grid and tile; `exit` as in `images`; `vector` float16 [D] with unit norm."""
    return pa.schema(
        [
            primary_key("key"), ("path", pa.string()), ("sha256", pa.string()), ("grid", pa.string()), ("tile", pa.int32()),
            ("exit", pa.int32()), ("vector", pa.list_(pa.float16(), embed_dim)),
        ]
    )  # fmt: skip


class Tiles:
    """The tiles of a store; the table exists from the first write on."""

    def __init__(self, store: Store):
        self._store = store

    def contents(self, grid: str) -> dict[str, str]:
        """{path: sha256 of the picture} of the pictures that have tiles of `grid`."""
        if (table := self._table()) is None:
            return {}
        with store_errors(self._store.uri, "reading it"):
            rows = table.search().where(f"grid = '{grid}' AND tile = 0").select(["path", "sha256"]).to_arrow()
        return dict(zip(rows["path"].to_pylist(), rows["sha256"].to_pylist(), strict=True))

    def write(self, rows: pa.Table) -> None:
        """Inserts or replaces tiles by key, in one commit. Tiles of other grids of the same pictures are deleted."""
        with self._store.commit_lock(), store_errors(self._store.uri, "writing to it"):
            table = self._table()
            if table is None:
                self._store.database.create_table(TABLE, rows, schema=tile_schema(self._store.embed_dim))
                return
            table.merge_insert("key").use_index(False).when_matched_update_all().when_not_matched_insert_all().execute(rows)
            grid, paths = rows["grid"][0].as_py(), sorted(set(rows["path"].to_pylist()))
            table.delete(f"grid != '{grid}' AND {filter_in('path', paths)}")

    def nearest(self, embedding: np.ndarray, count: int) -> dict[str, tuple[str, np.ndarray]]:
        """{path: (sha256 of the picture, vector of its closest tile)} of about `count` pictures, closest first."""
        if (table := self._table()) is None:
            return {}
        with store_errors(self._store.uri, "reading it"):
            query = table.search(embedding.astype(np.float32), vector_column_name="vector").distance_type("cosine")
            rows = query.limit(_PER_PICTURE * count).select(["path", "sha256", "vector", "_distance"]).to_arrow()
        cosines = vectors(rows["vector"]).astype(np.float64) @ embedding if len(rows) else np.zeros(0)
        found: dict[str, tuple[str, np.ndarray]] = {}
        for row in np.argsort(-cosines, kind="stable"):
            path = rows["path"][int(row)].as_py()
            found.setdefault(path, (rows["sha256"][int(row)].as_py(), vectors(rows["vector"])[row]))
        return found

    def count(self) -> int:
        """Number of tiles."""
        table = self._table()
        return 0 if table is None else table.count_rows()

    def _table(self) -> Any | None:
        try:
            table = self._store.database.open_table(TABLE)
        except ValueError as error:
            if f"'{TABLE}' was not found" in str(error):
                return None
            raise
        return table


def with_tiles(
    rows: pa.Table, images: Any, found: dict[str, tuple[str, np.ndarray]], embedding: np.ndarray, where: str | None
) -> pa.Table:
    """`rows`, and the other pictures of `found`, each with the vector of its closest tile where that is closer than its own.

    Args:
        rows: pictures, with the columns path, sha256 and vector among others.
        images: the table of pictures, from which others are read that `where` keeps.
        found: of `Tiles.nearest`. Tiles of other content than the picture's are left out.
        embedding: the query [D].
    """
    names = rows.column_names
    there = set(rows["path"].to_pylist())
    parts = [rows]
    for some in chunked([path for path in found if path not in there]):
        condition = filter_in("path", some) if where is None else f"{filter_in('path', some)} AND ({where})"
        parts.append(images.search().where(condition).select(names).to_arrow().cast(rows.schema))
    rows = pa.concat_tables(parts)
    own = vectors(rows["vector"]).copy()
    for i, (path, content) in enumerate(zip(rows["path"].to_pylist(), rows["sha256"].to_pylist(), strict=True)):
        sha256, tile = found.get(path, ("", own[i]))
        if sha256 == content and tile.astype(np.float64) @ embedding > own[i].astype(np.float64) @ embedding:
            own[i] = tile
    return rows.set_column(names.index("vector"), rows.schema.field("vector"), vector_column(own))

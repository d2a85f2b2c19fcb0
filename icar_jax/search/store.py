"""The store of a searchable collection: a LanceDB database with one row per image, on disk or in an object store.

    STORE/
      images.lance      one row per absolute path: file attributes, exit, complexity, caption and embedding
      bad.lance         files that could not be embedded, with reasons
      returned.lance    how often searches returned each image
      meta.lance        format, identity of the models, exits; written last, so a folder without it is not a store
      .lock             locked while a local store is written; absent in object stores

Embeddings of all exits share one space, so a store can mix exits and budgets. Embeddings of another CLIP and scores of another
complexity model are not comparable, so both are rejected.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa

from icar_jax.errors import ModelError
from icar_jax.search.access import StoreError, creation_stamp, is_local, locked, store_errors
from icar_jax.search.tables import (
    BAD,
    RETURNED,
    STATE,
    TABLES,
    chunked,
    cleanup_age,
    filter_in,
    image_schema,
    meta_table,
    now,
    quoted,
    rows_where_in,
    vectors,
)

# Replaced versions of a table stay readable this long for searches that opened them; shorter if there are many versions.
KEEP_VERSIONS = timedelta(hours=1)
KEEP_OF_MANY = timedelta(minutes=5)
_ATTEMPTS = 8  # of a commit to an object store, where writers may conflict


class Store:
    """An open store; create it with `create_store` or `open_store` of icar_jax.search.opening.

    Attributes:
        uri: absolute path of the folder, or address in an object store.
        meta: format, model (as Model.identity), embed_dim, exits, checkpoint, created_at; roots, vector_index and routing
            once they are set.
        renewals: how often this object found that the store was deleted and recreated; each time, cached rows are invalid.
    """

    def __init__(
        self, uri: str, database: Any, meta: Mapping[str, Any], tables: Mapping[str, Any], reopen: Callable[[str], Store]
    ):
        self.uri, self._database, self.meta, self._reopen = uri, database, dict(meta), reopen
        self.embed_dim: int = self.meta["embed_dim"]
        self.exits: tuple[int, ...] = tuple(self.meta["exits"])
        self._tables = dict(tables)
        self._stamp = creation_stamp(uri)
        self.renewals = 0
        self._known_version = -1  # version of images that this process last read or wrote

    @property
    def is_local(self) -> bool:
        """Whether the store is a local folder."""
        return is_local(self.uri)

    @property
    def images(self) -> Any:
        """The LanceDB table of images; `refresh` updates it to the newest version."""
        return self._tables["images"]

    @property
    def database(self) -> Any:
        """The LanceDB connection, for derived tables that can be recomputed from the images."""
        return self._database

    def refresh(self) -> None:
        """Updates every table to its newest version."""
        for name in TABLES:
            self._checkout_latest(name)

    def version(self) -> int:
        """Newest version number of `images`, which increases with every change."""
        with self.reading() as images:
            return images.version

    def versions(self) -> dict[str, int]:
        """Newest version number of every table by name."""
        self.refresh()
        return {name: self._tables[name].version for name in TABLES}

    def count(self) -> int:
        """Current number of images."""
        with self.reading() as images:
            return images.count_rows()

    def count_below(self, folder: str) -> int:
        """Number of images in or below a folder given as an absolute path."""
        with self.reading() as images:
            return images.count_rows(_below(folder))

    def folders_below(self, root: str) -> set[str]:
        """Folders at or below the absolute path `root` that directly contain images of the store."""
        with self.reading() as images:
            paths = images.search().where(_below(root)).select(["path"]).to_arrow()["path"]
        return {os.path.dirname(path) for chunk in paths.chunks for path in chunk.to_pylist()}

    def state(self, *more: str) -> pa.Table:
        """The columns STATE and `more` of every image, without vectors."""
        with self.reading() as images:
            self._known_version = images.version
            return images.search().select([*STATE, *more]).to_arrow()

    def rows(self, column: str, values: Iterable[Any], columns: Sequence[str] | None = None) -> pa.Table:
        """The images whose `column` is one of `values`, in any order; all columns by default."""
        with self.reading() as images:
            return rows_where_in(images, column, values, columns)

    def sample(self, n: int, seed: int, columns: Sequence[str]) -> pa.Table:
        """Columns of up to n random images, in table order; deterministic for a seed while the table does not change."""
        with self.reading() as images:
            count = images.count_rows()
            if not count:
                return pa.schema([images.schema.field(name) for name in columns]).empty_table()
            offsets = np.random.default_rng(seed).choice(count, min(n, count), replace=False)
            return images.take_offsets(sorted(map(int, offsets))).select(list(columns)).to_arrow()

    # Writing. Every change below is one atomic commit.

    @contextmanager
    def commit_lock(self) -> Iterator[None]:
        """Context around a commit that serialises local writers. Object stores have no lock; conflicting commits fail there."""
        with locked(self.uri):
            yield

    def upsert(self, rows: pa.Table) -> np.ndarray:
        """Inserts or replaces n images by path, as `put`. Returns bool [n]: which were written."""
        return self.put(rows)[0]

    def put(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Inserts or replaces n images by path; `rows` has the columns of `image_schema`.

        Returns (bool [n]: which were written, bool [n]: which had a row; false, too, as long as no other run wrote rows).
        A row written by another run in the meantime is kept if that run read the file later or embedded the same content at a
        deeper exit. Raises ModelError for non-finite vectors and ValueError for a duplicate path.
        """
        rows = rows.select(image_schema(self.embed_dim).names).cast(image_schema(self.embed_dim))
        if len(set(rows["path"].to_pylist())) != len(rows):
            raise ValueError("upsert got a path twice")
        finite = np.isfinite(vectors(rows["vector"])).all(axis=1)
        if not finite.all():
            raise ModelError(f"the embedding of {rows['path'][int(np.argmin(finite))]} is not finite; the model is broken")
        if not len(rows):
            return np.zeros(0, bool), np.zeros(0, bool)
        with self.commit_lock():
            self._checkout_latest("images")
            # Once others have written, every later batch is compared too, as it may contain the same paths.
            others = not self.is_local or self.images.version != self._known_version
            newer, existed = self._compared(rows) if others else (np.ones(len(rows), bool), np.zeros(len(rows), bool))
            if newer.any():
                self._merge("images", rows.filter(pa.array(newer)))
                self._known_version = -1 if others else self.images.version
        return newer, existed

    def _compared(self, rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """(bool [n]: newer than the stored row or without one, bool [n]: with a stored row)."""
        columns = ["path", "sha256", "exit", "embedded_at"]
        stored = {row["path"]: row for row in self.rows("path", rows["path"].to_pylist(), columns).to_pylist()}

        def newer(row: dict[str, Any]) -> bool:
            other = stored.get(row["path"])
            if other is None:
                return True
            deeper = other["sha256"] == row["sha256"] and self.depth_of(other["exit"]) > self.depth_of(row["exit"])
            return not deeper and other["embedded_at"] <= row["embedded_at"]

        existed = [path in stored for path in rows["path"].to_pylist()]
        return np.array([newer(row) for row in rows.select(columns).to_pylist()], bool), np.array(existed, bool)

    def depth_of(self, exit: int) -> int:
        """The place of an exit among the store's, which ascend in cost; -1 for one that it does not have."""
        return self.exits.index(exit) if exit in self.exits else -1

    def delete(self, paths: Sequence[str], unless: Any = None) -> int:
        """Deletes images by path and returns their number; keeps rows for which `unless(path)`, called under the lock."""
        removed = 0
        for some in chunked(paths):
            with self.commit_lock():
                self._checkout_latest("images")
                some = [path for path in some if unless is None or not unless(path)]
                if some:
                    others = self.images.version != self._known_version
                    removed += self._retry(lambda: self.images.delete(filter_in("path", some)).num_deleted_rows)
                    # `upsert` must still compare with what others wrote before.
                    self._known_version = -1 if others else self.images.version
        return removed

    def bad_rows(self) -> pa.Table:
        """Files that could not be embedded: path, size and mtime_ns (null if unreadable), reason, found_at."""
        with self.reading("bad") as bad:
            return bad.search().select(BAD.names).to_arrow().cast(BAD)

    def set_bad(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Inserts or replaces unusable files by path, with size, mtime_ns and reason."""
        latest = {row["path"]: {"found_at": now(), **row} for row in rows}
        if latest:
            with self.commit_lock():
                self._merge("bad", pa.Table.from_pylist(list(latest.values()), BAD))

    def clear_bad(self, paths: Sequence[str]) -> None:
        """Removes files from the table of unusable files."""
        for some in chunked(paths):
            with self.commit_lock():
                self._checkout_latest("bad")
                self._retry(lambda some=some: self._tables["bad"].delete(filter_in("path", some)))

    def note_returned(self, paths: Iterable[str]) -> None:
        """Adds 1 to the count of returned images for each occurrence of a path; batch the calls, as each is a commit."""
        times: dict[str, int] = {}
        for path in paths:
            times[path] = times.get(path, 0) + 1
        if times:
            with self.commit_lock():
                with self.reading("returned") as returned:
                    before = rows_where_in(returned, "path", list(times)).to_pylist()
                for row in before:
                    times[row["path"]] += row["times"]
                self._merge("returned", pa.table({"path": list(times), "times": list(times.values())}, RETURNED))
                # Readers of this table hold the lock of a local store, so old versions need not be kept.
                self._compact_table("returned", KEEP_VERSIONS, timedelta() if self.is_local else KEEP_OF_MANY)

    def returned(self) -> dict[str, int]:
        """Number of times that searches returned each path."""
        with self.commit_lock(), self.reading("returned") as returned:
            table = returned.search().select(RETURNED.names).to_arrow()
        return dict(zip(table["path"].to_pylist(), table["times"].to_pylist(), strict=True))

    def set_meta(self, **entries: Any) -> None:
        """Sets entries of `meta`; writes nothing if they are unchanged."""
        changed = {key: value for key, value in entries.items() if self.meta.get(key) != value or key not in self.meta}
        if changed:
            with self.commit_lock():
                self._merge("meta", meta_table(changed), on="key")
            self.meta |= json.loads(json.dumps(changed))

    def roots(self) -> list[str] | None:
        """Absolute paths of all folders and links that were indexed so far; None if no run recorded them."""
        with self.reading("meta") as meta:
            rows = meta.search().where("key = 'roots'").to_arrow().to_pylist()
            return json.loads(rows[0]["value"]) if rows else None

    def add_roots(self, roots: Iterable[str]) -> None:
        """Adds to `roots`; writes nothing if all are known."""
        new = set(roots)
        if new <= set(self.roots() or ()):
            return
        with self.commit_lock():
            merged = sorted(new | set(self.roots() or ()))  # read again under the lock: another run may have added some
            self._merge("meta", meta_table({"roots": merged}), on="key")
        self.meta["roots"] = merged

    def compact(self, keep: timedelta = KEEP_VERSIONS) -> None:
        """Merges small fragments, updates indices and deletes versions older than `keep`; writes nothing if not needed."""
        with self.commit_lock():
            others = self.version() != self._known_version
            for name in TABLES:
                self._compact_table(name, keep)
            self._known_version = -1 if others else self.version()

    def _compact_table(self, name: str, keep: timedelta, keep_of_many: timedelta = KEEP_OF_MANY) -> None:
        with self.reading(name) as table:
            older = cleanup_age(table, keep, keep_of_many)
        if older is not None:
            self._retry(lambda: table.optimize(cleanup_older_than=older))

    def require_model(self, identity: Mapping[str, str], where: str) -> None:
        """Raises StoreError unless a model with this Model.identity, loaded from `where`, may be used with this store.

        Its CLIP must be the store's, and so must its complexity model if both have one.
        """
        for part, name in (("clip", "CLIP"), ("complexity", "complexity model")):
            mine, other = self.meta["model"].get(part), identity.get(part)
            if part == "clip" and other is None:
                raise StoreError(f"{where} contains no CLIP, which store {self.uri} needs; pass a bundle or a CLIP")
            if mine is not None and other is not None and mine != other:
                raise StoreError(
                    f"store {self.uri} was made with a different {name}, whose outputs are not comparable: the store has "
                    f"{mine} (from {self.meta['checkpoint']}), {where} has {other}; pass the checkpoint of the store, or use "
                    "a new store"
                )

    def _merge(self, name: str, rows: pa.Table, on: str = "path") -> None:
        self._retry(
            # Writers of the same new path conflict only if the primary key is compared, which a merge through an index skips.
            lambda: (
                self._tables[name]
                .merge_insert(on)
                .use_index(False)
                .when_matched_update_all()
                .when_not_matched_insert_all()
                .execute(rows)
            )
        )

    def _retry(self, commit: Any) -> Any:
        """Runs commit(); in an object store, retries with backoff after a conflict with another writer."""
        for attempt in range(_ATTEMPTS):
            try:
                with self._store_errors("writing to it"):
                    return commit()
            except StoreError as error:
                if self.is_local or "conflict" not in str(error).lower() or attempt == _ATTEMPTS - 1:
                    raise
            self.refresh()
            time.sleep(0.1 * 2**attempt)

    @contextmanager
    def reading(self, name: str = "images") -> Iterator[Any]:
        """Context with a table at its newest version; LanceDB errors inside are raised as StoreError."""
        with self._store_errors("reading it"):
            if creation_stamp(self.uri) != self._stamp:
                self._reopen_recreated()
            self._tables[name].checkout_latest()
            yield self._tables[name]

    def _checkout_latest(self, name: str) -> None:
        with self.reading(name):
            pass

    def _reopen_recreated(self) -> None:
        """Reopens a store that was deleted and recreated, since the open tables would mix old and new rows."""
        new = self._reopen(self.uri)
        if (new.meta["model"].get("clip"), new.exits) != (self.meta["model"].get("clip"), self.exits):
            raise StoreError(f"store {self.uri} was recreated with a different model since it was opened; open it again")
        self._database, self._tables, self.meta, self._stamp = new._database, new._tables, new.meta, new._stamp
        self._known_version, self.renewals = -1, self.renewals + 1

    @contextmanager
    def _store_errors(self, doing: str) -> Iterator[None]:
        with store_errors(self.uri, doing):
            yield


def _below(folder: str) -> str:
    """SQL condition: the path is below an absolute folder."""
    prefix = folder.rstrip("/")  # '0' comes after '/'
    return f"path >= {quoted(prefix + '/')} AND path < {quoted(prefix + '0')}"

"""The store of a searchable collection: a LanceDB database with a row an image, on a disk or in an object store.

    STORE/
      images.lance      a row an image by its absolute path: what the file was, how it was embedded, and its vector
      bad.lance         files that could not be embedded, and why
      returned.lance    how often searches returned an image
      meta.lance        format, identity of the models, exits; written last, so a store without it is none
      .lock             held while a local store is written to; absent in object stores

Embeddings of all exits lie in one space, so rows of different exits and budgets stand side by side. Those of another CLIP do
not, nor can scores of another complexity model be compared, so both are refused.
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

# Versions of a table that are replaced stay readable for so long, for searches that opened them; of many versions, less long.
KEEP_VERSIONS = timedelta(hours=1)
KEEP_OF_MANY = timedelta(minutes=5)
_ATTEMPTS = 8  # of a commit to an object store, where writers meet without a lock


class Store:
    """A store as `create` or `open_store` of icar_jax.search.opening give it.

    Attributes:
        uri: absolute folder, or the address in an object store.
        meta: format, model (as Model.identity), embed_dim, exits, checkpoint, created_at; roots, vector_index and routing
            once there are any.
        renewals: how often the store was found to have been deleted and made anew at its address since it was opened here;
            what was kept of its rows is of another store then.
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
        self._known_version = -1  # of images, as this process last read or wrote it

    @property
    def is_local(self) -> bool:
        return is_local(self.uri)

    @property
    def images(self) -> Any:
        """The LanceDB table of images; `refresh` brings it to the newest version."""
        return self._tables["images"]

    @property
    def database(self) -> Any:
        """The LanceDB connection, for tables that are derived from the images and may be made anew at any time."""
        return self._database

    def refresh(self) -> None:
        """Lets every table show what others have written since."""
        for name in TABLES:
            self._checkout_latest(name)

    def version(self) -> int:
        """Newest version of `images`: another number after every change."""
        with self.reading() as images:
            return images.version

    def versions(self) -> dict[str, int]:
        """Newest version of every table."""
        self.refresh()
        return {name: self._tables[name].version for name in TABLES}

    def count(self) -> int:
        """Number of images, now."""
        with self.reading() as images:
            return images.count_rows()

    def count_below(self, folder: str) -> int:
        """Number of images in and below an absolute folder."""
        with self.reading() as images:
            return images.count_rows(_below(folder))

    def folders_below(self, root: str) -> set[str]:
        """Folders at and below `root`, an absolute path, that images of the store are in."""
        with self.reading() as images:
            paths = images.search().where(_below(root)).select(["path"]).to_arrow()["path"]
        return {os.path.dirname(path) for chunk in paths.chunks for path in chunk.to_pylist()}

    def state(self, *more: str) -> pa.Table:
        """The columns of STATE, and `more`, of every image; one scan, without the vectors."""
        with self.reading() as images:
            self._known_version = images.version
            return images.search().select([*STATE, *more]).to_arrow()

    def rows(self, column: str, values: Iterable[Any], columns: Sequence[str] | None = None) -> pa.Table:
        """The images whose `column` is one of `values`, in no order; all columns, or some."""
        with self.reading() as images:
            return rows_where_in(images, column, values, columns)

    def sample(self, n: int, seed: int, columns: Sequence[str]) -> pa.Table:
        """Columns of up to n images at random, in the order of the table; the same ones while the table stays as it is."""
        with self.reading() as images:
            count = images.count_rows()
            if not count:
                return pa.schema([images.schema.field(name) for name in columns]).empty_table()
            offsets = np.random.default_rng(seed).choice(count, min(n, count), replace=False)
            return images.take_offsets(sorted(map(int, offsets))).select(list(columns)).to_arrow()

    # Writing. Every change below is one commit: whole, or not there after a kill.

    @contextmanager
    def commit_lock(self) -> Iterator[None]:
        """Held around a commit: local writers go one after the other. Object stores have no locks, only commits that fail."""
        with locked(self.uri):
            yield

    def upsert(self, rows: pa.Table) -> np.ndarray:
        """Writes n images, columns of `image_schema`, each path once: new ones are added, others replaced.

        A row that another run has stored meanwhile is kept where that run read the file later, or embedded the same content
        deeper. Returns bool [n]: which were written. Raises ModelError for vectors that are not finite, ValueError for a path
        that is named twice.
        """
        rows = rows.select(image_schema(self.embed_dim).names).cast(image_schema(self.embed_dim))
        if len(set(rows["path"].to_pylist())) != len(rows):
            raise ValueError("an upsert names a path twice")
        finite = np.isfinite(vectors(rows["vector"])).all(axis=1)
        if not finite.all():
            raise ModelError(f"the embedding of {rows['path'][int(np.argmin(finite))]} is not finite; the model is broken")
        if not len(rows):
            return np.zeros(0, bool)
        with self.commit_lock():
            self._checkout_latest("images")
            # Once others wrote, every later batch has to be compared as well: it may hold what they wrote.
            others = not self.is_local or self.images.version != self._known_version
            newer = self._newer_than_stored(rows) if others else np.ones(len(rows), bool)
            if newer.any():
                self._merge("images", rows.filter(pa.array(newer)))
                self._known_version = -1 if others else self.images.version
        return newer

    def _newer_than_stored(self, rows: pa.Table) -> np.ndarray:
        columns = ["path", "sha256", "exit", "embedded_at"]
        stored = {row["path"]: row for row in self.rows("path", rows["path"].to_pylist(), columns).to_pylist()}

        def newer(row: dict[str, Any]) -> bool:
            other = stored.get(row["path"])
            if other is None:
                return True
            deeper = other["sha256"] == row["sha256"] and other["exit"] > row["exit"]
            return not deeper and other["embedded_at"] <= row["embedded_at"]

        return np.array([newer(row) for row in rows.select(columns).to_pylist()], bool)

    def delete(self, paths: Sequence[str], unless: Any = None) -> int:
        """Removes images; returns how many there were. `unless(path)` is asked under the lock, and True keeps the row."""
        removed = 0
        for some in chunked(paths):
            with self.commit_lock():
                self._checkout_latest("images")
                some = [path for path in some if unless is None or not unless(path)]
                if some:
                    others = self.images.version != self._known_version
                    removed += self._retry(lambda: self.images.delete(filter_in("path", some)).num_deleted_rows)
                    # What others wrote before stays unread: `upsert` must still look.
                    self._known_version = -1 if others else self.images.version
        return removed

    def bad_rows(self) -> pa.Table:
        """Files that could not be embedded: path, size and mtime_ns (null where they could not be read), reason, found_at."""
        with self.reading("bad") as bad:
            return bad.search().select(BAD.names).to_arrow().cast(BAD)

    def set_bad(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Notes files by path, with size, mtime_ns and reason; a reason noted before is replaced."""
        latest = {row["path"]: {"found_at": now(), **row} for row in rows}
        if latest:
            with self.commit_lock():
                self._merge("bad", pa.Table.from_pylist(list(latest.values()), BAD))

    def clear_bad(self, paths: Sequence[str]) -> None:
        """Forgets that these files were bad."""
        for some in chunked(paths):
            with self.commit_lock():
                self._checkout_latest("bad")
                self._retry(lambda some=some: self._tables["bad"].delete(filter_in("path", some)))

    def note_returned(self, paths: Iterable[str]) -> None:
        """Counts images that searches returned, once for each time a path is named; call it in batches: each is a commit."""
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
                # Whoever reads this table of a local store holds the lock, so that no version of it has to stay.
                self._compact_table("returned", KEEP_VERSIONS, timedelta() if self.is_local else KEEP_OF_MANY)

    def returned(self) -> dict[str, int]:
        """Path -> times that a search returned it."""
        with self.commit_lock(), self.reading("returned") as returned:
            table = returned.search().select(RETURNED.names).to_arrow()
        return dict(zip(table["path"].to_pylist(), table["times"].to_pylist(), strict=True))

    def set_meta(self, **entries: Any) -> None:
        """Changes entries of `meta`; nothing is written where they are so already."""
        changed = {key: value for key, value in entries.items() if self.meta.get(key) != value or key not in self.meta}
        if changed:
            with self.commit_lock():
                self._merge("meta", meta_table(changed), on="key")
            self.meta |= json.loads(json.dumps(changed))

    def roots(self) -> list[str] | None:
        """Absolute paths of what was indexed, over all runs until now: folders, and links that were named themselves.

        None for a store that no run of this version has indexed yet.
        """
        with self.reading("meta") as meta:
            rows = meta.search().where("key = 'roots'").to_arrow().to_pylist()
            return json.loads(rows[0]["value"]) if rows else None

    def add_roots(self, roots: Iterable[str]) -> None:
        """Adds to `roots`; nothing is written where all are known."""
        new = set(roots)
        if new <= set(self.roots() or ()):
            return
        with self.commit_lock():
            merged = sorted(new | set(self.roots() or ()))  # another run may have added its own
            self._merge("meta", meta_table({"roots": merged}), on="key")
        self.meta["roots"] = merged

    def compact(self, keep: timedelta = KEEP_VERSIONS) -> None:
        """Joins what many commits left in pieces, brings indices up to date and frees versions older than `keep`.

        Nothing is written where no version is as old, and pieces are few.
        """
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
        """Raises StoreError where rows of a model with this Model.identity, opened at `where`, do not belong here.

        The CLIP has to be the store's. A complexity model has to be, where both have one.
        """
        for part, name in (("clip", "CLIP"), ("complexity", "complexity model")):
            mine, other = self.meta["model"].get(part), identity.get(part)
            if part == "clip" and other is None:
                raise StoreError(f"{where} holds no CLIP model, which the store {self.uri} needs; pass a bundle or a CLIP")
            if mine is not None and other is not None and mine != other:
                raise StoreError(
                    f"the store {self.uri} is of another {name}, and what the two give cannot be compared: the store is of "
                    f"{mine} (from {self.meta['checkpoint']}), {where} is {other}; pass the checkpoint of the store, or index "
                    "into another one"
                )

    def _merge(self, name: str, rows: pa.Table, on: str = "path") -> None:
        self._retry(
            # Two writers of one new path conflict only where the primary key is compared, which a merge through an index skips.
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
        """commit(); again after a while where, in an object store, another writer came in between."""
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
        """A table at its newest version. What fails meanwhile is raised as a StoreError."""
        with self._store_errors("reading it"):
            if creation_stamp(self.uri) != self._stamp:
                self._reopen_recreated()
            self._tables[name].checkout_latest()
            yield self._tables[name]

    def _checkout_latest(self, name: str) -> None:
        with self.reading(name):
            pass

    def _reopen_recreated(self) -> None:
        """Opens what was made anew at the address: the tables that were open here would mix old rows with new ones."""
        new = self._reopen(self.uri)
        if (new.meta["model"].get("clip"), new.exits) != (self.meta["model"].get("clip"), self.exits):
            raise StoreError(f"the store {self.uri} was made anew with another model since it was opened; open it again")
        self._database, self._tables, self.meta, self._stamp = new._database, new._tables, new.meta, new._stamp
        self._known_version, self.renewals = -1, self.renewals + 1

    @contextmanager
    def _store_errors(self, doing: str) -> Iterator[None]:
        with store_errors(self.uri, doing):
            yield


def _below(folder: str) -> str:
    """SQL that holds for paths below an absolute folder."""
    prefix = folder.rstrip("/")  # '0' comes after '/'
    return f"path >= {quoted(prefix + '/')} AND path < {quoted(prefix + '0')}"

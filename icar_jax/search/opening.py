"""Creates and opens stores (see icar_jax.search.store)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from icar_jax.search import extra
from icar_jax.search.access import LOCK, StoreError, StoreExists, address, is_local, locked, store_errors
from icar_jax.search.store import Store
from icar_jax.search.tables import BAD, FORMAT, META, RETURNED, TABLES, image_schema, meta_table, now

_ATTEMPTS, _PAUSE_S = 6, 0.05  # to create a store when writers conflict without a lock


def create_store(
    uri: str | os.PathLike, model_identity: Mapping[str, str], embed_dim: int, exits: Sequence[int], checkpoint: str
) -> Store:
    """Creates an empty store; `model_identity` and `exits` as in Model, `checkpoint` is the path of the model.

    Raises StoreExists if there is a store, and StoreError for a folder with other files.
    """
    uri = address(uri)
    lancedb = extra("lancedb")
    meta = {
        "format": FORMAT, "model": dict(model_identity), "embed_dim": int(embed_dim), "exits": [int(e) for e in exits],
        "checkpoint": str(checkpoint), "created_at": now().isoformat(timespec="seconds"),
    }  # fmt: skip
    if is_local(uri):
        _require_own_folder(Path(uri))
    with locked(uri):
        for attempt in range(_ATTEMPTS):
            try:
                with store_errors(uri, "creating it"):
                    database = lancedb.connect(uri)
                    return Store(uri, database, meta, _create_tables(database, uri, embed_dim, meta), open_store)
            except StoreError as error:
                # Without a lock, another writer may be creating the same store; it or the next attempt completes it.
                met = "conflict" in str(error.__cause__ or error).lower()  # the message itself contains the address
                if isinstance(error, StoreExists) or attempt == _ATTEMPTS - 1 or not met:
                    raise
            time.sleep(_PAUSE_S * 2**attempt)
    raise AssertionError("the last attempt returns or raises")


def _create_tables(database: Any, uri: str, embed_dim: int, meta: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a new store. Raises StoreExists if another writer created it first."""
    exists = StoreExists(f"{uri} is already a store; open it, or choose another address")
    if _open_table(database, "meta") is not None:
        raise exists
    schemas = {"images": image_schema(embed_dim), "bad": BAD, "returned": RETURNED}
    tables = {name: _open_or_create_table(database, uri, name, schema) for name, schema in schemas.items()}
    # One commit creates the table with its rows, so the store either does not exist or is complete.
    tables["meta"], was_first = _create_table(database, "meta", meta_table(meta), META)
    if not was_first:
        raise exists
    return tables


def open_store(uri: str | os.PathLike) -> Store:
    """Opens a store, also while it is being written. Raises StoreError if it does not exist or cannot be used."""
    uri = address(uri)
    lancedb = extra("lancedb")
    missing = f"there is no store at {uri}; create one with `icar index FOLDER --checkpoint C --store {uri}`"
    if is_local(uri) and not Path(uri).is_dir():
        raise StoreError(missing)
    with store_errors(uri, "opening it"):
        database = lancedb.connect(uri)
        tables = {name: _open_table(database, name) for name in TABLES}
        if tables["meta"] is None:
            raise StoreError(missing)
        if absent := sorted(name for name, table in tables.items() if table is None):
            raise StoreError(f"store {uri} is damaged: tables {', '.join(absent)} are missing; restore a copy or index again")
        rows = tables["meta"].search().to_arrow().to_pylist()
    try:
        meta = {row["key"]: json.loads(row["value"]) for row in rows}
        if meta["format"] != FORMAT:
            raise StoreError(f"store {uri} has format {meta['format']!r}; this version reads format {FORMAT}")
        expected = image_schema(meta["embed_dim"])
        store = Store(uri, database, meta, tables, open_store)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"store {uri} is damaged: its table meta contains {rows!r:.200}; index again") from error
    held = {field.name: field.type for field in store.images.schema}
    if absent := [f"{field.name} ({field.type})" for field in expected if held.get(field.name) != field.type]:
        raise StoreError(f"store {uri} is damaged: its table images has no {', '.join(absent)}; index again")
    return store


def store_exists(uri: str | os.PathLike) -> bool:
    """Whether there is a store at an address, usable or not; False while one is being created."""
    uri = address(uri)
    if is_local(uri) and not Path(uri, "meta.lance").is_dir():
        return False
    with store_errors(uri, "opening it"):
        return _open_table(extra("lancedb").connect(uri), "meta") is not None


def _require_own_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    ours = {LOCK, *(f"{name}.lance" for name in TABLES)}
    if strangers := sorted(entry.name for entry in folder.iterdir() if entry.name not in ours):
        raise StoreError(f"{folder} is not a store and contains other files ({', '.join(strangers[:3])}); choose a new folder")


def _open_table(database: Any, name: str) -> Any | None:
    """A table; None if it does not exist or has no commit."""
    try:
        return database.open_table(name)
    except ValueError as error:
        if f"'{name}' was not found" in str(error):
            return None
        raise


def _open_or_create_table(database: Any, uri: str, name: str, schema: pa.Schema) -> Any:
    """A new table, or the empty one left by a killed `create_store` or by another writer."""
    table = _open_table(database, name)
    if table is None:
        table, _ = _create_table(database, name, schema.empty_table(), schema)
    if table.count_rows() or any(field not in table.schema for field in schema):
        if _open_table(database, "meta") is not None:  # another writer has created the store in the meantime
            raise StoreExists(f"{uri} is already a store; open it, or choose another address")
        raise StoreError(f"{uri} has a table {name} but no table meta; remove it, or choose another address")
    return table


def _create_table(database: Any, name: str, rows: pa.Table, schema: pa.Schema) -> tuple[Any, bool]:
    """(a new table with these rows, True), or (the table that another writer created concurrently, False).

    Without a lock, two writers may both find no table, and the second one's commit overwrites the first one's. This function
    then restores the first writer's version.
    """
    try:
        table = database.create_table(name, rows, schema=schema)
    except ValueError as error:
        if "already exists" not in str(error):
            raise
        return database.open_table(name), False
    if table.version == 1:
        return table, True
    if table.list_versions()[-1]["version"] == table.version:  # otherwise another writer has committed after this one
        table.restore(1 if name == "meta" else table.version - 1)  # meta: the first writer's description is valid
    return table, False

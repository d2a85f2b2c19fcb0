"""Making and opening stores (see icar_jax.search.store)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from icar_jax.search import extra
from icar_jax.search.access import LOCK, StoreError, StoreExists, address, is_local, locked, reported
from icar_jax.search.store import Store
from icar_jax.search.tables import BAD, FORMAT, RETURNED, TABLES, image_schema, meta_table, now


def create(
    uri: str | os.PathLike, model_identity: Mapping[str, str], embed_dim: int, exits: Sequence[int], checkpoint: str
) -> Store:
    """Makes an empty store; `model_identity` and `exits` as of Model, `checkpoint` where the model was loaded from.

    Raises StoreError where there is a store, or a folder with anything else in it.
    """
    uri = address(uri)
    lancedb = extra("lancedb")
    meta = {
        "format": FORMAT, "model": dict(model_identity), "embed_dim": int(embed_dim), "exits": [int(e) for e in exits],
        "checkpoint": str(checkpoint), "created_at": now().isoformat(timespec="seconds"),
    }  # fmt: skip
    if is_local(uri):
        _require_own_folder(Path(uri))
    with locked(uri), reported(uri, "creating it"):
        database = lancedb.connect(uri)
        if "meta" in _table_names(database):
            raise StoreExists(f"{uri} is a store already; open it, or choose another address")
        schemas = {"images": image_schema(embed_dim), "bad": BAD, "returned": RETURNED}
        tables = {name: _table(database, uri, name, schema) for name, schema in schemas.items()}
        # Its rows come with it in one commit: there is no store before that, and a whole one afterwards.
        tables["meta"] = database.create_table("meta", meta_table(meta))
    return Store(uri, database, meta, tables)


def open_store(uri: str | os.PathLike) -> Store:
    """Opens a store, also while it is written to. Raises StoreError where there is none, or it cannot be used."""
    uri = address(uri)
    lancedb = extra("lancedb")
    missing = f"there is no store at {uri}; `icar index FOLDER --checkpoint C --store {uri}` makes one"
    if is_local(uri) and not Path(uri).is_dir():
        raise StoreError(missing)
    with reported(uri, "opening it"):
        database = lancedb.connect(uri)
        names = _table_names(database)
        if "meta" not in names:
            raise StoreError(missing)
        if absent := sorted(set(TABLES) - set(names)):
            raise StoreError(f"the store {uri} is damaged: it lacks {', '.join(absent)}; restore it from a copy, or index anew")
        tables = {name: database.open_table(name) for name in TABLES}
        rows = tables["meta"].search().to_arrow().to_pylist()
    try:
        meta = {row["key"]: json.loads(row["value"]) for row in rows}
        if meta["format"] != FORMAT:
            raise StoreError(f"the store {uri} has format {meta['format']!r}; this version reads format {FORMAT}")
        expected = image_schema(meta["embed_dim"])
        store = Store(uri, database, meta, tables)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"the store {uri} is damaged: its table meta holds {rows!r:.200}; index anew") from error
    held = {field.name: field.type for field in store.images.schema}
    if absent := [f"{field.name} ({field.type})" for field in expected if held.get(field.name) != field.type]:
        raise StoreError(f"the store {uri} is damaged: its table images lacks {', '.join(absent)}; index anew")
    return store


def exists(uri: str | os.PathLike) -> bool:
    """Whether there is a store at an address, usable or not."""
    uri = address(uri)
    if is_local(uri):
        return Path(uri, "meta.lance").is_dir()
    with reported(uri, "opening it"):
        return "meta" in _table_names(extra("lancedb").connect(uri))


def _require_own_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    ours = {LOCK, *(f"{name}.lance" for name in TABLES)}
    if strangers := sorted(entry.name for entry in folder.iterdir() if entry.name not in ours):
        raise StoreError(
            f"{folder} is no store and holds other files ({', '.join(strangers[:3])}); name a new folder for the store"
        )


def _table_names(database: Any) -> list[str]:
    names, token = [], None
    while True:
        page = database.list_tables(page_token=token)
        names += page.tables
        token = page.page_token
        if not token:
            return names


def _table(database: Any, uri: str, name: str, schema: pa.Schema) -> Any:
    """A new table, or the empty one that a killed `create` left."""
    table = database.create_table(name, schema=schema, exist_ok=True)
    if table.count_rows() or any(field not in table.schema for field in schema):
        raise StoreError(f"{uri} holds a table {name} of another store without its meta; remove it, or choose another address")
    return table

"""Two writers create the same store without a lock; their steps interleave."""

import pyarrow as pa
import pytest

from icar_jax.search import opening, tables
from icar_jax.search.access import StoreError, StoreExists
from icar_jax.search.opening import create_store, open_store

lancedb = pytest.importorskip("lancedb")
D = 4


def made(uri, checkpoint="/first"):
    return create_store(uri, {"clip": "a"}, D, (1, 2), checkpoint)


def first_meta(checkpoint):
    return tables.meta_table({"format": tables.FORMAT, "model": {"clip": "a"}, "embed_dim": D, "exits": [1, 2],
                              "checkpoint": checkpoint, "created_at": "2026-01-01"})  # fmt: skip


@pytest.fixture
def blind(monkeypatch):
    """Makes a writer find no tables in its first lookups, and the existing ones afterwards."""
    opened = opening._open_table

    def of(looks):
        left = [looks]

        def look(database, name):
            left[0] -= 1
            return None if left[0] >= 0 else opened(database, name)

        monkeypatch.setattr(opening, "_open_table", look)

    return of


@pytest.mark.parametrize("looks", [1, 4])
def test_the_first_ones_description_holds(tmp_path, blind, looks):
    uri = str(tmp_path / "store")
    made(uri, "/first")
    blind(looks)  # the second writer found no meta, or no tables
    with pytest.raises(StoreExists, match="is already a store"):
        opening._create_tables(lancedb.connect(uri), uri, D, {"format": tables.FORMAT, "checkpoint": "/second"})
    assert open_store(uri).meta["checkpoint"] == "/first"


def test_a_commit_on_top_of_anothers_is_taken_back(tmp_path, monkeypatch):
    """Both create the table; the second one overwrites the rows of the first, and then restores them."""
    uri = str(tmp_path / "store")
    made(uri, "/first")
    database = lancedb.connect(uri)
    create_table = type(database).create_table

    def replacing(self, name, rows, schema):
        return create_table(self, name, rows, schema=schema, mode="overwrite")

    monkeypatch.setattr(type(database), "create_table", replacing)
    table, was_first = opening._create_table(database, "meta", first_meta("/second"), tables.META)
    assert not was_first and open_store(uri).meta["checkpoint"] == "/first"
    assert table.count_rows() == open_store(uri)._tables["meta"].count_rows()


def test_tables_of_a_killed_writer_are_taken_over_and_those_of_another_store_are_not(tmp_path):
    uri = str(tmp_path / "killed")
    database = lancedb.connect(uri)
    database.create_table("images", schema=tables.image_schema(D))
    assert made(uri).meta["checkpoint"] == "/first"
    strange = str(tmp_path / "strange")
    lancedb.connect(strange).create_table("bad", pa.table({"path": ["x"]}))
    with pytest.raises(StoreError, match="has a table bad but no table meta"):
        made(strange)


def test_another_error_of_the_database_is_not_taken_for_a_race(tmp_path, monkeypatch):
    database = lancedb.connect(str(tmp_path / "store"))

    def broken(*args, **kwargs):
        raise ValueError("the disk is on fire")

    monkeypatch.setattr(type(database), "create_table", broken)
    with pytest.raises(ValueError, match="the disk is on fire"):
        opening._create_table(database, "meta", first_meta("/x"), tables.META)
    monkeypatch.setattr(type(database), "open_table", broken)
    with pytest.raises(ValueError, match="the disk is on fire"):
        opening._open_table(database, "meta")


def test_a_conflict_is_tried_again_and_other_failures_are_not(tmp_path, monkeypatch):
    calls, created = [], opening._create_tables

    def conflicting(*args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("Commit conflict for version 2")
        return created(*args)

    monkeypatch.setattr(opening, "_create_tables", conflicting)
    assert made(str(tmp_path / "store")).meta["checkpoint"] == "/first" and len(calls) == 2

    def refused(*args):
        calls.append(1)
        raise RuntimeError("permission denied")

    monkeypatch.setattr(opening, "_create_tables", refused)
    with pytest.raises(StoreError, match="permission denied"):
        made(str(tmp_path / "other"))
    assert len(calls) == 3

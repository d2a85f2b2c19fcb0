"""The store: its tables against a dict, errors, and concurrent writers."""

import threading
import time
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.search import MissingExtra, extra, opening, tables
from icar_jax.search import store as stores
from icar_jax.search.access import StoreError
from icar_jax.search.opening import open_store
from icar_jax.search.tables import image_schema, now, vector_column, vectors
from tests.support.stores import IDENTITY, D, make, table


def stored(store):
    return {row["path"]: (row["sha256"], row["exit"]) for row in store.state().to_pylist()}


@pytest.fixture(params=["folder", "address"])
def uri(request, tmp_path):
    """A folder, which has a lock, and an object store address, which has none."""
    return str(tmp_path / "store") if request.param == "folder" else f"file://{tmp_path}/store"


def test_a_store_gives_back_what_was_put_in(uri):
    store = make(uri)
    names = ["/a/it's.png", '/a/"x" %_.png', "/a/ünï 图.png"]
    assert store.upsert(table([(name, name, 1) for name in names])).tolist() == [True] * 3
    again = open_store(uri)
    assert again.meta == store.meta and again.exits == (1, 2) and again.embed_dim == D and again.count() == 3
    assert stored(again) == {name: (name, 1) for name in names}
    held = again.rows("path", names[:2])
    assert sorted(held["path"].to_pylist()) == sorted(names[:2]) and held.schema.names == image_schema(D).names
    assert vectors(held["vector"]).shape == (2, D) and vectors(held["vector"]).dtype == np.float16
    assert again.count_below("/a") == 3 and again.count_below("/a/") == 3 and again.count_below("/") == 3
    assert again.count_below("/a/ünï") == 0 and again.rows("path", []).num_rows == 0
    assert again.delete([names[0], "/never"]) == 1 and store.count() == 2


@settings(deadline=None, max_examples=8)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.sampled_from("abcdef"), unique=True, max_size=4)), max_size=5))
def test_rows_follow_a_dict(tmp_path_factory, steps):
    store, reference = make(tmp_path_factory.mktemp("s") / "store"), {}
    for number, (writes, names) in enumerate(steps):
        if writes:
            store.upsert(table([(name, str(number), 1) for name in names]))
            reference |= {name: (str(number), 1) for name in names}
        else:
            store.delete(names)
            reference = {name: value for name, value in reference.items() if name not in names}
    assert stored(store) == reference


def test_an_older_reading_or_a_shallower_one_does_not_replace_what_another_run_wrote(uri):
    early = now()
    mine, other = make(uri), open_store(uri)
    mine.state()
    other.upsert(table([("a", "new", 1), ("b", "same", 2), ("c", "same", 1)]))
    assert mine.upsert(table([("a", "old", 1), ("b", "same", 2), ("d", "x", 1)], at=early)).tolist() == [False, False, True]
    assert other.upsert(table([("b", "same", 1), ("c", "same", 2)])).tolist() == [False, True], "read later, but shallower"
    assert mine.upsert(table([("a", "old", 1)], at=early)).tolist() == [False], "and of every later batch"
    assert stored(other) == {"a": ("new", 1), "b": ("same", 2), "c": ("same", 2), "d": ("x", 1)}


def test_writers_that_meet_neither_lose_nor_double(uri):
    make(uri)

    def write(who):
        store = open_store(uri)
        store.state()
        for start in range(0, 24, 6):
            store.upsert(table([(f"{name}", f"{who}", who) for name in range(start, start + 12)]))

    threads = [threading.Thread(target=write, args=(who,)) for who in (1, 2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    state = open_store(uri).state()
    assert sorted(state["path"].to_pylist(), key=int) == [str(i) for i in range(30)]


def test_bad_files_and_what_searches_returned(uri):
    store = make(uri)
    store.set_bad([{"path": name, "size": None, "mtime_ns": None, "reason": "no"} for name in "xy"])
    store.set_bad([{"path": "x", "size": 3, "mtime_ns": 4, "reason": "still no"}])
    assert {row["path"]: row["reason"] for row in store.bad_rows().to_pylist()} == {"x": "still no", "y": "no"}
    store.clear_bad(["x", "unknown"])
    assert store.bad_rows()["path"].to_pylist() == ["y"]
    store.note_returned(["a", "b", "a"])
    open_store(uri).note_returned(iter(["a"]))
    assert store.returned() == {"a": 3, "b": 1}


def test_changes_of_nothing_write_no_version(uri):
    store = make(uri)
    store.upsert(table([("a", "x", 1)]))
    before = store.versions()
    store.upsert(table([]))
    store.delete([])
    store.set_bad([])
    store.clear_bad([])
    store.note_returned([])
    store.set_meta(checkpoint="/bundle", model=IDENTITY)
    store.compact()
    assert store.versions() == before
    store.set_meta(checkpoint="/elsewhere")
    assert store.meta["checkpoint"] == open_store(uri).meta["checkpoint"] == "/elsewhere"


def compact_until(store, keep, done):
    """Compacts a few times at most: LanceDB rounds ages to milliseconds, so a version may outlive the first run that is due."""
    for _ in range(12):
        store.compact(keep=keep)
        time.sleep(0.05)
        if done():
            break


def test_compaction_joins_pieces_and_bounds_the_disk(tmp_path):
    store = make(tmp_path / "store")
    for i in range(tables.SMALL_FRAGMENTS + 1):
        store.upsert(table([(f"{i}/{j}", "x", 1) for j in range(20)]))
    before, held = store.images.stats()["fragment_stats"]["num_fragments"], stored(store)
    files = len(list((tmp_path / "store").rglob("*.lance")))
    compact_until(store, timedelta(milliseconds=1), lambda: len(list((tmp_path / "store").rglob("*.lance"))) < files)
    assert before == tables.SMALL_FRAGMENTS + 1 and store.images.stats()["fragment_stats"]["num_fragments"] == 1
    assert stored(store) == held and len(list((tmp_path / "store").rglob("*.lance"))) < files


def disk(folder):
    files = [file for file in folder.rglob("*") if file.is_file()]
    return len(files), sum(file.stat().st_size for file in files)


def test_notes_of_returned_images_do_not_pile_up(tmp_path):
    store, sizes = make(tmp_path / "store"), []
    for i in range(120):
        store.note_returned([f"{j}" for j in range(i, i + 20)])
        sizes.append(disk(tmp_path / "store" / "returned.lance"))
    assert len(store.returned()) == 139 and store.returned()["50"] == 20
    files, size = map(max, zip(*sizes, strict=True))
    assert files < 5 * tables.MANY_VERSIONS and size < 2_000_000, "27 MB and 1,944 files for 400 notes were once left"
    assert max(sizes[-40:])[1] < 1.2 * max(sizes[40:80])[1], "it does not grow"


@pytest.mark.parametrize("name", ["images", "bad", "meta", "returned"])
def test_replaced_versions_are_freed_by_age_and_by_number(name, tmp_path):
    store = make(tmp_path / "store")
    write = {
        "images": lambda i: store.upsert(table([("a", f"{i}", 1)])),  # rewritten, as by new captions
        "bad": lambda i: store.set_bad([{"path": "x", "size": i, "mtime_ns": 4, "reason": "no"}]),
        "meta": lambda i: store.set_meta(checkpoint=f"/{i}"),
        "returned": lambda i: store._merge("returned", pa.table({"path": ["x"], "times": [i]}, tables.RETURNED)),
    }[name]
    versions = lambda: len(store._tables[name].list_versions())
    for i in range(4):
        write(i)
    had, state = versions(), stored(store)
    store.compact()
    assert versions() == had, "young and few: searches may still read them"
    time.sleep(0.05)
    compact_until(store, timedelta(milliseconds=1), lambda: versions() < 4)
    assert versions() < 4 and stored(store) == state and open_store(tmp_path / "store").meta == store.meta
    for i in range(tables.MANY_VERSIONS + 2):
        write(i)
    time.sleep(0.05)
    store._compact_table(name, stores.KEEP_VERSIONS, keep_of_many=timedelta(milliseconds=1))
    assert versions() < 4


def test_a_version_stays_for_as_long_since_it_was_replaced_not_since_it_was_made(tmp_path):
    store = make(tmp_path / "store")
    store.upsert(table([("a", "x", 1)]))
    time.sleep(2.5)  # older than the limit; replacing it twice takes much less time
    reader = open_store(tmp_path / "store").images  # stays at this version, like a running scan
    store.upsert(table([("a", "y", 1)]))
    store.upsert(table([("a", "z", 1)]))
    before = len(store.images.list_versions())  # the empty table, x, y and z
    compact_until(store, timedelta(seconds=2.4), lambda: len(store.images.list_versions()) < before)
    assert len(store.images.list_versions()) == before - 1 and reader.search().to_arrow()["sha256"].to_pylist() == ["x"]
    compact_until(store, timedelta(milliseconds=1), lambda: len(store.images.list_versions()) < before - 1)
    assert len(store.images.list_versions()) < before - 1


def test_a_reader_outlives_the_versions_it_saw(tmp_path):
    writer = make(tmp_path / "store")
    writer.upsert(table([("a", "x", 1)]))
    reader = open_store(tmp_path / "store")
    assert reader.count() == 1
    writer.upsert(table([("b", "x", 1)]))
    time.sleep(0.05)
    writer.compact(keep=timedelta(milliseconds=1))
    assert reader.count() == 2 and set(stored(reader)) == {"a", "b"}


def test_broken_vectors_and_paths_named_twice_are_refused(tmp_path):
    store = make(tmp_path / "store")
    with pytest.raises(ValueError, match="twice"):
        store.upsert(table([("a", "x", 1), ("a", "y", 1)]))
    broken = table([("a", "x", 1)])
    broken = broken.set_column(9, broken.schema.field(9), vector_column(np.full((1, D), np.nan, np.float32)))
    with pytest.raises(ValueError, match="embedding of a is not finite"):
        store.upsert(broken)
    assert store.count() == 0


def test_models_that_do_not_belong_are_refused(tmp_path):
    store = make(tmp_path / "store")
    store.require_model(IDENTITY, "/bundle")
    store.require_model({"clip": "a" * 64}, "/clip")
    for identity, match in (
        ({"clip": "c" * 64}, f"a different CLIP.*{'a' * 64}.*from /bundle.*/other has {'c' * 64}"),
        ({"clip": "a" * 64, "complexity": "c" * 64}, "a different complexity model"),
        ({"complexity": "b" * 64}, "contains no CLIP"),
    ):
        with pytest.raises(StoreError, match=match):
            store.require_model(identity, "/other")


def test_what_is_no_store_is_said_plainly(uri, tmp_path):
    with pytest.raises(StoreError, match="there is no store at .*icar index"):
        open_store(uri)
    assert not opening.store_exists(uri)
    store = make(uri)
    assert opening.store_exists(uri)
    with pytest.raises(opening.StoreExists, match="is already a store"):
        make(uri)
    store.set_meta(format=99)
    with pytest.raises(StoreError, match="has format 99; this version reads format 1"):
        open_store(uri)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    for name, match in (("photos", "is not a store and contains other files"), ("photos/a.jpg", "is a file")):
        with pytest.raises(StoreError, match=match):
            make(tmp_path / name)
    assert [entry.name for entry in (tmp_path / "photos").iterdir()] == ["a.jpg"]


def test_damage_is_said_plainly(tmp_path):
    import shutil

    make(tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "bad.lance")
    with pytest.raises(StoreError, match="tables bad are missing"):
        open_store(tmp_path / "store")
    make(tmp_path / "other")
    for file in (tmp_path / "other" / "meta.lance").rglob("*.lance"):
        file.write_bytes(b"damaged")
    with pytest.raises(StoreError, match="other"):
        open_store(tmp_path / "other")


def test_a_creation_that_was_killed_is_done_again(tmp_path, monkeypatch):
    """The table meta is written last; without it there is no store."""

    def stop(entries):
        raise KeyboardInterrupt

    monkeypatch.setattr(opening, "meta_table", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "store")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="there is no store"):
        open_store(tmp_path / "store")
    assert make(tmp_path / "store").count() == 0


def test_a_missing_library_names_the_extra():
    with pytest.raises(MissingExtra, match=r"pip install 'icar-jax\[search\]'"):
        extra("icar_jax_no_such_library")
    assert issubclass(MissingExtra, ValueError) and issubclass(StoreError, ValueError)

"""The vector index: recall against exact search, rows added later, and when it is built and extended."""

import shutil

import numpy as np
import pytest

from icar_jax.search import query as search
from icar_jax.search import vector_index
from icar_jax.search.opening import create_store, open_store
from icar_jax.search.tables import vectors
from tests.support.stores import rows, unit

pytest.importorskip("lancedb")
DIM, N = 32, 2000


def clustered(rng, n, centres):
    x = centres[rng.integers(0, len(centres), n)] + 0.5 * rng.standard_normal((n, centres.shape[1])) / DIM**0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    rng = np.random.default_rng(0)
    store = create_store(tmp_path_factory.mktemp("index") / "store", {"clip": "a" * 64}, DIM, (1, 2), "nowhere")
    store.upsert(rows(clustered(rng, N, unit(rng, 40, DIM)), (1, 2)))
    assert vector_index.maintain(store, progress=False) is None and store.images.index_stats(vector_index.NAME) is None
    return store, vector_index.maintain(store, min_rows=N, progress=False)


def nearest(store, vector, k, exact, where=None):
    query = vector_index.prepare_query(store.images.search(vector, vector_column_name="vector"), exact).limit(k)
    return (query if where is None else query.where(where)).select(["path", "_distance"]).to_arrow()


def test_the_index_is_built_and_its_recall_measured(indexed):
    store, built = indexed
    assert (built.action, built.rows, built.partitions) == ("built", N, vector_index.partitions_for(N))
    assert 0.8 <= built.recall <= 1 and "recall@10" in built.report()
    assert store.images.index_stats(vector_index.NAME).num_indexed_rows == N
    assert open_store(store.uri).meta["vector_index"]["recall"] == built.recall


def test_exact_is_a_sort_by_cosine_even_with_an_index(indexed):
    store, _ = indexed
    table = store.images.search().select(["path", "vector"]).to_arrow()
    embeddings = vectors(table["vector"]).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    for query in unit(np.random.default_rng(1), 5, DIM):
        best = np.argsort(-(embeddings @ query), kind="stable")[:10]
        found = nearest(store, query, 10, exact=True)
        assert set(found["path"].to_pylist()) == {table["path"][int(i)].as_py() for i in best}
        assert np.allclose(1 - found["_distance"].to_numpy(), (embeddings @ query)[best], atol=1e-4)


def test_distances_through_the_index_are_exact(indexed):
    """Distances of hits come from the stored vectors, not from their codes."""
    store, _ = indexed
    query = unit(np.random.default_rng(2), 1, DIM)[0]
    exact = dict(zip(*(nearest(store, query, 200, True)[c].to_pylist() for c in ("path", "_distance")), strict=True))
    found = dict(zip(*(nearest(store, query, 10, False)[c].to_pylist() for c in ("path", "_distance")), strict=True))
    both = exact.keys() & found.keys()
    assert len(both) >= 8 and all(exact[path] == pytest.approx(found[path], abs=1e-5) for path in both)


def test_filters_hold_through_the_index(indexed):
    store, _ = indexed
    found = nearest(store, unit(np.random.default_rng(3), 1, DIM)[0], 10, False, "size < 150")
    assert len(found) == 10 and all(int(path[-7:-4]) < 50 for path in found["path"].to_pylist())


def test_rows_after_the_build_are_found_and_taken_in_when_many(indexed, tmp_path):
    shutil.copytree(indexed[0].uri, tmp_path / "store")  # leave the shared store unchanged
    store = open_store(tmp_path / "store")
    rng = np.random.default_rng(4)
    late = unit(rng, 50, DIM)
    store.upsert(rows(late, (1, 2), prefix="/late"))
    assert nearest(store, late[7], 1, exact=False)["path"].to_pylist() == ["/late/007.png"]
    assert vector_index.maintain(store, min_rows=N, progress=False) is None  # too few new rows
    store.upsert(rows(unit(rng, 400, DIM), (1, 2), prefix="/later"))
    done = vector_index.maintain(store, min_rows=N, progress=False)
    assert done.action == "extended" and store.images.index_stats(vector_index.NAME).num_unindexed_rows == 0
    assert nearest(store, late[7], 1, exact=False)["path"].to_pylist() == ["/late/007.png"]
    store.delete(["/late/007.png"])
    assert nearest(store, late[7], 1, exact=False)["path"].to_pylist() != ["/late/007.png"]


def test_a_rare_filter_finds_all_that_satisfy_it(tmp_path):
    """Matching rows may be in any partition, even the furthest from the query."""
    rng = np.random.default_rng(5)
    n, k = 3000, 20
    embeddings = unit(rng, n, 8)
    store = create_store(tmp_path / "store", {"clip": "a" * 64}, 8, (1, 2), "nowhere")
    store.upsert(rows(embeddings, (1, 2)))
    built = vector_index.maintain(store, min_rows=n, progress=False)
    assert built.partitions > 1.5 * vector_index.PROBES
    searcher = search.Searcher.__new__(search.Searcher)
    searcher.store = store
    far = -embeddings[7]
    for where, expected in (("path = '/pictures/007.png'", 1), ("size < 120", 20), ("size < 150", k)):
        found, exact = (searcher._nearest(far, k, where, each, k)["path"].to_pylist() for each in (False, True))
        assert len(found) == expected and (expected == k or set(found) == set(exact)), where
    assert "/pictures/007.png" in searcher._nearest(far, k, "size < 120", False, k)["path"].to_pylist()

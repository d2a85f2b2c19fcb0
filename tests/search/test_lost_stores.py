"""A store deleted, replaced or damaged while open: every operation reports it, and recovers once the store is back."""

import os
import shutil

import httpx
import numpy as np
import pytest

import icar_jax
from icar_jax.search import background as bg
from icar_jax.search import query as search
from icar_jax.search import vector_index
from icar_jax.search.access import StoreError
from icar_jax.search.opening import create_store, open_store
from icar_jax.search.server.backend import TextQuery
from icar_jax.search.server.settings import ServerSettings
from tests.support import serverkit
from tests.support.stores import CAPTIONS, IDENTITY, filled, make, rows, table, unit

pytest.importorskip("lancedb")
READS = {
    "count": lambda s: s.count(), "version": lambda s: s.version(), "versions": lambda s: s.versions(),
    "state": lambda s: s.state(), "rows": lambda s: s.rows("path", ["x"]), "count_below": lambda s: s.count_below("/a"),
    "bad": lambda s: s.bad_rows(), "returned": lambda s: s.returned(), "note": lambda s: s.note_returned(["x"]),
    "roots": lambda s: s.roots(), "sample": lambda s: s.sample(3, 0, ["path"]), "refresh": lambda s: s.refresh(),
    "upsert": lambda s: s.upsert(table([("z", "z", 1)])), "delete": lambda s: s.delete(["x"]),
    "add_roots": lambda s: s.add_roots(["/new"]), "compact": lambda s: s.compact(),
    "captions": bg.sample_captions, "maintain": lambda s: vector_index.maintain(s, min_rows=1, progress=False),
    "measure": lambda s: vector_index.measure_recall(s, 2, 2),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(clip_folder):
    return icar_jax.load(clip_folder, batch_size=8)


def test_everything_says_that_a_store_is_gone_and_goes_on_when_it_is_back(tmp_path):
    store = make(tmp_path / "store")
    store.upsert(table([(name, name, 1) for name in "xyz"]))
    (tmp_path / "store").rename(tmp_path / "away")
    for name, read in READS.items():
        with pytest.raises(StoreError, match="store"):
            pytest.fail(f"{name} gave {read(store)!r}")
    assert not (tmp_path / "store").exists()
    (tmp_path / "away").rename(tmp_path / "store")
    assert store.count() == 3 and store.renewals == 0
    store.note_returned(["x"])
    assert store.returned() == {"x": 1}


def test_damaged_vectors_are_said_plainly(model, tmp_path):
    store = filled(tmp_path / "store", model, n=20)
    searcher = search.Searcher(open_store(store.uri), model)
    for file in (tmp_path / "store" / "images.lance" / "data").iterdir():
        file.write_bytes(b"x" * 100)
    picture = np.zeros((32, 32, 3), np.uint8)
    for read in (
        bg.sample_captions, vector_index.measure_recall, lambda _: searcher.search_text("a dog"),
        lambda _: searcher._image_background(), lambda _: searcher.search_image(picture),
        lambda _: searcher.search_text("a dog", where="exit > 0"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match="store"):
            read(open_store(store.uri))


def test_a_damaged_background_is_made_again(model, tmp_path, caplog):
    store = filled(tmp_path / "store", model, n=20)
    before = search.Searcher(store, model).search_text("a dog runs").nothing_here
    for file in (tmp_path / "store" / "background.lance" / "data").iterdir():
        file.unlink()
    assert search.Searcher(open_store(store.uri), model).search_text("a dog runs").nothing_here == before
    assert any("recomputing the background" in each.getMessage() for each in caplog.records)
    caplog.clear()
    again = search.Searcher(open_store(store.uri), model)
    again.search_text("a dog runs")
    assert not caplog.records, "it was kept"


def test_a_store_made_anew_at_the_address_takes_the_place_of_the_old_one(tmp_path):
    store = make(tmp_path / "store")
    for number in range(3):
        store.upsert(table([(f"old {number}", "x", 1)]))
    for number in (1, 2):
        shutil.rmtree(tmp_path / "store")
        new = make(tmp_path / "store")
        new.upsert(table([("new", "x", 1)]))
        new.add_roots([f"/{number}"])
        assert store.count() == 1 and store.renewals == number
        assert store.state()["path"].to_pylist() == ["new"] and store.roots() == [f"/{number}"]
    shutil.rmtree(tmp_path / "store")
    make(tmp_path / "store", model_identity={**IDENTITY, "clip": "c" * 64})
    with pytest.raises(StoreError, match="recreated with a different model"):
        store.count()


def refused(response):
    assert response.status_code == 503, response.text
    assert set(response.json()) == {"detail"} and "store cannot be read" in response.json()["detail"]


def test_the_server_answers_503_while_its_store_is_away_and_searches_what_comes_back(model, tmp_path):
    files = serverkit.draw(tmp_path / "pictures", 4)
    folder = tmp_path / "store"
    embeddings = unit(np.random.default_rng(0), 4, model.embed_dim)

    def fill(prefix):
        store = create_store(folder, model.identity, model.embed_dim, model.exits, str(model.path))
        store.upsert(rows(embeddings, model.exits, CAPTIONS, prefix))

    fill("/before")
    backend = serverkit.backend(folder, model)  # long interval: a commit of counts would recreate folders
    with serverkit.running(backend, ServerSettings(port=0)) as address, httpx.Client(base_url=address, timeout=60) as client:
        upload = {"files": {"image": ("a.png", files[0].read_bytes(), "image/png")}}
        ask = [
            lambda: client.get("/readyz"), lambda: client.get("/api/search", params={"q": "a dog"}),
            lambda: client.get("/api/search", params={"q": "a dog", "max_complexity": 0.5}), lambda: client.get("/api/store"),
            lambda: client.post("/api/search", json={"query": "a dog"}), lambda: client.post("/api/search/image", **upload),
            lambda: client.get(f"/api/images/{1:064x}"), lambda: client.get(f"/api/images/{1:064x}/thumbnail"),
        ]  # fmt: skip
        assert [each().status_code for each in ask[:6]] == [200] * 6
        os.rename(folder, tmp_path / "away")
        for each in ask:
            refused(each())
        metrics = client.get("/metrics")
        assert metrics.status_code == 200 and "icar_store_rows NaN" in metrics.text
        assert client.get("/healthz").status_code == 200
        os.rename(tmp_path / "away", folder)
        assert [each().status_code for each in ask[:6]] == [200] * 6
        assert "icar_store_rows 4.0" in client.get("/metrics").text
        shutil.rmtree(folder)
        fill("/anew")
        found = client.get("/api/search", params={"q": "a dog"}).json()["hits"]
        assert len(found) == 4 and all(hit["path"].startswith("/anew/") for hit in found)
        assert client.get("/api/store").json()["images"] == 4 and client.get("/readyz").status_code == 200


def test_the_server_says_once_that_words_were_cut_and_not_in_its_log(model, tmp_path, caplog):
    store = filled(tmp_path / "store", model, n=5)
    backend = serverkit.backend(store.uri, model)
    caplog.clear()
    (found,) = backend._handle("text", [TextQuery("a red bird on a tree " * 30, 3, None, False)])
    assert found.truncated and not caplog.records

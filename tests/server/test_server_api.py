"""The server with a real store and a tiny model on loopback: searches, images, limits and access control."""

import contextlib
import hashlib
import io
import re
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax.search.opening import open_store
from icar_jax.search.server.settings import ServerSettings
from tests.support import serverkit

TOKEN = "a-token-of-some-length"
LIMITS = {"max_upload_bytes": 200_000, "max_pixels": 1_000_000, "queue": 4}


@pytest.fixture(scope="module")
def made(clip_folder, complexity_folder, tmp_path_factory):
    """(model, files, store address)."""
    folder = tmp_path_factory.mktemp("served")
    model = icar_jax.load(serverkit.make_bundle(clip_folder, complexity_folder, folder / "bundle"), batch_size=8)
    files = serverkit.draw(folder / "pictures")
    serverkit.fill(folder / "store", model, files, {str(files[3]): "two <b>dogs</b> & a cat"})
    return model, files, folder / "store"


@pytest.fixture(scope="module")
def client(made):
    model, _, store = made
    with serving(serverkit.backend(store, model), **LIMITS) as client:
        yield client


@contextlib.contextmanager
def serving(backend, **options):
    """A client of a separate server."""
    with serverkit.running(backend, ServerSettings(port=0, **options)) as address:
        with httpx.Client(base_url=address, timeout=60) as client:
            yield client


def found(response):
    assert response.status_code == 200, response.text
    return response.json()


def refused(response, status):
    assert response.status_code == status, response.text
    assert set(response.json()) == {"detail"} and "Traceback" not in response.text
    return response.json()["detail"]


def upload(client, data, name="a.png", kind="image/png", **params):
    return client.post("/api/search/image", files={"image": (name, data, kind)}, params=params)


def test_words_find_what_the_model_says(client, made):
    model, files, _ = made
    answer = found(client.get("/api/search", params={"q": "a small red circle", "k": 5}))
    rows = open_store(made[2]).state("vector")
    cosines = np.stack(rows["vector"].to_numpy(zero_copy_only=False)) @ model.encode_text(["a small red circle"])[0]
    best = np.sort(cosines)[::-1][:5]
    np.testing.assert_allclose([hit["cosine"] for hit in answer["hits"]], best, atol=2e-3)
    by_path = {row["path"]: row for row in rows.to_pylist()}
    for hit in answer["hits"]:
        row = by_path[hit["path"]]
        assert (hit["id"], hit["exit"]) == (row["sha256"], row["exit"])
        assert hit["complexity"] == pytest.approx(row["complexity"]) and hit["name"] in hit["path"]
    parts = answer["latency_ms"]
    assert parts["total"] >= parts["search"] > 0 and parts["encode"] > 0
    body = {"query": "a small red circle", "k": 5}
    assert found(client.post("/api/search", json=body))["hits"] == answer["hits"]


def test_filters(client, made):
    rows = open_store(made[2]).state().to_pylist()
    middle = sorted(row["complexity"] for row in rows)[12]
    low = found(client.get("/api/search", params={"q": "a", "k": 100, "max_complexity": middle}))["hits"]
    assert len(low) == sum(row["complexity"] <= middle for row in rows) and 0 < len(low) < 24
    exits = {row["exit"] for row in rows}
    assert len(exits) > 1
    some = found(client.get("/api/search", params={"q": "a", "k": 100, "exit": sorted(exits)[:1]}))["hits"]
    assert {hit["exit"] for hit in some} == {min(exits)} and len(some) == sum(row["exit"] == min(exits) for row in rows)
    assert found(client.post("/api/search", json={"query": "a", "exits": [999]}))["hits"] == []


def test_an_image_finds_itself(client, made):
    path = next(row["path"] for row in open_store(made[2]).state().to_pylist() if row["exit"] == made[0].exits[-1])
    data = Path(path).read_bytes()  # queries run to full depth
    hits = found(upload(client, data, k=3))["hits"]
    assert len(hits) == 3 and hits[0]["id"] == hashlib.sha256(data).hexdigest() and hits[0]["cosine"] > 0.99


@pytest.mark.parametrize("params, match", [
    ({}, "q: Field required"), ({"q": ""}, "q: .*at least 1"), ({"q": "  \n "}, "q: .*at least 1"), ({"q": "a", "k": 0}, "k: "),
    ({"q": "a", "k": 10**6}, "k: "), ({"q": "a", "min_complexity": "nan"}, "min_complexity: "),
    ({"q": "a" * 2001}, "at most 2000"), ({"q": "a", "exit": "x"}, "exit.0: "),
    ({"q": "a", "max_complexity": 1.5}, "max_complexity: "),
])  # fmt: skip
def test_queries_that_are_none(client, params, match):
    assert re.search(match, refused(client.get("/api/search", params=params), 422))


def test_previews_and_files(client, made):
    path = made[1][5]
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    thumbnail = client.get(f"/api/images/{sha256}/thumbnail")
    assert thumbnail.headers["content-type"] == "image/jpeg" and max(Image.open(io.BytesIO(thumbnail.content)).size) <= 320
    again = client.get(f"/api/images/{sha256}/thumbnail", headers={"If-None-Match": thumbnail.headers["etag"]})
    assert again.status_code == 304 and not again.content
    file = client.get(f"/api/images/{sha256}")
    assert file.content == content and file.headers["content-type"] == "image/jpeg"
    assert "sandbox" in file.headers["content-security-policy"]
    refused(client.get(f"/api/images/{sha256}/thumbnail", params={"size": 5000}), 422)
    refused(client.get(f"/api/images/{'0' * 64}"), 404)


@pytest.mark.parametrize("path", [
    "/api/images/../../etc/passwd", "/api/images/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/api/images/%2Fetc%2Fpasswd/thumbnail",
    "/api/images/..%5c..%5cwindows", "/api/images/' OR 1=1 --", "/static/../app.py", "/static/%2e%2e/app.py", "/static/",
    "/static", "/static/login.html", "/.git/config", "//etc/passwd", "/api/images/" + "A" * 64, "/api/images/" + "a" * 63,
    "/docs", "/redoc",
])  # fmt: skip
def test_no_path_leads_out(client, path):
    # Raw request, since httpx normalises paths.
    request = client.build_request("GET", "/")
    request.url = request.url.copy_with(raw_path=path.replace(" ", "%20").encode())
    response = client.send(request)
    assert response.status_code in (404, 422) and "root:" not in response.text
    refused(response, response.status_code)


def test_uploads_are_bounded(client):
    big = serverkit.sent(Image.new("RGB", (1001, 1000)))
    assert "exceed the limit of 1,000,000 pixels" in refused(upload(client, big), 422)
    assert "exceeds the limit" in refused(upload(client, bytes(400_000)), 413)
    assert "exceeds the limit" in refused(upload(client, bytes(201_000)), 413)

    def endless():
        yield b'--x\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield bytes(100_000)

    chunked = client.post("/api/search/image", content=endless(), headers={"content-type": "multipart/form-data; boundary=x"})
    assert "exceeds the limit" in refused(chunked, 413)
    refused(client.post("/api/search", content=b"[" * 150_000, headers={"content-type": "application/json"}), 413)
    refused(client.post("/api/search", content=b"[" * 90_000, headers={"content-type": "application/json"}), 400)
    assert "multipart/form-data" in refused(client.post("/api/search/image", content=b"abc"), 422)
    assert "field 'image'" in refused(client.post("/api/search/image", files={"other": b"abc"}), 422)
    assert "is empty" in refused(upload(client, b""), 422)
    assert "format" in refused(upload(client, b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg", "image/svg+xml"), 422)
    found(upload(client, serverkit.sent(Image.new("RGB", (10, 10)))))


def test_what_the_store_says_of_itself(client, made):
    model, files, _ = made
    info = found(client.get("/api/store"))
    assert info["images"] == info["scored"] == len(files) and info["model"] == model.identity
    assert [each["exit"] for each in info["exits"]] == list(model.exits)
    assert sum(each["images"] for each in info["exits"]) == len(files)
    assert info["limits"]["upload_bytes"] == LIMITS["max_upload_bytes"]
    assert found(client.get("/healthz")) == {"status": "ok"} and found(client.get("/readyz")) == {"status": "ready"}


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/static/app.js"])
def test_head_is_answered_as_get_without_the_body(client, path):
    head, get = client.head(path), client.get(path)
    assert head.status_code == get.status_code == 200 and not head.content and get.content
    assert head.headers["content-type"] == get.headers["content-type"]


def test_metrics(client):
    found(client.get("/api/search", params={"q": "counted"}))
    client.get("/nowhere/at/all")
    text = client.get("/metrics").text
    assert 'icar_requests_total{method="GET",route="/api/search",status="200"}' in text
    assert 'icar_search_seconds_bucket{kind="text",le="0.5",part="encode"}' in text
    assert "icar_store_rows 24.0" in text and "icar_queue_depth 0.0" in text and "nowhere" not in text
    assert "icar_compilations_total 0.0" in text, "compiled after warm-up"


def test_headers_of_every_answer(client):
    for path in ("/", "/static/app.js", "/api/store", "/nowhere", "/api/search"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy and "http" not in policy
    assert client.get("/api/store").headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in client.get("/api/store", headers={"Origin": "https://evil.example"}).headers


def test_names_of_other_hosts_and_pages_of_other_sites(client):
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil.example"):
        refused(client.get("/api/store", headers={"Host": host}), 421)
    for host in ("localhost:1", "127.0.0.1", "[::1]:9"):
        found(client.get("/api/store", headers={"Host": host}))
    for site in ("cross-site", "same-site"):
        refused(client.get("/api/store", headers={"Sec-Fetch-Site": site}), 403)
        refused(client.get("/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors"}), 403)
        link = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
        assert client.get("/", headers=link).status_code == 200
        refused(client.get("/api/store", headers=link), 403)
    found(client.get("/api/store", headers={"Sec-Fetch-Site": "same-origin"}))


def test_new_images_are_found_at_once(client, made, tmp_path):
    _, files, store = made
    new = tmp_path / "new.png"
    new.write_bytes(serverkit.sent(Image.new("RGB", (30, 20), "green")))
    sha256 = hashlib.sha256(new.read_bytes()).hexdigest()
    before = found(client.get("/api/store"))["images"]
    row = open_store(store).rows("path", [str(files[6])])
    for name, value in (("path", str(new)), ("sha256", sha256)):
        row = row.set_column(row.schema.get_field_index(name), name, [[value]])
    open_store(store).upsert(row)
    try:
        assert found(client.get("/api/store"))["images"] == before + 1
        hits = found(client.get("/api/search", params={"q": "a", "k": 100}))["hits"]
        assert str(new) in [hit["path"] for hit in hits] and len(hits) == before + 1
        assert client.get(f"/api/images/{sha256}").content == new.read_bytes()
    finally:
        open_store(store).delete([str(new)])


def test_beyond_the_queue_is_503_and_the_rest_is_answered(made):
    model, _, store = made
    backend = serverkit.backend(store, model, queue=2)
    gate, search = threading.Event(), backend._search
    backend._search = lambda *query: gate.wait(30) and search(*query)
    with serving(backend, queue=2) as c:
        answers = []
        ask = lambda i: answers.append(c.get("/api/search", params={"q": f"query {i}"}))
        threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
        for i, thread in enumerate(threads):
            thread.start()
            until = time.monotonic() + 20
            while backend.worker.waiting < i:  # the first one is running
                assert time.monotonic() < until
                time.sleep(0.005)
            time.sleep(0.05)
        busy = c.get("/api/search", params={"q": "one too many"})
        assert "2 searches are already waiting" in refused(busy, 503) and busy.headers["retry-after"] == "1"
        assert 'icar_refused_total{reason="queue"} 1.0' in c.get("/metrics").text
        found(c.get("/healthz"))
        gate.set()
        for thread in threads:
            thread.join(60)
        assert [answer.status_code for answer in answers] == [200, 200, 200]


def test_hits_are_noted_for_refining(made):
    model, _, store = made
    backend = serverkit.backend(store, model)
    before = sum(open_store(store).returned().values())
    with serving(backend) as c:
        hits = found(c.get("/api/search", params={"q": "a", "k": 3}))["hits"]
    after = open_store(store).returned()
    assert sum(after.values()) == before + 3 and all(after[hit["path"]] >= 1 for hit in hits)


def test_a_token_is_asked_for(made):
    model, _, store = made
    with serving(serverkit.backend(store, model), token=TOKEN) as c:
        for path in ("/api/store", "/api/search?q=a", "/metrics", "/openapi.json", "/static/app.js", f"/api/images/{'0' * 64}"):
            answer = c.get(path)
            assert "Authorization: Bearer" in refused(answer, 401) and answer.headers["www-authenticate"] == "Bearer"
        found(c.get("/healthz"))
        found(c.get("/api/store", headers={"Authorization": f"Bearer {TOKEN}"}))
        refused(c.get("/api/store", headers={"Authorization": f"Bearer {TOKEN[:-1]}"}), 401)

        to_login = c.get("/?q=two+dogs&min=0.5")
        assert to_login.status_code == 303 and to_login.headers["location"] == "/login?q=two+dogs&min=0.5"
        assert "<form" in c.get(to_login.headers["location"]).text
        wrong = c.post("/login", data={"token": "wrong"})
        assert wrong.status_code == 401 and "Wrong token" in wrong.text and "set-cookie" not in wrong.headers
        right = c.post("/login?q=two+dogs&min=0.5", data={"token": TOKEN})
        assert right.status_code == 303 and right.headers["location"] == "/?q=two+dogs&min=0.5"
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        found(c.get("/api/store"))
        assert c.get("/").status_code == 200
        elsewhere = c.post("/login?//evil.example", data={"token": TOKEN}).headers["location"]
        assert elsewhere.startswith("/?")

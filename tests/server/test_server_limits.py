"""Clients that send nothing, send slowly or read nothing, and uploads that take long, beside an ordinary client."""

import contextlib
import os
import socket
import time

import httpx
import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax.search.server.settings import ServerSettings, read_token
from tests.support import odd_images, serverkit

pytest.importorskip("lancedb")


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An image file of 9 MB."""
    file = tmp_path_factory.mktemp("large") / "large.bmp"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def store(clip_folder, complexity_folder, large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")
    bundle = serverkit.make_bundle(clip_folder, complexity_folder, folder / "bundle")
    model = icar_jax.load(bundle, batch_size=8)
    serverkit.fill(folder / "store", model, [*serverkit.draw(folder / "pictures", 6), large])
    return folder / "store", model


@contextlib.contextmanager
def serving(store, **settings):
    """(backend, address, a client) of a server with short limits."""
    backend = serverkit.backend(*store)
    limits = {"port": 0, "header_timeout_s": 30.0, "stall_timeout_s": 30.0, **settings}
    with serverkit.running(backend, ServerSettings(**limits)) as address:
        with httpx.Client(base_url=address, timeout=30) as client:
            yield backend, address, client


def connect(address, sent=b"", receive_bytes=None):
    host, _, port = address.removeprefix("http://").partition(":")
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20)
    connection.connect((host, int(port)))
    connection.sendall(sent)
    return connection


def ended(connection):
    """Whether the server ends a connection that it sends nothing on; True for a reset too."""
    try:
        return connection.recv(1000) == b""
    except ConnectionError:
        return True


def test_silent_connections_shut_nobody_out(store):
    with serving(store, connections=20) as (_, address, client):
        silent = [connect(address) for _ in range(60)]
        half = [connect(address, b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n") for _ in range(60)]
        for _ in range(5):
            with httpx.Client(base_url=address, timeout=30) as other:
                assert other.get("/api/search", params={"q": "a dog"}).status_code == 200
        assert ended(silent[0]) and ended(half[0]), "the oldest gave way"
        for connection in silent + half:
            connection.close()


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])
def test_headers_have_a_time_limit_that_single_bytes_do_not_renew(store, sent, monkeypatch):
    monkeypatch.setattr("icar_jax.search.server.run._KEEP_ALIVE_S", 0.3)
    with serving(store, header_timeout_s=0.5) as (_, address, _):
        connection = connect(address, sent)
        until = time.monotonic() + 15
        with contextlib.suppress(ConnectionError):
            if sent.endswith(b"\r\n\r\n"):
                assert connection.recv(10_000).startswith(b"HTTP/1.1 200")
            while time.monotonic() < until:  # one byte at a time, of headers that never end
                connection.sendall(b"a")
                connection.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    if connection.recv(1000) == b"":
                        break
        assert time.monotonic() < until


def test_more_requests_than_allowed_are_told_so(store):
    with serving(store, connections=30, requests=1) as (_, address, client):
        head = b"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        waiting = connect(address, head)
        until = time.monotonic() + 15
        while (answer := client.get("/healthz")).status_code == 200 and time.monotonic() < until:
            time.sleep(0.02)
        assert (answer.status_code, answer.json()["detail"]) == (503, "too many requests; try again in a moment")
        waiting.close()
        while (answer := client.get("/healthz")).status_code != 200 and time.monotonic() < until:
            time.sleep(0.02)
        assert answer.status_code == 200


def test_when_every_connection_has_a_request_in_progress_the_next_is_refused(store):
    with serving(store, connections=2) as (_, address, _):
        head = b"POST /api/search HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 50\r\n\r\n"
        busy = [connect(address, head) for _ in range(2)]
        time.sleep(0.3)
        answer = httpx.get(f"{address}/healthz", timeout=30)
        assert (answer.status_code, answer.json()["detail"]) == (503, "too many connections; try again in a moment")
        for connection in busy:
            connection.close()


@pytest.mark.parametrize("path", ["/api/search", "/login", "/api/search/image"])
def test_a_body_has_a_time_limit(store, path, monkeypatch):
    monkeypatch.setattr("icar_jax.search.server.guards._DRAIN_S", 0.1)
    with serving(store, timeout_s=0.4, token="a-token-of-some-length") as (_, address, _):
        kind = b"multipart/form-data; boundary=x" if path.endswith("image") else b"application/json"
        head = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer a-token-of-some-length\r\nContent-Type: %s\r\n"
        connection = connect(address, head % (path.encode(), kind) + b"Content-Length: 1000\r\n\r\n-")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
        connection.close()


def test_an_original_arrives_whole_whatever_its_size(store, large):
    import hashlib

    sha256 = hashlib.sha256(large.read_bytes()).hexdigest()
    with serving(store) as (_, _, client):
        answer = client.get(f"/api/images/{sha256}")
        assert answer.content == large.read_bytes() and answer.headers["content-type"] == "image/bmp"
        assert int(answer.headers["content-length"]) == large.stat().st_size


def test_an_original_that_is_written_to_while_it_is_sent_is_cut_off(store, large):
    import hashlib

    content = large.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        with serving(store) as (_, address, _):
            request = f"GET /api/images/{sha256} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
            connection = connect(address, request.encode(), receive_bytes=4096)
            first = connection.recv(2000)
            assert first.startswith(b"HTTP/1.1 200")
            with large.open("r+b") as file:  # the last bytes, which were not sent yet
                file.seek(-1000, os.SEEK_END)
                file.write(b"SECRET" * 100)
            received = first
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 20):
                    received += part
            assert b"SECRET" not in received and len(received) < len(content)
    finally:
        large.write_bytes(content)


def test_clients_that_do_not_read_take_little_memory_and_are_dropped(store, large):
    import hashlib

    sha256 = hashlib.sha256(large.read_bytes()).hexdigest()
    request = f"GET /api/images/{sha256} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    with serving(store, stall_timeout_s=1.0) as (_, address, client):
        before = memory()
        slow = [connect(address, request, receive_bytes=4096) for _ in range(30)]
        highest, until = 0, time.monotonic() + 1.0
        while time.monotonic() < until:
            assert client.get("/api/search", params={"q": "a dog"}).status_code == 200
            highest = max(highest, memory())
        assert highest - before < 100e6, "30 copies of the file would be 270 MB"
        time.sleep(1.0)
        for connection in slow:  # what lies in buffers, then the end, though most was never sent
            received = 0
            with contextlib.suppress(ConnectionError):
                while part := connection.recv(1 << 20):
                    received += len(part)
            assert received < large.stat().st_size
            connection.close()


def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def test_searches_go_on_while_uploads_are_decoded(store, monkeypatch):
    import threading

    import icar_jax.search.server.app as app

    release = threading.Event()
    real = app.open_picture

    def slow(*args):
        release.wait(20)
        return real(*args)

    monkeypatch.setattr(app, "open_picture", slow)
    picture = odd_images.saved(odd_images.noise(), "PNG")
    with serving(store, timeout_s=0.6) as (_, address, client):
        start = time.monotonic()
        answers = []

        def send():
            answers.append(
                httpx.post(f"{address}/api/search/image", files={"image": ("a.png", picture)}, timeout=30).status_code
            )

        threads = [threading.Thread(target=send) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert client.get("/api/search", params={"q": "a dog"}).status_code == 200
        assert answers == [504] * 4 and time.monotonic() - start < 15
        release.set()
        until = time.monotonic() + 15
        while time.monotonic() < until:
            send()
            if answers[-1] == 200:
                break
        assert answers[-1] == 200


@pytest.mark.parametrize("data, reason", [
    (odd_images.many_scans(64, 200), "more than 100 scans"),
    (odd_images.claiming(odd_images.saved(odd_images.noise(16, 16), "JPEG"), 6000, 6000), "truncated"),
    (odd_images.EPS, "not an image file"),
    (odd_images.tiff_sharing(500, 100_000), "tags claim more bytes"),
])  # fmt: skip
def test_hostile_uploads_are_refused_at_once(store, data, reason):
    with serving(store) as (_, _, client):
        answer = client.post("/api/search/image", files={"image": ("a.jpg", data)})
        assert answer.status_code == 422 and reason in answer.json()["detail"]


def test_a_token_file_that_others_can_read_is_warned_of(tmp_path, caplog):
    file = tmp_path / "token"
    file.write_text("a-token-of-some-length\n")
    for mode, warned in ((0o600, False), (0o400, False), (0o640, True), (0o604, True)):
        file.chmod(mode)
        caplog.clear()
        assert read_token(file) == "a-token-of-some-length"
        assert ("can be read or changed by other users" in caplog.text) == warned

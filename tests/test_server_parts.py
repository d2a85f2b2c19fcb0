"""The parts of the server, each alone: settings, the bounded queue, and which bytes become a picture."""

import asyncio
import hashlib
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from serverkit import sent
from starlette.datastructures import Headers

from icar_jax.search.server import pages
from icar_jax.search.server.errors import Refused, ServerError
from icar_jax.search.server.guards import COOKIE, _name, authorised, session
from icar_jax.search.server.pictures import Pictures, open_picture, read_indexed
from icar_jax.search.server.run import bind
from icar_jax.search.server.schemas import Filters
from icar_jax.search.server.settings import ServerSettings, address, is_loopback, read_token
from icar_jax.search.server.worker import Worker

TOKEN = "a-token-of-some-length"


# Settings


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "::", "pictures.example.org"])
def test_other_machines_need_a_token(host):
    with pytest.raises(ServerError, match="--token-file"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, token=TOKEN).hosts is None


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_this_machine_needs_none(host):
    assert is_loopback(host)
    assert {"localhost", "127.0.0.1", "[::1]"} <= ServerSettings(host=host).hosts


@pytest.mark.parametrize("token", ["short", "with a space in the middle", "ünïcödé-ünïcödé-ünïcödé", "new\nline-new-line-new"])
def test_tokens_that_can_be_guessed_or_not_sent(token, tmp_path):
    with pytest.raises(ServerError, match="secrets.token_urlsafe"):
        ServerSettings(token=token)
    (tmp_path / "token").write_text(token, encoding="utf-8")
    with pytest.raises(ServerError, match="--token-file"):
        read_token(tmp_path / "token")


def test_a_token_file(tmp_path):
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert read_token(tmp_path / "token") == TOKEN
    with pytest.raises(OSError):
        read_token(tmp_path / "none")


@pytest.mark.parametrize("options, match", [
    ({"allowed_hosts": ("a.example",)}, "--allowed-host makes .* add --token-file"),
    ({"allowed_hosts": ("http://a.example",), "token": TOKEN}, "without scheme and port"),
    ({"port": 70000}, "0 to 65535"),
    ({"queue": 0}, "queue must be positive"),
])  # fmt: skip
def test_settings_that_cannot_be(options, match):
    with pytest.raises(ServerError, match=match):
        ServerSettings(**options)


def test_a_port_that_is_taken():
    taken = bind(ServerSettings(port=0))
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(ServerError, match=f"port {port}: .*choose another"):
        bind(ServerSettings(port=port))
    taken.close()
    assert address("::1", 80) == "http://[::1]:80/"


@pytest.mark.parametrize("header, name", [
    ("localhost", "localhost"), ("LOCALHOST:8000", "localhost"), ("[::1]:8000", "[::1]"), ("[::1]", "[::1]"), ("", ""),
    ("evil.example:80", "evil.example"), ("localhost:80.evil.example", "localhost:80.evil.example"), ("::1", ":"),
])  # fmt: skip
def test_the_name_in_a_host_header(header, name):
    assert _name(header) == name


@pytest.mark.parametrize("headers, good", [
    ({"authorization": f"Bearer {TOKEN}"}, True),
    ({"authorization": f"bearer  {TOKEN} "}, True),
    ({"authorization": f"Basic {TOKEN}"}, False),
    ({"authorization": f"Bearer {TOKEN}x"}, False),
    ({"authorization": "Bearer ü"}, False),
    ({"authorization": "Bearer"}, False),
    ({"cookie": f"{COOKIE}={session(TOKEN)}"}, True),
    ({"cookie": f"other=1; {COOKIE}={session(TOKEN)}"}, True),
    ({"cookie": f"{COOKIE}={TOKEN}"}, False),
    ({"cookie": f"{COOKIE}={session(TOKEN + 'x')}"}, False),
    ({"cookie": "\x00=;;==,"}, False),
    ({}, False),
])  # fmt: skip
def test_who_is_let_in(headers, good):
    raw = [(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
    assert authorised(Headers(raw=raw), TOKEN) is good


def test_filters_are_numbers_and_nothing_else():
    found = Filters(min_complexity=0.25, max_complexity=1e-7, exits=[4, 2, 4]).where()
    assert found == "complexity >= 0.25 AND complexity <= 1e-07 AND exit IN (2, 4)"
    assert Filters().where() is None


def test_the_page_asks_for_nothing_from_elsewhere():
    for name, page in pages.load().items():
        text = page.content.decode("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, name
        assert "innerHTML" not in text and " style=" not in text and "onclick" not in text, name


# The worker


class Handler:
    """Notes batches; holds them up while `gate` is closed."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def __call__(self, kind, payloads):
        assert self.gate.wait(20)
        self.batches.append((kind, list(payloads)))
        return [ValueError(p) if p == "bad" else f"{kind} {p}" for p in payloads]


def wait_until(condition):
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.fixture
def worker():
    handler = Handler()
    made = Worker(handler, limit=4, batch={"text": 3})
    made.handler = handler
    made.start()
    yield made
    handler.gate.set()
    made.stop()


def hold(worker):
    """The worker is busy with a job of another kind until the gate is opened."""
    worker.handler.gate.clear()
    first = worker.submit("hold", 0)
    wait_until(lambda: worker.waiting == 0)
    return first


def test_texts_that_wait_go_together_in_order(worker):
    hold(worker)
    jobs = [worker.submit(*job) for job in (("text", 1), ("text", 2), ("image", 3), ("text", 4))]
    worker.handler.gate.set()
    assert [job.future.result(20) for job in jobs] == ["text 1", "text 2", "image 3", "text 4"]
    assert worker.handler.batches[1:] == [("text", [1, 2]), ("image", [3]), ("text", [4])]
    assert all(job.queued_s > 0 for job in jobs)


def test_beyond_the_queue_is_refused(worker):
    hold(worker)
    for i in range(4):
        worker.submit("text", i)
    with pytest.raises(Refused, match="4 searches are waiting") as refused:
        worker.submit("text", 9)
    assert refused.value.status == 503 and refused.value.headers["Retry-After"] == "1"


def test_a_failure_is_its_own(worker):
    hold(worker)
    jobs = [worker.submit("text", p) for p in ("a", "bad", "b")]
    worker.handler.gate.set()
    assert [jobs[0].future.result(20), jobs[2].future.result(20)] == ["text a", "text b"]
    with pytest.raises(ValueError, match="bad"):
        jobs[1].future.result(20)


def test_who_waits_too_long_never_runs(worker):
    hold(worker)

    async def late():
        await worker.run("text", "late", 0.05)

    with pytest.raises(Refused, match="no answer within 0.05 s") as refused:
        asyncio.run(late())
    assert refused.value.status == 504
    worker.handler.gate.set()
    assert asyncio.run(worker.run("text", "next", 20))[0] == "text next"
    assert not any("late" in payloads for _, payloads in worker.handler.batches)


def test_stopping_finishes_what_runs_and_refuses_what_waits():
    handler = Handler()
    worker = Worker(handler, limit=4, batch={})
    worker.handler = handler
    worker.start()
    first, waits = hold(worker), [worker.submit("text", i) for i in range(4)]
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    wait_until(lambda: worker._stopping)
    handler.gate.set()
    stopper.join(20)
    assert first.future.result(1) == "hold 0"
    for job in waits:
        with pytest.raises(Refused, match="stopping"):
            job.future.result(1)
    with pytest.raises(Refused, match="stopping"):
        worker.submit("text", 1)


# Which bytes become a picture


@pytest.fixture(scope="module")
def whole():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    return [sent(image, kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]


def test_formats_that_people_have(whole):
    for data in whole:
        picture = open_picture(data, "image", 10_000)
        assert picture.mode == "RGB" and picture.size == (64, 48)


def test_a_bomb_is_refused_before_it_goes_off():
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1_000_000))) + chunk(b"IEND", b"")
    with pytest.raises(Refused, match="more than 50,000,000 pixels") as refused:
        open_picture(bomb, "image", 50_000_000)
    assert refused.value.status == 422
    with pytest.raises(Refused, match=r"\(64 x 48\): more than 3,071"):
        open_picture(sent(Image.new("RGB", (64, 48))), "image", 3071)


def test_formats_that_run_programs_are_not_opened():
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(Refused, match="no image that can be read"):
        open_picture(script, "image", 10_000)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_picture_or_a_reason(data, whole):
    """Seeded damage to whole files: a few bytes changed, cut, doubled; and no files at all."""
    base = bytearray(data.draw(st.sampled_from([*whole, b""])))
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, max(0, len(base) - 1)), st.integers(0, 255)), max_size=6)):
        if base:
            base[place] = value
    cut = data.draw(st.integers(0, len(base)))
    try:
        picture = open_picture(bytes(base[:cut]), "image", 1_000_000)
        assert picture.mode == "RGB" and picture.width * picture.height <= 1_000_000
    except Refused as refused:
        assert refused.status == 422 and refused.reason.startswith("image") and "\n" not in refused.reason


# Files of the store


@pytest.fixture
def one(tmp_path):
    """(folder, path, hash) of an indexed picture."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = folder / "a.png"
    path.write_bytes(sent(Image.new("RGB", (600, 300), "red")))
    return folder, path, hashlib.sha256(path.read_bytes()).hexdigest()


def served(path, sha256, **options):
    return Pictures(lambda wanted: [str(path)] if wanted == sha256 else [], 1_000_000, 100_000, **options)


def refusal(pictures, sha256):
    with pytest.raises(Refused) as refused:
        pictures.original(sha256)
    assert refused.value.status == 404
    return refused.value.kind


def test_a_picture_and_its_preview(one):
    _, path, sha256 = one
    pictures = served(path, sha256)
    assert pictures.original(sha256) == (path.read_bytes(), "image/png")
    preview = open_picture(pictures.preview(sha256, 320), "preview", 1_000_000)
    assert preview.size == (320, 160)
    path.unlink()
    assert pictures.preview(sha256, 320), "kept in memory"
    assert refusal(pictures, sha256) == "image-gone"
    assert refusal(pictures, "0" * 64) == "image-unknown"


def test_only_the_bytes_that_were_indexed(one, tmp_path):
    folder, path, sha256 = one
    pictures = served(path, sha256)
    secret = tmp_path / "secret.png"
    secret.write_bytes(sent(Image.new("RGB", (9, 9), "blue")))
    path.unlink()
    path.symlink_to(secret)
    assert refusal(pictures, sha256) == "image-link"
    assert refusal(served(path, sha256, follow_links=True), sha256) == "image-changed"
    path.unlink()
    path.write_bytes(secret.read_bytes())
    assert refusal(pictures, sha256) == "image-changed"
    path.unlink()
    path.mkdir()
    assert refusal(pictures, sha256) in ("image-changed", "image-gone")
    path.rmdir()
    os.mkfifo(path)  # opening it would wait for a writer
    assert refusal(pictures, sha256) == "image-changed"


def test_links_within_the_folder_and_folders_that_are_links(one, tmp_path):
    folder, path, sha256 = one
    (folder / "b.png").symlink_to(path)
    assert read_indexed(str(folder / "b.png"), sha256) == path.read_bytes()
    (tmp_path / "other name").symlink_to(folder)
    assert read_indexed(str(tmp_path / "other name" / "a.png"), sha256) == path.read_bytes()
    (tmp_path / "outside.png").write_bytes(path.read_bytes())
    (folder / "c.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(Refused, match="link out of its folder"):
        read_indexed(str(folder / "c.png"), sha256)
    assert read_indexed(str(folder / "c.png"), sha256, follow_links=True) == path.read_bytes()


def test_a_picture_that_moved_is_found_again(one):
    folder, path, sha256 = one
    where = [str(path)]
    pictures = Pictures(lambda _: where, 1_000_000, 100_000)
    pictures.remember([(sha256, str(path))])
    path.rename(folder / "moved.png")
    where[:] = [str(path), str(folder / "moved.png")]
    assert pictures.original(sha256)[0] == (folder / "moved.png").read_bytes()


def test_previews_are_kept_within_bounds(tmp_path):
    rng = np.random.default_rng(0)
    paths = {}
    for i in range(12):
        path = tmp_path / f"{i}.png"
        path.write_bytes(sent(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))))
        paths[hashlib.sha256(path.read_bytes()).hexdigest()] = [str(path)]
    pictures = Pictures(lambda sha256: paths[sha256], 1_000_000, 20_000)
    for sha256 in paths:
        pictures.preview(sha256, 320)
        assert pictures._cached == sum(map(len, pictures._cache.values())) <= 20_000
    assert 1 < len(pictures._cache) < 12
    before = pictures.hits
    pictures.preview(list(paths)[-1], 320)
    assert pictures.hits == before + 1

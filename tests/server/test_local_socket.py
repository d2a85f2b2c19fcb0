"""`icar search` asks a running server of the same store."""

import json
import os
import socket
import tempfile
from pathlib import Path

import pytest

import icar_jax
from icar_jax import cli
from icar_jax.search import local_socket
from icar_jax.search.access import QueryError, StoreError
from icar_jax.search.opening import open_store
from icar_jax.search.query import Searcher
from icar_jax.search.server.backend import Backend
from tests.support import serverkit

STORE = "/a/store"


@pytest.fixture
def home(monkeypatch):
    with tempfile.TemporaryDirectory() as folder:  # the path of a socket must be short
        monkeypatch.setenv("ICAR_JAX_CACHE", folder)
        yield Path(folder)


def test_no_server_no_answer(home):
    assert local_socket.ask(STORE, {}) is None
    with local_socket.listening(STORE, dict) as path:
        assert path.exists()
        assert local_socket.ask("/another/store", {}) is None
    assert not path.exists() and local_socket.ask(STORE, {}) is None


def test_requests_and_errors_pass(home):
    def handle(request):
        if "fails" in request:
            raise {"query": QueryError, "store": StoreError, "server": local_socket.Unanswered}[request["fails"]]("why \u00e4")
        return {"twice": 2 * request["n"]}

    with local_socket.listening(STORE, handle) as path:
        assert path.parent.stat().st_mode & 0o77 == 0
        assert local_socket.ask(STORE, {"n": 0.1 + 0.2}) == {"twice": 2 * (0.1 + 0.2)}
        for name, kind in (("query", QueryError), ("store", StoreError), ("server", local_socket.Unanswered)):
            with pytest.raises(kind, match="why \u00e4"):
                local_socket.ask(STORE, {"fails": name})
        with pytest.raises(local_socket.Unanswered, match="did not understand"):
            local_socket.ask(STORE, {"m": 1})
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(os.fspath(path))
            other.sendall(b'{"version": "0.0.1"}\n')
            assert json.loads(other.makefile().readline())["error"] == "unanswered"


def test_a_socket_left_by_a_killed_server_is_replaced_and_one_in_use_is_kept(home):
    path = local_socket.place(STORE)
    path.parent.mkdir(parents=True, mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(path))
    assert path.exists() and local_socket.ask(STORE, {}) is None
    with local_socket.listening(STORE, lambda request: {"by": 1}):
        with local_socket.listening(STORE, lambda request: {"by": 2}) as second:
            assert second is None
        assert local_socket.ask(STORE, {}) == {"by": 1}


def test_there_is_none_without_a_private_folder(home, monkeypatch):
    monkeypatch.setenv("ICAR_JAX_CACHE", "off")
    assert local_socket.place(STORE) is None, "switched off"
    monkeypatch.setenv("ICAR_JAX_CACHE", "/" + "x" * 200)
    assert local_socket.place(STORE) is None, "too long a path"
    monkeypatch.setenv("ICAR_JAX_CACHE", str(home))
    (home / "servers").mkdir()
    (home / "servers").chmod(0o777)
    with local_socket.listening(STORE, dict) as path:
        assert path is None


@pytest.fixture
def served(home, clip_folder, complexity_folder, tmp_path):
    """A store's address, with a backend that answers on its socket."""
    bundle = serverkit.make_bundle(clip_folder, complexity_folder, tmp_path / "bundle")
    model = icar_jax.load(bundle, batch_size=8)
    serverkit.fill(tmp_path / "store", model, serverkit.draw(tmp_path / "pictures", 6))
    uri = str(tmp_path / "store")
    backend = Backend(Searcher(open_store(uri), icar_jax.load(bundle / "clip", batch_size=8)), open_store(uri), 8)
    backend.start()
    with local_socket.listening(uri, lambda request: backend.answer_locally(request, "float32", 30.0)):
        yield uri, tmp_path / "pictures", backend
    backend.stop()


def search(capsys, *words):
    cli.main(["search", *words, "--json"])
    found = json.loads(capsys.readouterr().out)
    found.pop("latency_s")
    return found


def test_a_server_finds_what_a_search_without_it_finds(served, capsys, monkeypatch):
    uri, pictures, backend = served
    queries = [
        ["a red thing", "--store", uri], ["stripes", "--store", uri, "-k", "2", "--exact", "--where", "exit >= 1"],
        ["--image", str(next(pictures.iterdir())), "--store", uri],
    ]  # fmt: skip
    asked = [search(capsys, *words) for words in queries]
    assert [len(found["hits"]) for found in asked] == [6, 2, 6]
    assert not backend._returned, "a search of the command line is not counted unless asked"
    search(capsys, "a red thing", "--store", uri, "--note-hits")
    assert len(backend._returned) == 6
    with pytest.raises(SystemExit):
        cli.main(["search", "x", "--store", uri, "--where", "colour = 1"])
    assert "invalid filter 'colour = 1'" in capsys.readouterr().err
    monkeypatch.setattr(local_socket, "ask", lambda *_: None)
    for words, found in zip(queries, asked, strict=True):
        assert search(capsys, *words) == found


def test_another_dtype_is_searched_here_with_a_note(served, capsys):
    uri = served[0]
    cli.main(["search", "a red thing", "--store", uri, "--dtype", "bfloat16", "--json"])
    said = capsys.readouterr()
    assert "the server computes in float32; searching without it" in said.err and len(json.loads(said.out)["hits"]) == 6

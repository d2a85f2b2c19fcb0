"""A Unix socket through which `icar search` asks a running `icar serve` of the same store and the same user.

The socket lies in a folder that only the user can enter, so it needs no token. A request and its answer are one line of JSON
each. Asking takes a few milliseconds and imports neither JAX nor LanceDB.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import socketserver
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from icar_jax import program_cache
from icar_jax.errors import IcarError
from icar_jax.search.access import QueryError, StoreError, address
from icar_jax.version import VERSION

_PATH_BYTES = 100  # the limit of the operating systems is 104 or 108
_CONNECT_S, _ANSWER_S = 1.0, 3600.0  # the server has a limit of its own
_MOST_BYTES = 1_000_000  # of a request

Request = Mapping[str, Any]
Answer = dict[str, Any]


class Unanswered(IcarError, RuntimeError):
    """The server cannot answer this request, but a search in this process can; the message says why."""


def place(store: str | os.PathLike) -> Path | None:
    """Path of the socket of a store's server, in a folder of this user alone; None if there is no such folder."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    root = Path(runtime, "icar_jax") if os.path.isabs(runtime) else program_cache.user_folder()
    if root is None or not hasattr(socket, "AF_UNIX"):
        return None
    path = root / "servers" / f"{hashlib.sha256(address(store).encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.socket"
    return path if len(os.fsencode(path)) <= _PATH_BYTES else None


def ask(store: str | os.PathLike, request: Request) -> Answer | None:
    """The answer of the server of a store; None if there is no server.

    Raises QueryError and StoreError as a search does, and Unanswered.
    """
    path = place(store)
    if path is None or not _is_own(path):
        return None
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_CONNECT_S)
            client.connect(os.fspath(path))
            client.settimeout(_ANSWER_S)
            client.sendall(json.dumps({**request, "version": VERSION}).encode() + b"\n")
            with client.makefile("rb") as stream:
                line = stream.readline()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except OSError as error:
        raise Unanswered(f"the server does not answer ({error})") from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise Unanswered("the server closed the connection") from error
    if "result" in answer:
        return answer["result"]
    kind, message = answer["error"], answer["message"]
    raise {"query": QueryError, "store": StoreError}.get(kind, Unanswered)(message)


@contextmanager
def listening(store: str, handle: Callable[[Request], Answer]) -> Iterator[Path | None]:
    """Answers the requests of `ask` on threads while the context lasts; yields the path of the socket.

    `handle` returns the answer or raises like `ask`. Yields None, and does nothing, if there is no private folder or another
    server of this store answers already.
    """
    path = place(store)
    if path is None or not program_cache.is_private(path.parent) or _answers(path):
        yield None
        return
    path.unlink(missing_ok=True)  # of a server that was killed
    try:
        server = _Server(os.fspath(path), handle)
    except OSError:
        yield None
        return
    mine = path.stat().st_ino
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, name="icar-local", daemon=True)
    thread.start()
    try:
        yield path
    finally:
        server.shutdown()
        server.server_close()
        if path.exists() and path.stat().st_ino == mine:
            path.unlink()


class _Server(getattr(socketserver, "ThreadingUnixStreamServer", socketserver.ThreadingTCPServer)):
    daemon_threads = True

    def __init__(self, path: str, handle: Callable[[Request], Answer]):
        self.answer = handle
        super().__init__(path, _Handler)


class _Handler(socketserver.StreamRequestHandler):
    server: _Server
    timeout = _ANSWER_S

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client left
            line = self.rfile.readline(_MOST_BYTES)
        answer = self._answer(line) if line else None
        with contextlib.suppress(OSError):
            if answer is not None:
                self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _answer(self, line: bytes) -> Answer:
        try:
            request = json.loads(line)
            if request.pop("version") != VERSION:
                raise Unanswered(f"the server runs icar_jax {VERSION}")
            return {"result": self.server.answer(request)}
        except QueryError as error:
            return {"error": "query", "message": str(error)}
        except StoreError as error:
            return {"error": "store", "message": str(error)}
        except Unanswered as error:
            return {"error": "unanswered", "message": str(error)}
        except OSError as error:
            return {"error": "unanswered", "message": f"the server failed: {error}"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return {"error": "unanswered", "message": f"the server did not understand the request: {error}"}


def _is_own(path: Path) -> bool:
    """Whether the socket belongs to this user."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_CONNECT_S)
        try:
            client.connect(os.fspath(path))
        except OSError:
            return False
    return True

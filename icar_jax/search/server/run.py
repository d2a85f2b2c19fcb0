"""Runs the application under uvicorn until SIGINT or SIGTERM."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn

from icar_jax.search.server.app import create_app
from icar_jax.search.server.backend import Backend
from icar_jax.search.server.connections import protocol
from icar_jax.search.server.errors import ServerError
from icar_jax.search.server.settings import ServerSettings, address

_GRACE_S = 10  # for running requests at shutdown
_KEEP_ALIVE_S = 10


def bind(settings: ServerSettings) -> socket.socket:
    """Binds the socket without listening, to detect a used port before loading the model. Raises ServerError."""
    host, port = settings.host, settings.port
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except OSError as error:
        raise ServerError(f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port") from None
    return bound


def configuration(backend: Backend, settings: ServerSettings) -> uvicorn.Config:
    """Uvicorn's configuration of the application."""
    return uvicorn.Config(
        create_app(backend, settings), log_level="warning", access_log=False, server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=_GRACE_S, timeout_keep_alive=_KEEP_ALIVE_S, http=protocol(settings), ws="none", lifespan="on",
    )  # fmt: skip


def serve(backend: Backend, settings: ServerSettings, bound: socket.socket, say: Callable[[str], None] = print) -> None:
    """Serves requests on a socket from `bind` until SIGINT or SIGTERM, then finishes running requests.

    A second SIGINT exits immediately. Calls `say` with the URL of the page once the server is listening.
    """
    server = _Server(
        configuration(backend, settings),
        lambda: say(f"Serving {address(settings.host, bound.getsockname()[1])}  (Ctrl+C stops)"),
    )
    # uvicorn re-raises the signals after shutdown; ignore them, as this is a normal exit.
    kept = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run([bound])
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
        bound.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]):
        super().__init__(config)
        self._say_started = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._say_started()

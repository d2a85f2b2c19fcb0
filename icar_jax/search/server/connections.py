"""HTTP connections with time limits, so that clients that send nothing or read nothing cannot shut others out.

A connection is idle until all headers of a request have arrived, and again once the response is sent. Idle connections end
after a time that received bytes do not renew, and the oldest of them gives way when there are too many. A connection whose
client does not take the response is dropped, as closing it would wait for that client.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from icar_jax.search.server.settings import ServerSettings

_FULL = json.dumps({"detail": "too many connections; try again in a moment"}).encode()
_REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nRetry-After: 1\r\n"
    b"Connection: close\r\n\r\n%s" % (len(_FULL), _FULL)
)


def protocol(settings: ServerSettings) -> type[Connection]:
    """The protocol class of uvicorn's configuration, with the limits of `settings`."""
    return type("LimitedConnection", (Connection,), {"limits": settings})


class Connection(H11Protocol):
    """One connection; `protocol` sets `limits`."""

    limits: ServerSettings

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.idle_since: float | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._stalled_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections and not self._make_room():
            transport.write(_REFUSAL)
            transport.close()
            return
        self._wait_for_request(self.limits.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._note_request()

    def on_response_complete(self) -> None:
        # Uvicorn's own limit of idle time is renewed by every byte, so headers that trickle in would keep the connection.
        self._wait_for_request(self.timeout_keep_alive + self.limits.header_timeout_s)
        super().on_response_complete()
        self._note_request()  # a pipelined request has started

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._set_stalled(None)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_stalled(self.loop.call_later(self.limits.stall_timeout_s, self._drop))

    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_stalled(None)

    def _make_room(self) -> bool:
        """Drops the connection that has been idle longest; False if all have requests in progress."""
        idle = [other for other in self.connections if other is not self and getattr(other, "idle_since", None) is not None]
        if not idle:
            return False
        min(idle, key=lambda other: other.idle_since)._drop()
        return True

    def _note_request(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def _wait_for_request(self, seconds: float) -> None:
        self._stop_waiting()
        self.idle_since = self.loop.time()
        self._idle_timer = self.loop.call_later(seconds, self._drop)

    def _stop_waiting(self) -> None:
        self.idle_since = None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _set_stalled(self, timer: asyncio.TimerHandle | None) -> None:
        if self._stalled_timer is not None:
            self._stalled_timer.cancel()
        self._stalled_timer = timer

    def _drop(self) -> None:
        self.connections.discard(self)  # at once, so that several new connections do not choose the same one
        self._stop_waiting()
        self.transport.abort()

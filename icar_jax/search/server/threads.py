"""Threads for decoding and reading images, apart from searches, with a bounded queue and a time limit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from icar_jax.search.server.errors import RequestError, timed_out

T = TypeVar("T")


class Threads:
    """Runs work of requests on `threads` threads while at most `waiting` requests wait for one.

    Work that does not end in time keeps its thread, not its request: decoding is bounded (icar_jax.files.limits) and ends soon.
    """

    def __init__(self, name: str, threads: int, waiting: int):
        self._most = threads + waiting
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=f"icar-{name}")
        self._present = 0

    async def run(self, work: Callable[[], T], timeout_s: float, busy: str) -> T:
        """Result of `work()`, called on a thread. Raises RequestError (503 naming `busy`, 504 after `timeout_s`); as `work`."""
        if self._present >= self._most:
            raise RequestError(503, "busy", f"too many {busy}; try again in a moment", {"Retry-After": "1"})
        self._present += 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        future.add_done_callback(self._leave)  # also if the request is given up
        try:
            return await asyncio.wait_for(asyncio.shield(future), timeout_s)
        except TimeoutError:
            future.cancel()  # work that still waits never runs
            raise timed_out(timeout_s) from None

    def _leave(self, future: asyncio.Future) -> None:
        self._present -= 1
        if not future.cancelled():
            future.exception()  # of a request that was given up

    def stop(self) -> None:
        """Ends the threads after the work in progress."""
        self._pool.shutdown(wait=False, cancel_futures=True)

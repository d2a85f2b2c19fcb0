"""A worker thread that calls the model, with a bounded queue; waiting jobs of the same kind run as one batch."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from icar_jax.search.server.errors import RequestError, timed_out

_STOP = object()


@dataclass
class Job:
    """A queued call: `kind` groups jobs into batches, `queued_s` is its waiting time in seconds."""

    kind: str
    payload: Any
    future: Future = field(default_factory=Future)
    submitted: float = field(default_factory=time.perf_counter)
    queued_s: float = 0.0


class Worker:
    """Runs jobs one batch at a time.

    Args:
        handle: (kind, payloads) -> results in the same order, called only on the worker thread. A result that is an exception
            fails only its own job.
        limit: most jobs that may wait.
        batch: {kind: maximum jobs in a batch}; 1 for other kinds.
        started: called with the kind and the number of jobs when a batch starts.
    """

    def __init__(
        self,
        handle: Callable[[str, Sequence[Any]], Sequence[Any]],
        limit: int,
        batch: dict[str, int],
        started: Callable[[str, int], None] = lambda kind, jobs: None,
    ):
        self._handle, self._batch, self._started = handle, batch, started
        self._queue: queue.Queue = queue.Queue(limit)
        self._held: Any = None  # taken from the queue, but of another kind than the current batch
        self._thread = threading.Thread(target=self._loop, name="icar-model", daemon=True)
        self._stopping = False

    @property
    def waiting(self) -> int:
        """Number of waiting jobs."""
        return self._queue.qsize() + (self._held is not None)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stops the thread after the running batch; waiting jobs are rejected."""
        self._stopping = True
        while True:
            try:
                self._queue.put_nowait(_STOP)
                break
            except queue.Full:
                self._refuse(self._queue.get_nowait())
        self._thread.join(timeout_s)

    def submit(self, kind: str, payload: Any) -> Job:
        """Queues a job. Raises RequestError (503) if the queue is full or the server is stopping."""
        if self._stopping:
            raise _stopping()
        job = Job(kind, payload)
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            raise RequestError(
                503, "queue", f"{self._queue.maxsize} searches are already waiting; try again in a moment", {"Retry-After": "1"}
            ) from None
        return job

    async def run(self, kind: str, payload: Any, timeout_s: float) -> tuple[Any, float]:
        """(result, seconds in the queue). A job that is still waiting after `timeout_s` never runs.

        Raises RequestError (503 as `submit`, 504 after `timeout_s`), and exceptions of the handler.
        """
        job = self.submit(kind, payload)
        try:
            result = await asyncio.wait_for(asyncio.wrap_future(job.future), timeout_s)
        except TimeoutError:
            raise timed_out(timeout_s) from None
        return result, job.queued_s

    def _loop(self) -> None:
        while True:
            first, self._held = (self._queue.get() if self._held is None else self._held), None
            if first is _STOP or self._stopping:
                self._refuse(first)
                break
            jobs = [first]
            while len(jobs) < self._batch.get(first.kind, 1):
                try:
                    job = self._queue.get_nowait()
                except queue.Empty:
                    break
                if job is _STOP or job.kind != first.kind:
                    self._held = job
                    break
                jobs.append(job)
            self._run([job for job in jobs if job.future.set_running_or_notify_cancel()])
        while not self._queue.empty():
            self._refuse(self._queue.get_nowait())
        if self._held is not None:
            self._refuse(self._held)

    def _run(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        now = time.perf_counter()
        for job in jobs:
            job.queued_s = now - job.submitted
        self._started(jobs[0].kind, len(jobs))
        try:
            results = self._handle(jobs[0].kind, [job.payload for job in jobs])
        except Exception as error:
            results = [error] * len(jobs)
        for job, result in zip(jobs, results, strict=True):
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    @staticmethod
    def _refuse(job: Any) -> None:
        if job is not _STOP and job.future.set_running_or_notify_cancel():
            job.future.set_exception(_stopping())


def _stopping() -> RequestError:
    return RequestError(503, "stopping", "the server is stopping", {"Retry-After": "5"})

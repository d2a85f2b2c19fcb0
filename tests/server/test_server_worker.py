"""The worker thread and its bounded queue."""

import asyncio
import threading
import time

import pytest

from icar_jax.search.server.errors import RequestError
from icar_jax.search.server.worker import Worker


class Handler:
    """Records batches and blocks them while `gate` is closed."""

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
    """Keeps the worker busy with a job of another kind until the gate opens."""
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
    with pytest.raises(RequestError, match="4 searches are already waiting") as refused:
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

    with pytest.raises(RequestError, match="no answer within 0.05 s") as refused:
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
        with pytest.raises(RequestError, match="stopping"):
            job.future.result(1)
    with pytest.raises(RequestError, match="stopping"):
        worker.submit("text", 1)

"""Batch iterator on Grain; threads and worker processes change neither order nor content of the batches.

grain (and with it jax, if installed) is imported only when an iterator is created. Worker processes are spawned and
pinned to the CPU platform, so that none of them can start an accelerator backend.

All waits have a timeout. Each batch is made in its own daemon thread (`watch.WatchedIterator`), so that a hanging read is
detected where it happens, can be reported, and blocks neither other threads nor the exit of the program. The iterator waits
on a thread that requests batches from Grain, and polls the worker processes meanwhile.
"""

from __future__ import annotations

import functools
import os
import pickle
import queue
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import flags

from icar_jax.data.loader.watch import (
    StalledData,
    WatchedIterator,
    WorkerDied,
    Workers,
    ignore_signals_and_exit_with_parent,
    set_worker,
)

STALL_TIMEOUT_S = 600.0
# A stalled worker reports what it was reading; Grain waits up to 25 s for it to exit before it passes the error on.
_GRACE_S = 30.0
_START_S = 60.0  # time for worker processes to start and import on a busy machine
_LOOK_EVERY_S = 1.0

Batch = dict[str, Any]


class BatchIterator:
    """Iterates over batches 0 ... count - 1 of `make`, in order, prefetched by threads and worker processes.

    If `make.where(step)` exists, it names a batch in messages. Close the iterator when done: worker processes run until then,
    or until it is garbage-collected.

    Raises (`next`):
        StalledData: no batch for `stall_timeout_s` seconds; names the batch and what was being read.
        WorkerDied: a worker process exited or was killed; names it and the signal.
        Any error of `make`.
    """

    def __init__(
        self,
        make: Callable[[int], Batch],
        count: int,
        num_workers: int,
        num_threads: int,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ):
        if num_workers < 0 or num_threads < 0:
            raise ValueError(f"num_workers and num_threads must not be negative, got {num_workers} and {num_threads}")
        if not stall_timeout_s > 0:
            raise ValueError(f"stall_timeout_s must be positive (seconds), got {stall_timeout_s}")
        import grain

        self._where = getattr(make, "where", "batch {}".format)
        self._timeout_s = stall_timeout_s
        self._delivered = 0
        self._asked = False
        self._workers = Workers(num_workers)
        closing = threading.Event()
        temporary = []
        make = WatchedIterator(make, stall_timeout_s)
        if num_workers:
            _ensure_flags_parsed()
            temporary.append(tempfile.TemporaryDirectory(prefix="icar_jax_"))
            self._workers.folder = temporary[0].name
            make = _FromFile.write(make, os.path.join(temporary[0].name, "make.pickle"))
        else:
            make.closing = closing
        # Batches are made inside `map`, before the slicing by worker; batching afterwards would mix the slices.
        read = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        dataset = grain.MapDataset.range(count).map(make).to_iter_dataset(read)
        if num_workers:
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
            start = functools.partial(_init_worker, temporary[0].name)
            dataset = dataset.mp_prefetch(options, worker_init_fn=start)
        running = iter(dataset)
        self._requests: queue.SimpleQueue = queue.SimpleQueue()
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=_answer, args=(running, self._requests, self._answers), daemon=True).start()
        self._running = [running]
        # Also runs if the program exits without closing, while the modules needed for closing still exist.
        self._close = weakref.finalize(self, _close_all, self._running, self._requests, closing, temporary)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            raise ValueError("this iterator was closed; create a new one from the position reached")
        if not self._asked:  # otherwise the last call was interrupted while waiting
            self._requests.put(True)
            self._asked = True
        batch, error = self._wait()
        self._asked = False
        if error is not None:
            self._workers.look()
            shown = self._workers.explain(error, self._where(self._delivered))
            raise shown from (None if shown is error else error)
        self._delivered += 1
        return _plain(batch)

    def _wait(self) -> tuple[Any, BaseException | None]:
        """Returns the next batch or error. Counts polls instead of clock time, so that suspension is not a stall."""
        limit_s = self._timeout_s + _GRACE_S + (0 if self._workers.look() else _START_S)
        for _ in range(round(limit_s / _LOOK_EVERY_S)):
            self._workers.look()
            try:
                return self._answers.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                if self._workers.dead():  # Grain notices too, but not while it waits for another worker
                    return None, WorkerDied()
        self._workers.kill()
        return None, StalledData(
            f"no batch for {limit_s:.0f} s (config.data.stall_timeout_s), waiting for {self._where(self._delivered)}; "
            "the workers did not report what they were reading. Check the storage and the machine's load, then run again"
        )

    def close(self) -> None:
        """Stops the worker processes and threads; further calls do nothing."""
        self._close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(running: Any, requests: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Requests a batch from Grain for each request, until a request is None."""
    while requests.get() is not None:
        try:
            answers.put((next(running), None))
        except BaseException as error:
            answers.put((None, error))
            del error


def _close_all(running: list[Any], requests: queue.SimpleQueue, closing: threading.Event, temporary: list[Any]) -> None:
    closing.set()
    requests.put(None)
    while running:
        running.pop().close()
    for folder in temporary:
        folder.cleanup()


_loading = threading.Lock()


@dataclass
class _FromFile:
    """A callable that each worker loads from a file on its first call.

    Python sends a spawned process its data through a pipe. If the child dies before reading it (as it does if the main
    script lacks `if __name__ == "__main__"`), data larger than the pipe's 64 KiB buffer, such as a source with captions,
    would block the parent forever.
    """

    path: str
    loaded: Callable[[int], Batch] | None = None

    @classmethod
    def write(cls, make: Callable[[int], Batch], path: str) -> _FromFile:
        import cloudpickle

        with open(path, "wb") as stream:
            cloudpickle.dump(make, stream)
        return cls(path)

    def __call__(self, step: int) -> Batch:
        with _loading:  # the threads of a worker share the loaded object
            if self.loaded is None:
                with open(self.path, "rb") as stream:
                    self.loaded = pickle.load(stream)  # written by this program
        return _packed(self.loaded(step))


_PICKLED = "\0pickled"


def _packed(batch: Any) -> Any:
    """Converts object arrays to bytes, which are sent through shared memory like other arrays.

    The rest, sent through the pipe between the processes, is then smaller than PIPE_BUF and written atomically; a worker
    killed in the middle of a longer message would leave its reader waiting forever.
    """
    if isinstance(batch, dict):
        return {key: _packed(item) for key, item in batch.items()}
    if isinstance(batch, np.ndarray) and batch.dtype.hasobject:
        return {_PICKLED: np.frombuffer(pickle.dumps(batch), np.uint8)}
    return batch


def _plain(value: Any) -> Any:
    """Copies arrays out of a worker's shared memory, which leaks if a batch lives until the program exits."""
    if isinstance(value, dict):
        if _PICKLED in value:
            return pickle.loads(value[_PICKLED].tobytes())  # from `_packed` in a process of this program
        return {key: _plain(item) for key, item in value.items()}
    return value if type(value) is np.ndarray else np.array(value)


def _ensure_flags_parsed() -> None:
    # Grain reads absl flags when starting workers and fails if the program (a notebook, a test) never parsed any.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _init_worker(folder: str, worker_index: int, worker_count: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None:  # imported by grain, so the variable was already read
        jax.config.update("jax_platforms", "cpu")
    set_worker(folder, worker_index, worker_count)
    ignore_signals_and_exit_with_parent()

"""An iterator of batches on Grain, with threads and worker processes that change neither order nor content.

grain (and with it jax, where installed) is imported only when an iterator is made. Worker processes are spawned and
pinned to the CPU platform, so that none of them can start an accelerator backend.

Nothing waits for ever. Each batch is made in a daemon thread of its own (`watch.WatchedIterator`), so that a read which never
returns is noticed where it happens and can be named, and holds up neither the other threads nor the end of the program. The
iterator itself waits on a thread that asks Grain, and looks after the worker processes meanwhile.
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
    outlive_signals_not_the_parent,
    set_worker,
)

STALL_TIMEOUT_S = 600.0
# A worker reports a stall itself, as it knows what it was reading; Grain waits up to 25 s for its end before passing that on.
_GRACE_S = 30.0
_START_S = 60.0  # that worker processes may take to start and import what they need, on a busy machine
_LOOK_EVERY_S = 1.0

Batch = dict[str, Any]


class BatchIterator:
    """Batches 0 ... count - 1 of `make`, in order, prepared ahead by threads and worker processes.

    `make.where(step)`, where it exists, names a batch in messages. Close it when done: worker processes live until then, or
    until it is garbage.

    Raises (`next`):
        StalledData: `stall_timeout_s` seconds without a batch, naming the batch and what was being read.
        WorkerDied: a worker process ended by itself or was killed, naming it and the signal.
        What `make` raises.
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
        # The batch is made inside `map`, before the slicing by worker: batching after it would mix the slices.
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
        # Also when the program ends without closing, while the modules that closing needs still exist.
        self._close = weakref.finalize(self, _close_all, self._running, self._requests, closing, temporary)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            raise ValueError("these batches were closed; make a new iterator from the position reached")
        if not self._asked:  # else the last call was interrupted while it waited
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
        """The next batch or error. Counts its own looks, not the clock: time in which the program was suspended is none."""
        limit_s = self._timeout_s + _GRACE_S + (0 if self._workers.look() else _START_S)
        for _ in range(round(limit_s / _LOOK_EVERY_S)):
            self._workers.look()
            try:
                return self._answers.get(timeout=_LOOK_EVERY_S)
            except queue.Empty:
                if self._workers.dead():  # Grain would notice too, but not while it waits for another one
                    return None, WorkerDied()
        self._workers.kill()
        return None, StalledData(
            f"no batch for {limit_s:.0f} s (config.data.stall_timeout_s), waiting for {self._where(self._delivered)}; "
            "the workers did not say what they were reading. Check the storage and the machine's load, then run again"
        )

    def close(self) -> None:
        """Ends the worker processes and threads; a second call does nothing."""
        self._close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _answer(running: Any, requests: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    """Asks Grain for a batch at each request, until a request is None."""
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
    """A callable that each worker reads from a file when it is first called.

    Python writes what a spawned process needs into a pipe. A child that dies before reading it, as it does where the
    main script lacks `if __name__ == "__main__"`, would block the parent for ever if that is larger than the pipe's
    buffer of 64 KiB; a source with its captions is.
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
        with _loading:  # threads of a worker share what is loaded
            if self.loaded is None:
                with open(self.path, "rb") as stream:
                    self.loaded = pickle.load(stream)  # written by this program a moment ago
        return _packed(self.loaded(step))


_PICKLED = "\0pickled"


def _packed(batch: Any) -> Any:
    """Turns arrays of objects into bytes, which travel in shared memory as other arrays do.

    What is left for the pipe between the processes is then smaller than PIPE_BUF and written whole or not at all; a
    worker killed in the middle of a longer message would leave its reader waiting for ever.
    """
    if isinstance(batch, dict):
        return {key: _packed(item) for key, item in batch.items()}
    if isinstance(batch, np.ndarray) and batch.dtype.hasobject:
        return {_PICKLED: np.frombuffer(pickle.dumps(batch), np.uint8)}
    return batch


def _plain(value: Any) -> Any:
    """Copies arrays out of a worker's shared memory, which leaks where a batch lives until the program ends."""
    if isinstance(value, dict):
        if _PICKLED in value:
            return pickle.loads(value[_PICKLED].tobytes())  # made by `_packed` in a process of this program
        return {key: _plain(item) for key, item in value.items()}
    return value if type(value) is np.ndarray else np.array(value)


def _ensure_flags_parsed() -> None:
    # Grain reads absl flags while starting workers and fails where a program (a notebook, a test) never parsed any.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _init_worker(folder: str, worker_index: int, worker_count: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None:  # grain has imported it: the variable was read already
        jax.config.update("jax_platforms", "cpu")
    set_worker(folder, worker_index, worker_count)
    outlive_signals_not_the_parent()

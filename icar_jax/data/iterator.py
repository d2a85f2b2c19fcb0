"""An iterator of batches on Grain, with threads and worker processes that change neither order nor content.

grain (and with it jax, where installed) is imported only when an iterator is made. Worker processes are spawned and
pinned to the CPU platform, so that none of them can start an accelerator backend.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import flags

Batch = dict[str, Any]


class BatchIterator:
    """Batches 0 ... count - 1 of `make`, in order, prepared ahead by threads and worker processes.

    Close it when done: worker processes live until then, or until it is garbage.
    """

    def __init__(self, make: Callable[[int], Batch], count: int, num_workers: int, num_threads: int):
        if num_workers < 0 or num_threads < 0:
            raise ValueError(f"num_workers and num_threads must not be negative, got {num_workers} and {num_threads}")
        import grain

        temporary = []
        if num_workers:
            _ensure_flags_parsed()
            temporary.append(tempfile.TemporaryDirectory(prefix="icar_jax_"))
            make = _FromFile.write(make, os.path.join(temporary[0].name, "make.pickle"))
        # The batch is made inside `map`, before the slicing by worker: batching after it would mix the slices.
        read = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
        dataset = grain.MapDataset.range(count).map(make).to_iter_dataset(read)
        if num_workers:
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
        self._running = [iter(dataset)]
        # Also when the program ends without closing, while the modules that closing needs still exist.
        self._close = weakref.finalize(self, _close_all, self._running, temporary)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._running:
            raise ValueError("these batches were closed; make a new iterator from the position reached")
        return _plain(next(self._running[0]))

    def close(self) -> None:
        """Ends the worker processes and threads; a second call does nothing."""
        self._close()

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_all(running: list[Any], temporary: list[Any]) -> None:
    while running:
        running.pop().close()
    for folder in temporary:
        folder.cleanup()


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
        if self.loaded is None:
            with open(self.path, "rb") as stream:
                self.loaded = pickle.load(stream)  # written by this program a moment ago
        return self.loaded(step)


def _plain(value: Any) -> Any:
    """Copies arrays out of a worker's shared memory, which leaks where a batch lives until the program ends."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value if type(value) is np.ndarray else np.array(value)


def _ensure_flags_parsed() -> None:
    # Grain reads absl flags while starting workers and fails where a program (a notebook, a test) never parsed any.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _init_worker(worker_index: int, worker_count: int) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if (jax := sys.modules.get("jax")) is not None:  # grain has imported it: the variable was read already
        jax.config.update("jax_platforms", "cpu")

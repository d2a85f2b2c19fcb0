"""Device-to-host fetch queue: a thread waits for each batch on the device and copies its rows back to the host."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Semaphore
from typing import Any

import numpy as np

from icar_jax.inference.forward import PendingBatch

MAX_IN_FLIGHT = 4  # tower batches dispatched to the device before the host waits for the oldest


@dataclass
class RoutingStats:
    """Row counts and timings of a routed run; times in seconds.

    Attributes:
        rows: executed blocks -> number of images.
        padding: executed blocks -> padding rows computed and discarded; `score_padding` counts those of the complexity model.
        total_s: wall time of the run.
        input_s: part of total_s spent waiting for preprocessed images; large if decoding is the bottleneck.
        wait_s: part of total_s spent waiting for the device.
        tower_s, score_s: device time of tower batches and of scores; for the rest of total_s the device was idle or moved data.
        compilations: programs compiled by XLA during the run; 0 after `warm_up`.
    """

    rows: dict[int, int] = field(default_factory=dict)
    padding: dict[int, int] = field(default_factory=dict)
    score_padding: int = 0
    total_s: float = 0.0
    input_s: float = 0.0
    wait_s: float = 0.0
    tower_s: float = 0.0
    score_s: float = 0.0
    compilations: int = 0

    def add(self, other: RoutingStats) -> None:
        """Adds the counts and times of another run in place."""
        for name, value in other.__dict__.items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                mine.update({key: mine.get(key, 0) + count for key, count in value.items()})
            else:
                setattr(self, name, mine + value)

    def as_dict(self) -> dict[str, Any]:
        """The fields as a JSON-serialisable dict; exits become string keys."""
        return {**self.__dict__, "rows": _keyed(self.rows), "padding": _keyed(self.padding)}


def _keyed(values: dict[int, int]) -> dict[str, int]:
    return {str(k): v for k, v in sorted(values.items())}


class FetchQueue:
    """Fetches results from the device on its own thread, in the order of `add`.

    Leaving it as a context manager waits for pending batches and ends the thread.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fetch")
        self._room = Semaphore(MAX_IN_FLIGHT)
        self._finished = 0.0

    def __enter__(self) -> FetchQueue:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def wait_for_room(self) -> None:
        """Blocks until fewer than MAX_IN_FLIGHT tower batches are in flight; follow each call with `add(bounded=True)`."""
        self._room.acquire()

    def add(self, pending: PendingBatch, bounded: bool = False) -> Future:
        """A Future of (rows float32 [n, ...], seconds of device time for this batch).

        Seconds count from the end of the previous batch, or from this call if later. The device runs batches in order, so
        this is the time it spent on the batch. `bounded` counts the batch towards MAX_IN_FLIGHT.
        """
        return self._pool.submit(self._fetch, pending, time.perf_counter(), bounded)

    def _fetch(self, pending: PendingBatch, submitted: float, bounded: bool) -> tuple[np.ndarray, float]:
        try:
            rows = pending.result()
        finally:
            if bounded:
                self._room.release()
        begun, self._finished = max(submitted, self._finished), time.perf_counter()
        return rows, self._finished - begun

"""Batches under way on the device: a thread waits for each in turn and copies its rows back, so the host never has to."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Semaphore
from typing import Any

import numpy as np

from icar_jax.inference.forward import Pending

MAX_IN_FLIGHT = 4  # tower batches handed to the device before the host waits for the oldest


@dataclass
class Stats:
    """What a routed run did.

    Attributes:
        rows: executed blocks -> images.
        padding: executed blocks -> rows that were computed and thrown away; `score_padding` likewise of the complexity model.
        total_s: wall time of the run.
        input_s: of it, waiting for prepared images: where it is large, decoding is what limits.
        wait_s: of it, waiting for the device.
        tower_s, score_s: time in which the device finished tower batches and scores; what both leave of the wall time it stood
            idle, or moved data.
        compilations: programs that XLA compiled meanwhile; 0 after `warm_up`.
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

    def add(self, other: Stats) -> None:
        """Sums in another run."""
        for name, value in other.__dict__.items():
            mine = getattr(self, name)
            if isinstance(value, dict):
                mine.update({key: mine.get(key, 0) + count for key, count in value.items()})
            else:
                setattr(self, name, mine + value)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.__dict__, "rows": _keyed(self.rows), "padding": _keyed(self.padding)}


def _keyed(values: dict[int, int]) -> dict[str, int]:
    return {str(k): v for k, v in sorted(values.items())}


class FetchQueue:
    """The device's results, fetched by a thread of its own in the order of `add`.

    As a context manager: leaving it waits for what is under way, and ends the thread.
    """

    def __init__(self):
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="landing")
        self._room = Semaphore(MAX_IN_FLIGHT)
        self._landed = 0.0

    def __enter__(self) -> FetchQueue:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)

    def wait_for_room(self) -> None:
        """Waits until fewer than MAX_IN_FLIGHT tower batches are under way; each call is followed by an `add(bounded=True)`."""
        self._room.acquire()

    def add(self, pending: Pending, bounded: bool = False) -> Future:
        """A Future of (rows float32 [n, ...], seconds); seconds pass from the end of the batch before, or from now, to its end.

        The device works in order, so these are the times in which it was busy with this batch.
        """
        return self._pool.submit(self._fetch, pending, time.perf_counter(), bounded)

    def _fetch(self, pending: Pending, submitted: float, bounded: bool) -> tuple[np.ndarray, float]:
        try:
            rows = pending.result()
        finally:
            if bounded:
                self._room.release()
        begun, self._landed = max(submitted, self._landed), time.perf_counter()
        return rows, self._landed - begun

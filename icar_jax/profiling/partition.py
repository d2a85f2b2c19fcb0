"""Divides the wall time of one thread among named rows, so that every second is counted once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Literal

Row = Literal[
    "starting", "input wait", "compile", "transfer", "step", "towers", "router", "saving", "evaluating", "profiler", "other"
]  # fmt: skip

# Event of jax.monitoring -> the stage of compilation that it times; the last one also covers reading a compiled program from
# the compilation cache.
STAGES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "xla_s",
}


class Partition:
    """Seconds by row. A section inside another one takes its time from the outer one.

    Args:
        first: row of the time outside all sections.
        since: reading of `clock` at which the time begins; None is now.
        clock: returns seconds.
    """

    def __init__(self, first: Row, since: float | None = None, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self._counted = clock() if since is None else since  # everything before it has been given to a row
        self._open: list[Row] = [first]
        self._seconds: dict[Row, float] = {}

    def seconds(self) -> dict[Row, float]:
        """Row -> its seconds up to now; their sum is the time since the beginning."""
        self._count()
        return dict(self._seconds)

    @contextlib.contextmanager
    def section(self, row: Row) -> Iterator[None]:
        """Counts the time of the block for `row`."""
        self._count()
        self._open.append(row)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def outside(self, row: Row) -> None:
        """From now on, the time outside all sections is that of `row`."""
        self._count()
        self._open[0] = row

    def move(self, row: Row, seconds: float) -> float:
        """Counts that many seconds of the innermost open section for `row` instead; returns how many were there to move."""
        self._count()
        here = self._open[-1]
        seconds = max(0.0, min(seconds, self._seconds[here]))
        self._seconds[here] -= seconds
        self._seconds[row] = self._seconds.get(row, 0.0) + seconds
        return seconds

    def _count(self) -> None:
        now, row = self.clock(), self._open[-1]
        self._seconds[row] = self._seconds.get(row, 0.0) + now - self._counted
        self._counted = now


class Compilations:
    """Sums the compile events of one thread. Events contain others: tracing a function contains tracing those that it calls.

    Attributes:
        seconds: stage -> seconds without those of the events inside.
        programs: compiled or read from the compilation cache, of every thread; from_cache: read.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES.values(), 0.0)
        self.programs = self.from_cache = 0
        self._spans: list[tuple[float, float]] = []  # (start, seconds) of events that no later event contains so far

    def own_seconds(self, seconds: float, end: float) -> float:
        """Seconds of an event, ending at `end`, that no earlier event has counted; call it once for each, as they end."""
        start, inside = end - seconds, 0.0
        while self._spans and self._spans[-1][0] >= start:
            inside += self._spans.pop()[1]
        self._spans.append((start, seconds))
        return max(0.0, seconds - inside)

"""The profile of a run: the current one, and the calls by which the loops report to it."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from icar_jax.config import require_local
from icar_jax.profiling.folder import SUMMARY, TRACE, claim, require_usable
from icar_jax.profiling.partition import STAGES, Compilations, Partition, Row
from icar_jax.profiling.summary import Command, Summary, write
from icar_jax.profiling.trace import Trace

T = TypeVar("T")

# Not part of the throughput: what happens once, or on a schedule of its own.
_APART: tuple[Row, ...] = ("starting", "compile", "saving", "evaluating", "profiler")
_BACKEND_COMPILE, _CACHE_HIT = next(event for event in STAGES if "backend" in event), "/jax/compilation_cache/cache_hits"
_WARM = 3  # training steps before the trace
_NOTHING: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
_END: Any = object()


class NoProfile:
    """What the loops report to when no profile was asked for: every call returns at once."""

    def section(self, row: Row) -> contextlib.AbstractContextManager[None]:
        return _NOTHING

    def steps(self, numbers: range, size: int, unit: str) -> Iterable[int]:
        return numbers

    def batches(self, batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
        return batches

    def ready(self, values: T) -> T:
        return values

    def device_wait(self, seconds: float, towers: float, router: float) -> None:
        pass


class Profile(NoProfile):
    """Partition, compilations, steps and trace of one run.

    Args:
        folder: as in `icar_jax.profiling.folder`.
        command: the command that is profiled.
        since: reading of `clock` at which the run began; None is now.
        clock: returns seconds.
    """

    def __init__(
        self, folder: Path, command: Command, since: float | None = None, clock: Callable[[], float] = time.perf_counter
    ):
        self.partition = Partition("starting", since, clock)
        self.compilations = Compilations()
        self._folder, self._command = folder, command
        self._process, self._processes = _place()
        self._own = folder if self._process == 0 else folder / f"process_{self._process}"
        self._trace = Trace(self._own / TRACE)
        self._thread = threading.get_ident()
        self._unit, self._begun = "images", False
        self._images, self._first = 0, 1
        self._steps = array("d")  # seconds of each
        if self._process == 0:
            require_usable(folder)

    def section(self, row: Row) -> contextlib.AbstractContextManager[None]:
        """Counts the time of the block for `row`, less that of sections inside it."""
        return self._section(row) if threading.get_ident() == self._thread else _NOTHING

    @contextlib.contextmanager
    def _section(self, row: Row) -> Iterator[None]:
        if row == "evaluating":
            self._end_trace()  # an evaluation may take longer than all steps before it
        with self.partition.section(row), self._trace.section(row):
            yield

    def steps(self, numbers: range, size: int, unit: str) -> Iterable[int]:
        """Yields the numbers of training steps, each of `size` images or pairs, and times them."""
        self._unit, self._first = unit, numbers.start
        return self._watched(numbers, lambda _: size, min(_WARM, len(numbers) - 1))

    def batches(self, batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
        """Yields batches of an inference run, dicts of arrays [n, ...], and times them; may be called for each shard."""
        return self._watched(batches, lambda batch: len(next(iter(batch.values()))), 0)

    def _watched(self, items: Iterable[T], size: Callable[[T], int], warm: int) -> Iterator[T]:
        items = iter(items)
        while True:
            if self._trace.full:
                self._end_trace()
            before = self._working_s()
            with self.section("input wait"):
                item = next(items, _END)
            if item is _END:
                return
            self._begin()
            if len(self._steps) >= warm:
                with self.partition.section("profiler"):
                    self._trace.begin()
            with self._trace.step("step", self._first + len(self._steps)):
                yield item
            self._images += size(item)
            self._steps.append(self._working_s() - before)

    def ready(self, values: T) -> T:
        """Waits until the device has computed the arrays, so that its time is not counted for what the host does next."""
        import jax

        return jax.block_until_ready(values)

    def device_wait(self, seconds: float, towers: float, router: float) -> None:
        """Counts `seconds` of the open section as waiting for the device, in proportion to its time for towers and router."""
        if threading.get_ident() == self._thread and (busy := towers + router) > 0:
            self.partition.move("towers", seconds * towers / busy)
            self.partition.move("router", seconds * router / busy)

    def open(self) -> None:
        """Starts listening to compile events."""
        import jax

        jax.monitoring.register_event_duration_secs_listener(self._on_duration)
        jax.monitoring.register_event_listener(self._on_event)

    def close(self, error: BaseException | None) -> None:
        """Ends the profile; process 0 prints the summary and writes it, if a step was begun before the `error`."""
        import jax

        jax.monitoring.unregister_event_duration_listener(self._on_duration)
        jax.monitoring.unregister_event_listener(self._on_event)
        self._end_trace()
        if self._process == 0 and (self._begun or error is None):
            summary = self.summary(error)
            print(summary.text(), flush=True)
            if self._begun:
                write(summary)

    def summary(self, error: BaseException | None = None) -> Summary:
        """The profile so far."""
        compilations = self.compilations
        return Summary(
            command=self._command,
            error=_ended_by(error),
            processes=self._processes,
            seconds=self.partition.seconds(),
            compile_s=dict(compilations.seconds),
            programs=compilations.programs,
            programs_from_cache=compilations.from_cache,
            unit=self._unit,
            images=self._images,
            working_s=self._working_s(),
            steps=list(self._steps),
            first_step=self._first,
            trace=str(self._trace.folder) if self._trace.steps else "",
            traced=self._trace.steps,
            trace_error=self._trace.error,
            file=str(self._folder / SUMMARY) if self._begun else "",
        )

    def _begin(self) -> None:
        if not self._begun:
            claim(self._own)
            self._begun = True
            self.partition.outside("other")

    def _end_trace(self) -> None:
        with self.partition.section("profiler"):
            self._trace.end()

    def _working_s(self) -> float:
        """Seconds so far without those of _APART."""
        return sum(seconds for row, seconds in self.partition.seconds().items() if row not in _APART)

    def _on_duration(self, event: str, duration_secs: float, **_: Any) -> None:
        self.compilations.programs += event == _BACKEND_COMPILE
        if event in STAGES and threading.get_ident() == self._thread:
            own = self.compilations.own_seconds(duration_secs, self.partition.clock())
            self.compilations.seconds[STAGES[event]] += self.partition.move("compile", own)

    def _on_event(self, event: str, **_: Any) -> None:
        self.compilations.from_cache += event == _CACHE_HIT


_current = NoProfile()


@contextlib.contextmanager
def profile(folder: str | os.PathLike | None, command: Command, since: float | None = None) -> Iterator[None]:
    """Profiles what this thread does in the block, and prints a summary at its end; None for a folder does nothing.

    Args:
        folder: where the trace and summary.json go; an earlier profile there is replaced.
        command: whose rows the summary shows.
        since: reading of time.perf_counter() at which the run began; None is now.

    Process 0 prints and writes the summary, also if the block raises after its first step. Raises ConfigError for a folder
    that cannot be used.
    """
    global _current
    if folder is None:
        yield
        return
    require_local("--profile", folder)
    made, before = Profile(Path(folder), command, since), _current
    made.open()
    _current, error = made, None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        _current = before
        made.close(error)


def section(row: Row) -> contextlib.AbstractContextManager[None]:
    """See `Profile.section`; does nothing without a profile."""
    return _current.section(row)


def steps(numbers: range, size: int, unit: str) -> Iterable[int]:
    """See `Profile.steps`; without a profile `numbers` itself."""
    return _current.steps(numbers, size, unit)


def batches(batches: Iterable[Mapping[str, Any]]) -> Iterable[Mapping[str, Any]]:
    """See `Profile.batches`; without a profile `batches` itself."""
    return _current.batches(batches)


def ready(values: T) -> T:
    """See `Profile.ready`; without a profile the values, without waiting."""
    return _current.ready(values)


def device_wait(seconds: float, towers: float, router: float) -> None:
    """See `Profile.device_wait`; does nothing without a profile."""
    _current.device_wait(seconds, towers, router)


def _ended_by(error: BaseException | None) -> str:
    """Name of the exception that ended the run; empty if it finished, be it with unusable files (exit status 1)."""
    if isinstance(error, SystemExit) and (error.code == 1 or error.__context__ is not None):
        error = error.__context__  # what the command has reported in a line
    return type(error).__name__ if error is not None else ""


def _place() -> tuple[int, int]:
    """(index of this process, number of processes)."""
    import jax

    # Asking for the index of a single process would start its backend, before the command has checked its arguments.
    return (jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else (0, 1)

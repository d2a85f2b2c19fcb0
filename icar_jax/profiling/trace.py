"""JAX's own profiler over a few steps of a run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

LONGEST = 10  # steps that a trace covers: its size grows with them


class Trace:
    """Records the steps `first` to `first + LONGEST - 1` into a folder; a trace that fails does not end the run.

    Attributes:
        steps: numbers of the first and the last recorded step; None if none was recorded.
        error: why it could not be recorded or written; empty if it could.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.steps: tuple[int, int] | None = None
        self.error = ""
        self._running = self._over = False

    def begin(self) -> None:
        """Starts recording, unless it has been stopped before."""
        if self._running or self._over:
            return
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # every Python call would slow the run several times and fill the trace
        try:
            jax.profiler.start_trace(self.folder, profiler_options=options)
        except Exception as error:
            self.error, self._over = str(error), True
        else:
            self._running = True

    def end(self) -> None:
        """Stops recording and writes the trace."""
        if not self._running:
            return
        import jax

        self._running, self._over = False, True
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self.error = str(error)

    @property
    def full(self) -> bool:
        """Whether as many steps as allowed are being recorded."""
        return self._running and self.steps is not None and self.steps[1] - self.steps[0] + 1 >= LONGEST

    def step(self, name: str, number: int) -> contextlib.AbstractContextManager[Any]:
        """Marks the block as step `number` of the trace."""
        if not self._running:
            return contextlib.nullcontext()
        import jax

        self.steps = (self.steps[0] if self.steps else number, number)
        return jax.profiler.StepTraceAnnotation(name, step_num=number)

    def section(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Names the block in the trace."""
        if not self._running:
            return contextlib.nullcontext()
        import jax

        return jax.profiler.TraceAnnotation(name)

"""Preemption handling: on SIGTERM (preemption, a scheduler's time limit) or SIGINT the run saves its state before it stops."""

from __future__ import annotations

import os
import signal
import threading
import time

import jax

from icar_jax.parallel import distributed

SIGNALS = {signal.SIGINT: 1, signal.SIGTERM: 2}
_NAMES = {number: s.name for s, number in SIGNALS.items()}
# A launcher may forward a signal that the terminal or scheduler has already sent to the whole process group: signals within
# this many seconds count as one.
_SAME_REQUEST_S = 1.0


class StopRequest:
    """Context manager that stores the first stop signal in `name`; a second signal ends the program at once.

    Python handles signals in the main thread only; in another thread this does nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._note) for s in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self.name is None:
            self.name, self._since = name, time.monotonic()
            # os.write, because the handler may interrupt a print, and print is not reentrant.
            os.write(2, f"\n{name}: stopping after this step; {name} again ends at once, without saving\n".encode())
        elif time.monotonic() - self._since > _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Agreement:
    """Makes all processes stop at the same step; called once before each step.

    With several processes each step starts an all-reduce of the stop flag, which is read one step later, so no process waits.
    """

    def __init__(self, request: StopRequest):
        self._request = request
        self._travelling: jax.Array | None = None

    def __call__(self, after: jax.Array) -> str | None:
        """Returns the name of the signal to stop for, or None. `after` is an output of the previous step."""
        name = self._request.name
        if jax.process_count() == 1:
            return name
        heard = 0 if self._travelling is None else int(self._travelling)
        self._travelling = distributed.greatest_later(SIGNALS[signal.Signals[name]] if name else 0, after)
        return _NAMES.get(heard)

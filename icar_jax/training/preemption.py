"""Being asked to stop: SIGTERM (preemption, a scheduler's time limit) and SIGINT let the run save first."""

from __future__ import annotations

import os
import signal
import threading
import time

import jax

from icar_jax.parallel import distributed

SIGNALS = {signal.SIGINT: 1, signal.SIGTERM: 2}
_NAMES = {number: s.name for s, number in SIGNALS.items()}
# Launchers forward a signal that the terminal or the scheduler has already sent to the whole group.
_SAME_REQUEST_S = 1.0


class StopRequest:
    """While entered, the first signal is noted in `name`, and a second one ends the program at once.

    Signals reach Python in the main thread alone; entered from another thread this does nothing.
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
            # os.write: a handler may interrupt a print, which does not allow a second one.
            os.write(2, f"\n{name}: stopping after this step; {name} again ends at once, without saving\n".encode())
        elif time.monotonic() - self._since > _SAME_REQUEST_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Agreement:
    """The request that all processes act upon, at the same step; asked once before each step.

    In a run of several processes a flag travels with each step and is read one step later, so that nobody waits for it.
    """

    def __init__(self, request: StopRequest):
        self._request = request
        self._travelling: jax.Array | None = None

    def __call__(self, after: jax.Array) -> str | None:
        """Name of the signal to stop for, or None. `after` is an output of the last step."""
        name = self._request.name
        if jax.process_count() == 1:
            return name
        heard = 0 if self._travelling is None else int(self._travelling)
        self._travelling = distributed.greatest_later(SIGNALS[signal.Signals[name]] if name else 0, after)
        return _NAMES.get(heard)

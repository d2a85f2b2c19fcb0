"""Noticing that data no longer comes: a read that never returns, a worker process that died."""

from __future__ import annotations

import multiprocessing
import os
import queue
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from icar_jax.data.sources.shards import read_by
from icar_jax.errors import IcarError

_LOOK_EVERY_S = 1.0
_worker = ""  # of this process; empty in the main one
_ending = threading.Event()  # of a worker process in which a batch stalled: the others need not be waited for


class StalledData(IcarError, RuntimeError):
    """No batch came within the time allowed; the message names the batch, what was being read and by whom."""


class WorkerDied(IcarError, RuntimeError):
    """A worker process ended by itself or was killed; the message names it, and the signal or exit code."""


def set_worker(folder: str, index: int, count: int) -> None:
    """Called in a worker process: who it is, for its messages and for the process that started it."""
    global _worker
    _worker = f"data worker {index} of {count} (process {os.getpid()})"
    Path(folder, f"worker-{index}").write_text(str(os.getpid()), encoding="utf-8")


def outlive_signals_not_the_parent() -> None:
    """Called in a worker process: it ends when it is told to or when its parent is gone, and for no other request.

    Schedulers and terminals signal the whole group of processes, and the parent needs batches until all processes of the run
    have agreed at which step to stop. A parent that was killed closes nothing: its workers would wait for it for ever, with
    what they hold in memory.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if (parent := multiprocessing.parent_process()) is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


def _end_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


@dataclass
class WatchedIterator:
    """`make`, each call in a daemon thread; raises StalledData where one takes longer than `timeout_s`."""

    make: Callable[[int], Any]
    timeout_s: float
    closing: threading.Event | None = None  # of an iterator without worker processes: ends waiting early, as `_ending` does

    def __call__(self, step: int) -> Any:
        answers: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, args=(step, answers), daemon=True)
        thread.start()
        ending = self.closing or _ending
        slice_s = min(_LOOK_EVERY_S, self.timeout_s)
        # Counts looks, not the clock: time in which the program was suspended, as by a job scheduler, is no stall.
        for _ in range(max(1, round(self.timeout_s / slice_s))):
            try:
                result, error = answers.get(timeout=slice_s)
            except queue.Empty:
                if ending.is_set():
                    break
                continue
            if error is not None:
                raise error
            return result
        ending.set()
        what = read_by(thread.ident or 0) or "no file"
        where = getattr(self.make, "where", "batch {}".format)(step)
        raise StalledData(
            f"no batch for {self.timeout_s:g} s (config.data.stall_timeout_s), waiting for {where}; "
            f"{_worker or 'this process'} is reading {what}. Check that storage, then run the command again: it continues "
            "from its last checkpoint"
        )

    def _run(self, step: int, answers: queue.SimpleQueue) -> None:
        try:
            answers.put((self.make(step), None))
        except BaseException as error:
            answers.put((None, error))
            del error


@dataclass
class Workers:
    """The worker processes of one iterator, found by the files in which they write who they are."""

    count: int
    folder: str = ""
    found: dict[int, BaseProcess] = field(default_factory=dict)
    unseen: dict[int, int] = field(default_factory=dict)  # process ids of those that came and went between two looks

    def look(self) -> bool:
        """Finds processes that have started since; whether all have."""
        if len(self.found) == self.count:
            return True
        children = {child.pid: child for child in multiprocessing.active_children()}
        self.unseen = {}
        for index in set(range(self.count)) - set(self.found):
            try:
                pid = int(Path(self.folder, f"worker-{index}").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # not started, or just writing
            if pid in children:
                self.found[index] = children[pid]
            else:
                self.unseen[index] = pid
        return len(self.found) == self.count

    def dead(self) -> dict[int, int]:
        """Index -> exit code of those that failed or were killed; one that has made its last batch ends with 0."""
        return {i: process.exitcode for i, process in self.found.items() if process.exitcode}

    def kill(self) -> None:
        """Ends all of them at once: those that do not answer would be waited for, one after the other, while closing."""
        for process in self.found.values():
            if process.is_alive():
                process.kill()

    def explain(self, error: BaseException, where: str) -> BaseException:
        """The error to raise for one that came instead of a batch: WorkerDied where that is what happened."""
        grains = re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
        if not isinstance(error, WorkerDied) and not (isinstance(error, RuntimeError) and grains):
            if isinstance(error, StalledData):
                self.kill()
            return error
        if gone := self.dead():
            index, code = next(iter(gone.items()))
            who = f"data worker {index} of {self.count} (process {self.found[index].pid})"
        else:
            code = int(grains[1]) if grains else 0
            indices, pids = (", ".join(map(str, v)) for v in (self.unseen, self.unseen.values()))
            who = f"data worker {indices} of {self.count} (process {pids})" if pids else f"a data worker of {self.count}"
        self.kill()
        fate, hint = _fate(code)
        return WorkerDied(
            f"{who} {fate} before {where} came; {hint}. Nothing of the run is lost but the steps since its last checkpoint: "
            "run the command again"
        )


def _fate(code: int) -> tuple[str, str]:
    """What happened to a process, and what may be done."""
    if code >= 0:
        return f"ended with exit code {code}", "its own message, if any, stands above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "an unknown signal"
    hint = "the system does so when memory runs out: lower config.data.workers or config.data.threads"
    return f"was killed by signal {-code}, {name},", hint if code == -signal.SIGKILL else "see the system's log"

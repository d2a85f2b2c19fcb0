"""Detects stalled reads and dead worker processes."""

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
_worker = ""  # name of this worker process; empty in the main process
_ending = threading.Event()  # set in a worker process after a stalled batch, so that other threads stop waiting


class StalledData(IcarError, RuntimeError):
    """No batch arrived within the timeout; the message names the batch, the process and what it was reading."""


class WorkerDied(IcarError, RuntimeError):
    """A worker process exited or was killed; the message names it and the signal or exit code."""


def set_worker(folder: str, index: int, count: int) -> None:
    """Sets this worker process's name for messages, and writes its process id to `folder` for the parent."""
    global _worker
    _worker = f"data worker {index} of {count} (process {os.getpid()})"
    Path(folder, f"worker-{index}").write_text(str(os.getpid()), encoding="utf-8")


def ignore_signals_and_exit_with_parent() -> None:
    """Makes this worker process ignore SIGTERM and SIGINT, and exit when its parent exits.

    Schedulers and terminals signal the whole process group, but the parent needs batches until all processes of the run have
    agreed on the step to stop at. A killed parent closes nothing, so its workers would otherwise wait forever and keep their
    memory.
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
    """Calls `make`, each time in a daemon thread; raises StalledData if a call takes longer than `timeout_s` seconds."""

    make: Callable[[int], Any]
    timeout_s: float
    closing: threading.Event | None = None  # without worker processes: stops waiting early, as `_ending` does

    def __call__(self, step: int) -> Any:
        answers: queue.SimpleQueue = queue.SimpleQueue()
        thread = threading.Thread(target=self._run, args=(step, answers), daemon=True)
        thread.start()
        ending = self.closing or _ending
        slice_s = min(_LOOK_EVERY_S, self.timeout_s)
        # Count polls instead of clock time, so that a suspended program (as by a job scheduler) is not a stall.
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
            "from the last checkpoint"
        )

    def _run(self, step: int, answers: queue.SimpleQueue) -> None:
        try:
            answers.put((self.make(step), None))
        except BaseException as error:
            answers.put((None, error))
            del error


@dataclass
class Workers:
    """The worker processes of one iterator, found by the process-id files that they write."""

    count: int
    folder: str = ""
    found: dict[int, BaseProcess] = field(default_factory=dict)
    unseen: dict[int, int] = field(default_factory=dict)  # process ids of workers that started and exited between two polls

    def look(self) -> bool:
        """Finds newly started processes; returns whether all have started."""
        if len(self.found) == self.count:
            return True
        children = {child.pid: child for child in multiprocessing.active_children()}
        self.unseen = {}
        for index in set(range(self.count)) - set(self.found):
            try:
                pid = int(Path(self.folder, f"worker-{index}").read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue  # not started, or still writing
            if pid in children:
                self.found[index] = children[pid]
            else:
                self.unseen[index] = pid
        return len(self.found) == self.count

    def dead(self) -> dict[int, int]:
        """Returns index -> exit code of workers that failed or were killed; finished workers exit with 0."""
        return {i: process.exitcode for i, process in self.found.items() if process.exitcode}

    def kill(self) -> None:
        """Kills all workers at once; otherwise closing would wait for unresponsive ones, one after the other."""
        for process in self.found.values():
            if process.is_alive():
                process.kill()

    def explain(self, error: BaseException, where: str) -> BaseException:
        """Returns the error to raise for an error received instead of a batch: WorkerDied if a worker died."""
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
            f"{who} {fate} before {where} arrived; {hint}. Only the steps since the last checkpoint are lost: run the command "
            "again"
        )


def _fate(code: int) -> tuple[str, str]:
    """Returns what happened to a process, and a hint for the user."""
    if code >= 0:
        return f"ended with exit code {code}", "see its own message above, if any"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "an unknown signal"
    hint = "the system does this when memory runs out: lower config.data.workers or config.data.threads"
    return f"was killed by signal {-code}, {name},", hint if code == -signal.SIGKILL else "see the system log"

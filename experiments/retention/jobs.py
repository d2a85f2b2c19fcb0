"""Runs the trainings of experiments/retention/study.py in dependency order, sequentially or in parallel."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icar_jax.config import ExperimentConfig


@dataclass(frozen=True)
class TrainingRun:
    """One training: its display name, workdir and configuration."""

    name: str
    workdir: Path
    config: ExperimentConfig

    @property
    def finished(self) -> bool:
        return _finished(self.workdir)


@dataclass(frozen=True)
class Job:
    """A CLIP with the routers trained on its tower; or, without `of`, a run that other jobs depend on."""

    run: TrainingRun
    heads: tuple[TrainingRun, ...] = ()
    of: tuple[str, str, int] | None = None  # dataset, recipe, seed
    judged_by: tuple[Path, ...] = ()  # workdirs needed for its evaluation

    @property
    def runs(self) -> tuple[TrainingRun, ...]:
        return (self.run, *self.heads)

    @property
    def ready(self) -> bool:
        """Whether all runs that it starts from or is evaluated with are finished."""
        start = self.run.config.train.init
        return all(map(_finished, (*([Path(start)] if start else []), *self.judged_by)))


class ChildProcesses:
    """The running child processes, which can be stopped together."""

    def __init__(self) -> None:
        self._lock, self._alive, self._stopped = threading.Lock(), set(), False

    def call(self, command: Sequence[Any], log: Path | None) -> None:
        """Runs a program and appends its output to `log`. Raises CalledProcessError if it fails or was stopped."""
        file = log.open("ab") if log is not None else None
        try:
            with self._lock:
                if self._stopped:
                    raise subprocess.CalledProcessError(1, command)
                child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT if file else None)
                self._alive.add(child)
            try:
                status = child.wait()
            except BaseException:
                child.terminate()  # a training saves its state
                child.wait()
                raise
            finally:
                with self._lock:
                    self._alive.discard(child)
        finally:
            if file is not None:
                file.close()
        if status:
            # A killed program (out of memory) prints no error, and errors in a log are not visible in the terminal.
            program = command[2] if command[1] == "-m" else Path(command[1]).name
            why = f"{program} was killed by signal {-status}" if status < 0 else "failed"
            if not self._stopped and (status < 0 or log is not None):
                print(f"{why}{f', see {log}' if log is not None else ''}\n", end="", file=sys.stderr, flush=True)
            raise subprocess.CalledProcessError(status, command)

    def stop(self) -> None:
        """Terminates all processes and prevents new ones."""
        with self._lock:
            self._stopped = True
            for child in self._alive:
                child.terminate()


class Progress:
    """Prints "run k of n" and the estimated remaining time, from the training pairs processed so far."""

    def __init__(self, todo: Sequence[TrainingRun]):
        self._number = {run.workdir: i for i, run in enumerate(todo, 1)}
        self._left = sum(_pairs(run) for run in todo if not run.finished)
        self._pairs, self._begun, self._lock = 0, time.perf_counter(), threading.Lock()

    def begin(self, run: TrainingRun, log: Path | None) -> None:
        with self._lock:
            seconds = time.perf_counter() - self._begun
            left = "" if not self._pairs else f"; about {_duration(self._left * seconds / self._pairs)} left"
            where = "" if log is None else f" ({log})"
            print(f"\n== run {self._number[run.workdir]} of {len(self._number)}: {run.name}{where}{left}\n", end="", flush=True)

    def end(self, run: TrainingRun) -> None:
        with self._lock:
            self._left, self._pairs = self._left - _pairs(run), self._pairs + _pairs(run)


def run_jobs(todo: Sequence[Job], do: Callable[[Job], None], side_by_side: int, children: ChildProcesses) -> None:
    """Calls `do` for every job, `side_by_side` at a time; each takes the first ready job and its share of the cores.

    Re-raises the error of the first failed job after the others have been stopped.
    """
    if side_by_side == 1:
        for job in todo:
            do(job)
        return
    waiting, failed, changed = list(todo), [], threading.Condition()

    def take() -> Job | None:
        with changed:
            while waiting and not failed:
                for job in waiting:
                    if job.ready:
                        waiting.remove(job)
                        return job
                changed.wait()
        return None

    def work(place: int) -> None:
        _pin_to_cores(place, side_by_side)
        while (job := take()) is not None:
            try:
                do(job)
            except BaseException as error:
                failed.append(error)
                children.stop()
            with changed:
                changed.notify_all()

    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in range(side_by_side)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # lets the main thread handle signals
    except BaseException as error:
        failed.insert(0, error)
        children.stop()
        with changed:
            changed.notify_all()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]


def _pin_to_cores(place: int, of: int) -> None:
    """Pins this thread and its child processes to their share of the cores; sharing cores would slow both down."""
    if not hasattr(os, "sched_setaffinity"):
        return  # not Linux: the system schedules them
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[place::of] or cores)


def _finished(workdir: Path) -> bool:
    return (workdir / "model" / "icar.json").is_file()


def _pairs(run: TrainingRun) -> int:
    return run.config.train.steps * run.config.train.batch_size


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"

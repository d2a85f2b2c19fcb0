"""Runs readers in processes of their own, ends those that hang, and counts."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tqdm import tqdm

from tests.support.fuzz import worker
from tests.support.fuzz.reader import Reader

_SHOWN = 20  # faults of each reader that are printed
FAULTS = ("crash", "hang", "memory", "silence", "event", "message")


@dataclass
class Tally:
    """What a reader did: counts of faults, of refusals by class, the slowest input."""

    inputs: int = 0
    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    slowest: float = 0.0
    megabytes: float = 0.0


def fuzz(
    reader: Reader, seed: int, count: int, until: float, hang_s: float, keep: Path | None, tick: Callable[[], None],
    first: int = 0,
) -> Tally:  # fmt: skip
    """Reads `count` inputs from number `first`, or as many as there is time for until `until` (of time.monotonic).

    Inputs with a fault are written into `keep`. Raises RuntimeError if valid inputs are not read.
    """
    tally = Tally()
    number, end = first, first + max(count, len(reader.handmade))
    context = multiprocessing.get_context("spawn")
    while number < end and (time.monotonic() < until or number < len(reader.handmade)):
        folder = Path(tempfile.mkdtemp(prefix="icar-fuzz-"))
        ours, theirs = context.Pipe()
        process = context.Process(target=worker.work, args=(reader, folder, seed, theirs), daemon=True)
        process.start()
        theirs.close()
        try:
            _await_start(ours, reader)
            while number < end and (time.monotonic() < until or number < len(reader.handmade)):
                ours.send(number)
                if not ours.poll(hang_s):
                    _note(tally, reader, folder, seed, number, f"hang: longer than {hang_s:.0f} s", keep)
                    number += 1
                    break  # the process is ended, and a new one goes on
                _, fault, refused, seconds, megabytes = ours.recv()
                tally.inputs += 1
                tally.slowest, tally.megabytes = max(tally.slowest, seconds), max(tally.megabytes, megabytes)
                if fault:
                    _note(tally, reader, folder, seed, number, fault, keep)
                elif refused:
                    tally.refused[refused] += 1
                else:
                    tally.accepted += 1
                number += 1
                tick()
            else:
                ours.send(None)
        except EOFError:  # the process died: a crash below Python, or it was killed for its memory
            _note(tally, reader, folder, seed, number, f"crash: the process died ({process.exitcode})", keep)
            number += 1
        finally:
            process.join(5) if process.exitcode is None and number >= end else None
            process.kill()
            process.join()
            shutil.rmtree(folder, ignore_errors=True)
    return tally


def _await_start(connection: Connection, reader: Reader) -> None:
    try:
        if connection.poll(600) and connection.recv() == "ready":
            return
    except EOFError:
        pass
    raise RuntimeError(f"{reader.name}: its valid inputs are not read; see the traceback above")


def _note(tally: Tally, reader: Reader, folder: Path, seed: int, number: int, fault: str, keep: Path | None) -> None:
    kind = fault.split(":")[0]
    if kind == "hang":
        tally.inputs += 1
    tally.faults[kind] += 1
    if sum(tally.faults.values()) <= _SHOWN:
        tqdm.write(f"{reader.name} {number}: {fault.strip()}")
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        seeds = reader.prepare(Path(tempfile.mkdtemp(dir=folder)))
        (keep / f"{reader.name.replace('/', ' ')}-{number}-{kind}").write_bytes(worker.input_of(reader, seeds, seed, number)[0])


def table(tallies: dict[str, Tally]) -> str:
    """One row for each reader, and their sum."""
    head = ["reader", "inputs", "read", "refused", *(f"{name}" for name in FAULTS), "slowest s", "peak MB"]
    rows = [
        [
            name,
            t.inputs,
            t.accepted,
            sum(t.refused.values()),
            *(t.faults[f] for f in FAULTS),
            f"{t.slowest:.2f}",
            f"{t.megabytes:.0f}",
        ]
        for name, t in tallies.items()
    ]
    total = ["all", *(sum(int(row[i]) for row in rows) for i in range(1, 4 + len(FAULTS)))]
    total += [
        f"{max((t.slowest for t in tallies.values()), default=0):.2f}",
        f"{max((t.megabytes for t in tallies.values()), default=0):.0f}",
    ]
    lines = [list(map(str, row)) for row in [head, *rows, total]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) for line in lines
    )


def clean(tallies: Sequence[Tally]) -> bool:
    return not any(tally.faults for tally in tallies)

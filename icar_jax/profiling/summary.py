"""The summary of a profile as a table of one screen, and as JSON."""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass
from typing import Any, Literal

from icar_jax import workdir as files
from icar_jax.profiling.folder import MADE_BY
from icar_jax.profiling.partition import Row

Command = Literal["train", "embed", "index"]

_TRAIN: dict[Row, str] = {
    "starting": "imports, data, weights; up to the first step",
    "input wait": "the host waits for a batch",
    "compile": "",
    "transfer": "batches to the device, metrics back",
    "step": "the device computes steps",
    "saving": "checkpoints and the model",
    "evaluating": "config.train.eval_every",
    "profiler": "writing the trace",
    "other": "the rest of the loop",
}
_EMBED: dict[Row, str] = {
    "starting": "imports, weights, warm-up; up to the first batch",
    "input wait": "the host waits for images",
    "compile": "",
    "transfer": "batches to the device, dispatch, queues",
    "towers": "the host waits for the device: image tower",
    "router": "the host waits for the device: complexity",
    "saving": "shards of the corpus",
    "profiler": "writing the trace",
    "other": "the rest",
}
ROWS: dict[str, dict[Row, str]] = {
    "train": _TRAIN,
    "embed": _EMBED,
    "index": {**_EMBED, "saving": "commits to the store"},
}


@dataclass(frozen=True)
class Summary:
    """What a profile has measured; all times in seconds.

    Attributes:
        error: name of the exception that ended the run; empty if it finished.
        seconds: by row; their sum is the wall time.
        compile_s: by stage; programs_from_cache: those of `programs` that the compilation cache held.
        unit: of `images`, 'images' or 'pairs', of the steps that were completed, all processes together where they train.
        working_s: the time that the throughput counts.
        steps: of each step or batch; first_step: number of the first of them.
        trace: folder of the trace; empty without one. traced: its first and last step.
        file: of this summary; empty if it is not written.
    """

    command: Command
    error: str
    processes: int
    seconds: dict[Row, float]
    compile_s: dict[str, float]
    programs: int
    programs_from_cache: int
    unit: str
    images: int
    working_s: float
    steps: list[float]
    first_step: int
    trace: str
    traced: tuple[int, int] | None
    trace_error: str
    file: str

    @property
    def total_s(self) -> float:
        """Wall time."""
        return sum(self.seconds.values())

    @property
    def rate(self) -> float:
        """Images or pairs per second of `working_s`."""
        return self.images / self.working_s if self.working_s else 0.0

    @property
    def slowest(self) -> tuple[int, float]:
        """(number, seconds) of the slowest step; (0, 0.0) without steps."""
        if not self.steps:
            return 0, 0.0
        at = max(range(len(self.steps)), key=self.steps.__getitem__)
        return self.first_step + at, self.steps[at]

    def as_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        number, slowest = self.slowest
        return {
            **MADE_BY, "finished": not self.error, "error": self.error or None, "command": self.command,
            "processes": self.processes, "total_s": self.total_s, "seconds": self._rows(),
            "compile": {**self.compile_s, "programs": self.programs, "from_cache": self.programs_from_cache},
            "unit": self.unit, "count": self.images, "per_second": self.rate,
            "steps": len(self.steps), "median_step_s": statistics.median(self.steps) if self.steps else None,
            "slowest_step_s": slowest if self.steps else None, "slowest_step": number if self.steps else None,
            "trace": {"folder": self.trace or None, "steps": self.traced, "error": self.trace_error or None},
        }  # fmt: skip

    def text(self) -> str:
        """A table of at most 20 lines of 80 columns, paths aside."""
        ended = f", ended by {self.error}" if self.error else ""
        of = f" (process 0 of {self.processes})" if self.processes > 1 else ""
        lines = [f"Profile of icar {self.command}{of}: where {self.total_s:.1f} s of wall time went{ended}"]
        notes = {**ROWS[self.command], "compile": self._stages()}
        for row, seconds in self._rows().items():
            share = seconds / max(self.total_s, 1e-9)
            lines.append(f"  {row:<11}{seconds:>9.2f} s{share:>7.1%}   {notes.get(row, '')}".rstrip())
        cached = f", {self.programs_from_cache} of them read from the compilation cache" if self.programs_from_cache else ""
        lines.append(f"Compiled programs: {self.programs}{cached}")
        if self.steps:
            lines += self._speed()
        if not self.file:
            lines.append(f"No {self._step(1)} was run, so there is no trace, and no summary.json was written")
        if self.trace_error:
            lines.append(f"The trace failed: {self.trace_error.splitlines()[0]}")
        elif self.traced:
            first, last = self.traced
            lines += [
                f"Trace of {self._step(2)} {first} to {last}: {self.trace}",
                "  pip install xprof, then xprof --logdir with this folder; or load its",
                "  *.trace.json.gz at ui.perfetto.dev, which reads it in the browser",
            ]
        if self.file:
            lines.append(f"The same as JSON: {self.file}")
        return "\n".join(lines)

    def _rows(self) -> dict[Row, float]:
        """Seconds of the rows of this command, in order, and of others that were used."""
        known = {row: self.seconds.get(row, 0.0) for row in ROWS[self.command]}
        return known | {row: seconds for row, seconds in self.seconds.items() if row not in known and seconds}

    def _stages(self) -> str:
        trace, lower, xla = self.compile_s.values()
        return f"tracing {trace:.1f}, lowering {lower:.1f}, XLA {xla:.1f} s"

    def _step(self, count: int) -> str:
        one, several = ("step", "steps") if self.command == "train" else ("batch", "batches")
        return one if count == 1 else several

    def _speed(self) -> list[str]:
        number, slowest = self.slowest
        count, apart = len(self.steps), "saving, evaluating" if self.command == "train" else "saving"
        median = statistics.median(self.steps)
        return [
            f"{self.rate:,.1f} {self.unit}/s in {count:,} {self._step(count)}, without starting, compile, {apart}",
            f"One {self._step(1)}: median {_time(median)}, slowest {_time(slowest)} ({self._step(1)} {number})",
        ]


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def write(summary: Summary) -> None:
    """Writes the file of the summary; a failure is a warning on stderr, since the run itself has done its work."""
    try:
        files.write_text(summary.file, json.dumps(summary.as_dict(), indent=2) + "\n")
    except OSError as error:
        print(f"warning: {summary.file} cannot be written: {error}", file=sys.stderr)

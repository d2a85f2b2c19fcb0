"""What one accelerator does with this package: correctness of every operation, training and encoding speed, attention, a trace.

    python benchmarks/accelerator.py --json OUT.json [--minutes 6] [--size tiny] [--only PART] [--redo] [--list]

The parts run in the order of their importance, each as a row of cases. The result of every case is written to OUT.json at
once, so a run that ends early loses one case at most: the same command continues with what is missing. Each part has a share
of --minutes. No case starts once its part's share is used up or the remaining time is shorter than such a case has taken; what
was left out is recorded. Needs jax, flax, optax and numpy only, and the repository it lies in. docs/accelerator.md explains the
figures. On a CPU, and with --size tiny, shapes are tiny and the figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("numpy", "jax", "flax", "optax")
Case = tuple[str, Callable[[], dict[str, Any]]]  # name, function that measures it
Done = dict[str, dict[str, Any]]  # results by case
COLUMNS = ("part", "case", "result", "ms", "TFLOP/s", "of peak", "GiB", "compile s", "steps")


@dataclass(frozen=True)
class Part:
    """One part: its share of the time, and its cases, which may depend on the results so far (`done` grows meanwhile)."""

    name: str
    share: float
    about: str
    cases: Callable[[Any, Done], Iterator[Case]]


def load_parts() -> tuple[Part, ...]:
    """Imports what is measured. Raises SystemExit that names a missing package."""
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    # Read when JAX takes the device's memory; by default it would take three quarters.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    try:
        for name in NEEDED:
            __import__(name)
        import accelerator_ops
        import accelerator_towers
    except ModuleNotFoundError as error:
        raise SystemExit(f"accelerator.py needs the Python package {error.name!r}; it needs only {', '.join(NEEDED)}") from None
    return (
        Part("environment", 0.03, "device, memory, versions, speed of one large matrix product", accelerator_ops.environment),
        Part("kernels", 0.20, "every operation, value and gradient, against float32 on the CPU", accelerator_ops.kernels),
        Part("training", 0.37, "training step, two exits, bf16: batch sizes, attention, remat", accelerator_towers.training),
        Part("encoding", 0.20, "encoding at each exit, and routed", accelerator_towers.encoding),
        Part("attention", 0.12, "attention alone: cuDNN against XLA at several lengths", accelerator_ops.attention_speed),
        Part("trace", 0.08, "the ten longest operations of one training step", accelerator_towers.trace),
    )


# --- the record --------------------------------------------------------------------------------------------------------------


class Record:
    """The results in a JSON file, which is replaced as a whole after every change."""

    def __init__(self, path: Path, about: dict[str, Any]):
        """Continues the file if there is one. Raises SystemExit if it is of another device, size or version."""
        self.path = path
        self.values: dict[str, Any] = {"benchmark": "accelerator", **about, "parts": {}}
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        apart = [f"{key} {found.get(key)!r}, now {value!r}" for key, value in about.items() if found.get(key) != value]
        if apart:
            raise SystemExit(f"{path} is of another run: {'; '.join(apart)}. Choose another file.")
        self.values = found

    def done(self, part: str) -> Done:
        """Results of a part by case; changes are visible after `write`."""
        return self.values["parts"].setdefault(part, {"left_out": [], "cases": {}})["cases"]

    def is_finished(self, part: str, case: str) -> bool:
        """Whether a case needs no further run: it has a result, or it ended the process twice."""
        found = self.done(part).get(case, {})
        return bool(found) and found.get("started", 2) >= 2

    def start(self, part: str, case: str) -> None:
        """Notes that a case starts, so that the next run knows if it ended the process."""
        started = self.done(part).get(case, {}).get("started", 0) + 1
        self.done(part)[case] = {"started": started, "error": "this case ended the process"}
        self.write()

    def write(self) -> None:
        """Replaces the file."""
        text = json.dumps(self.values, indent=2, allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(text, encoding="utf-8")
        os.replace(part, self.path)


# --- running -----------------------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """The time of this run: seconds in all, and when they began."""

    seconds: float
    begun: float

    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.begun)


def run_parts(parts: tuple[Part, ...], size: Any, record: Record, clock: Clock) -> None:
    """Runs what is missing of `parts`; a part's time begins when it starts, and time that it does not use goes to the next."""
    used, shares = 0.0, sum(part.share for part in parts)
    for part in parts:
        used += part.share
        end = clock.seconds * (1 - used / shares)  # seconds that must be left for the parts after this one
        done, left_out, longest = record.done(part.name), [], 0.0
        for name, measure in part.cases(size, done):
            if record.is_finished(part.name, name):
                continue
            if clock.left() <= max(end, longest):
                left_out.append(name)
                continue
            record.start(part.name, name)
            start = time.monotonic()
            done[name] = measured(measure)
            longest = max(longest, time.monotonic() - start)
            done[name]["seconds"] = round(time.monotonic() - start, 3)
            record.write()
            print(f"{part.name:<12}{name:<42}{summary(part.name, done[name])}", flush=True)
        record.values["parts"][part.name]["left_out"] = left_out
        record.write()
        if left_out:
            print(f"{part.name:<12}left out for lack of time: {len(left_out)} cases, from {left_out[0]!r}", flush=True)


def measured(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of a case; an error is a result too, and so is a figure that is not finite."""
    try:
        found = measure()
        json.dumps(found, allow_nan=False)
        return found
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        return {"error": f"{type(error).__name__}: {first}", "out_of_memory": "RESOURCE_EXHAUSTED" in str(error)}
    finally:
        gc.collect()  # what an error's frames held would still lie on the device


# --- the table ---------------------------------------------------------------------------------------------------------------


def row_of(part: str, name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Returns the cells of one result, in the order of COLUMNS."""
    found = {**found, "gib": (found.get("peak_bytes") or found.get("needed_bytes") or 0) / 2**30 or None}
    found["ms"] = 1e3 * found["median_s"] if "median_s" in found else None
    number = lambda key, form: format(found[key], form) if found.get(key) is not None else ""
    return (
        part, name, summary(part, found), number("ms", ".3f"), number("tflops", ".1f"), number("of_peak", ".1%"),
        number("gib", ".2f"), number("compile_s", ".1f"), number("steps", "d"),
    )  # fmt: skip


def summary(part: str, found: dict[str, Any]) -> str:
    """Returns the main figure of a result as text."""
    if found.get("out_of_memory"):
        return "out of memory"
    for key in ("error", "skipped"):
        if key in found:
            return f"{key}: {found[key]}"[:100]
    if "passed" in found:
        verdict, error = "ok" if found["passed"] else "FAILED", found["largest_error"]
        return f"{verdict}, error {'not finite' if error is None else f'{error:.1e}'}, tolerance {found['tolerance']:.0e}"
    for key, unit in (("pairs_per_s", "pairs/s"), ("images_per_s", "images/s")):
        if key in found:
            ideal = f", {found['of_parts']:.1%} of its parts" if "of_parts" in found else ""
            return f"{found[key]:,.1f} {unit}{ideal}"
    if "longest" in found:
        return "; ".join(f"{op['name'][:40]} {op['share']:.0%}" for op in found["longest"][:3])
    return found.get("device_kind", "")


def format_table(record: Record) -> str:
    """Returns one table of all results, and what is missing."""
    rows = [COLUMNS]
    for part, values in record.values["parts"].items():
        rows += [row_of(part, name, found) for name, found in values["cases"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))) for row in rows
    ]
    traced = record.values["parts"].get("trace", {}).get("cases", {})
    for name, found in traced.items():
        ops = found.get("longest", ())
        lines += [f"longest operations of {name}:"] if ops else []
        lines += [f"  {op['ms']:9.3f} ms {op['share']:6.1%} {op['count']:5d} x {op['name'][:90]}" for op in ops]
    for part, values in record.values["parts"].items():
        if values["left_out"]:
            lines.append(f"left out of {part}: {', '.join(values['left_out'])}")
    return "\n".join(line.rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file of the results, continued if it exists")
    parser.add_argument("--minutes", type=float, default=6.0, help="time of this run (default: 6)")
    parser.add_argument("--size", choices=("full", "tiny"), help="default: tiny on CPU, else full")
    parser.add_argument("--only", action="append", metavar="PART", help="run only this part; may be repeated")
    parser.add_argument("--redo", action="store_true", help="measure again what is in the file already")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    args = parser.parse_args(arguments)
    begun, parts = time.monotonic(), load_parts()
    if args.list:
        print("\n".join(f"{part.name:<12}{part.share:4.0%}  {part.about}" for part in parts))
        return
    names = [part.name for part in parts]
    if wrong := [name for name in args.only or () if name not in names]:
        parser.error(f"--only {wrong[0]} must be one of {', '.join(names)}")
    if args.json is None or not args.minutes > 0:
        parser.error("--json is needed and --minutes must be positive")
    import accelerator_sizes

    size = accelerator_sizes.size_of(args.size)
    record = Record(args.json, accelerator_sizes.about(size))
    chosen = tuple(part for part in parts if not args.only or part.name in args.only)
    for part in chosen if args.redo else ():
        record.values["parts"].pop(part.name, None)
    run_parts(chosen, size, record, Clock(60 * args.minutes, begun))
    print("\n" + format_table(record))


if __name__ == "__main__":
    main()

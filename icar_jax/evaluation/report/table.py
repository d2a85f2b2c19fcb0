"""Table of an evaluation for the terminal, and metrics.json; `records.retrieval` documents the record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT
from icar_jax.evaluation.records.plain import plain
from icar_jax.evaluation.records.retrieval import RetrievalEvaluation, Run
from icar_jax.evaluation.report.verdicts import verdicts
from icar_jax.workdir import write_text

BUDGET = "budget_"  # prefix of run names; followed by the share of full depth's cost
_WIDE = 124  # terminal columns needed for one-line rows


def run_order(runs: Mapping[str, Run]) -> list[str]:
    """Returns run names in display order: full, exits by depth, static, routed, budgets, random, oracles, others."""
    exits = sorted((name for name in runs if name.startswith("exit_")), key=exit_depth)
    budgets = sorted((name for name in runs if name.startswith(BUDGET)), key=lambda name: float(name.removeprefix(BUDGET)))
    known = ["full", *exits, "static", "routed", "routed_affine", *budgets, "random", "oracle", "lossless"]
    return [name for name in known if name in runs] + sorted(name for name in runs if name not in known)


def exit_depth(name: str) -> int:
    """Returns the executed blocks of a run name: 'exit_6' -> 6. Raises ValueError for other names."""
    try:
        return int(name.removeprefix("exit_"))
    except ValueError:
        raise ValueError(f"run {name!r} must be named exit_<blocks>, such as exit_6") from None


def results_table(record: RetrievalEvaluation, *, compact: bool = False) -> Table:
    """Returns a table with one row per run; `compact` uses rows of several lines that fit 80 columns.

    Raises ValueError if there is no run 'full', with which all others are compared.
    """
    runs, gallery = record.runs, record.gallery
    if "full" not in runs:
        raise ValueError(f"the runs must hold 'full', with which others are compared; found {sorted(runs)}")
    ks = "/".join(str(k) for k in RECALL_AT)
    table = Table(
        title=f"Retrieval in a gallery of {gallery.images:,} images and {gallery.captions:,} captions",
        box=box.SIMPLE_HEAD if compact else box.ROUNDED,
        padding=(0, 0) if compact else (0, 1),
        show_edge=not compact,
    )
    table.add_column("run", no_wrap=True)
    for header in (f"text to image\nR@{ks} %", f"image to text\nR@{ks} %"):
        table.add_column(header, justify="right", no_wrap=True)
    for header in ("GFLOPs\n/image", "% of\nfull", "images\n/s"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("blocks:\nshare", no_wrap=True)
    table.add_column("R@5 kept, %\n[95% int.]", justify="right", no_wrap=True)
    full_flops = runs["full"].flops_per_image
    for name in run_order(runs):
        run = runs[name]
        speed = run.images_per_s
        share, kept = format_share(run.share), format_interval(run.retention)
        table.add_row(
            name,
            *("/".join(f"{run.metrics(direction)[f'r{k}']:.1f}" for k in RECALL_AT) for direction in DIRECTIONS),
            f"{run.flops_per_image / 1e9:.3g}",
            f"{100 * run.flops_per_image / full_flops:.0f}",
            "-" if speed is None else f"{speed:.3g}" if speed < 100 else f"{speed:.0f}",
            share.replace("  ", "\n") if compact else share,
            kept.replace(" [", "\n[") if compact else kept,
        )
    return table


def print_results(record: RetrievalEvaluation, console: Console | None = None) -> None:
    """Prints the table, the verdicts and the notes; rows are wide if the terminal has room or the output is a file."""
    console = console or wide_console(_WIDE)
    console.print(results_table(record, compact=console.width < _WIDE))
    print_sentences([*verdicts(record), *record.notes], console)


def wide_console(width: int) -> Console:
    """Returns a console with the terminal's width, or `width` columns for files, where rich would assume 80."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_sentences(sentences: Iterable[str], console: Console) -> None:
    """Prints plain sentences below a table."""
    for sentence in sentences:
        # markup=False: brackets around intervals are not style tags. soft_wrap: one line per sentence in logs.
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def format_share(share: Mapping[int, float]) -> str:
    """Formats shares by exit: {12: .48, 6: .52} -> '6: 52%  12: 48%'."""
    return "  ".join(f"{exit}: {100 * share[exit]:.0f}%" for exit in sorted(share))


def format_interval(interval: Interval | None) -> str:
    if interval is None:
        return "undefined"
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def write_metrics(record: Any, path: str | os.PathLike) -> None:
    """Writes a record (a dataclass or a dict, see `plain`) as JSON atomically: a reader sees the old file or the new one.

    Raises ValueError, and leaves the old file unchanged, for values that JSON does not hold, such as NaN.
    """
    write_text(path, json.dumps(plain(record), indent=2, allow_nan=False) + "\n")

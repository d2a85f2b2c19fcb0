"""Format of metrics.json, and its table for the terminal.

metrics['runs'] maps run names to dicts. 'full' and 'exit_<blocks>' use one exit for all images; 'routed' the bundle's
thresholds; 'budget_<share>' thresholds set on calibration images for that share of full depth's counted cost; 'random' a random
assignment at the shares of 'routed'; 'oracle' the best assignment at these shares (upper bound); 'lossless' each image's
cheapest exit that worsens none of its ranks (lossless oracle); 'static' is a shallower baseline model; 'routed_affine' is
'routed' ranked with per-exit calibrated scores. Each dict holds
  text_to_image, image_to_text: {'r1', 'r5', 'r10'} in percent, 'median_rank' and 'mean_rank'; with labels also 'map10',
    'map50', 'map100' (official denominator) and 'map10_standard', ... in percent;
  flops_per_image: 2 x MACs, including the complexity model if the run uses it;
  images_per_s: measured; None if not measured;
  share: {exit -> fraction of the images};
  retention: {'value', 'low', 'high'}, R@5 (mean of both directions) in percent of full depth; None if undefined;
  intervals: 'text_to_image' | 'image_to_text' | 'mean' -> each of these metrics -> 'value', 'difference' (to full depth) and
    'retention' (percent of full depth), each {'value', 'low', 'high'} or None; see metrics.comparison.Comparison;
  for budgets also 'thresholds', and 'found': the method, the calibration images and what was reached on them.
metrics['timing'] joins timing.time_breakdown and timing.warm_up; metrics['flops'] holds 'exits' {exit -> 'counted',
'compiler'}, 'router' and 'text'; metrics['frontier'] is a list of frontier.Point with 'kept', R@5 in percent of full depth: a
sweep of thresholds on the evaluated images, from which nothing was chosen.
metrics['gallery'] holds the counts 'images' and 'captions' (with distractors), 'queries' with the counts of queries, and the
names 'source' and 'distractors' (None without); metrics['comparisons']['routed_minus_random'] and
['routed_affine_minus_routed'] hold {'value', 'low', 'high', 'includes_zero'} in points; metrics['score_calibration'] is
ScoreCalibration.as_dict with the 'bias' of the gallery; metrics['notes'] is a list of sentences.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT
from icar_jax.evaluation.report.verdicts import verdicts
from icar_jax.workdir import write_text

BUDGET = "budget_"  # prefix of run names; followed by the share of full depth's cost
_WIDE = 124  # terminal columns needed for one-line rows


def run_order(runs: Mapping[str, Any]) -> list[str]:
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


def results_table(metrics: Mapping[str, Any], *, compact: bool = False) -> Table:
    """Returns a table with one row per run; `compact` uses rows of several lines that fit 80 columns.

    Raises ValueError if metrics['runs'] lacks 'full', the run all others are compared with.
    """
    runs, gallery = metrics["runs"], metrics["gallery"]
    if "full" not in runs:
        raise ValueError(f"metrics['runs'] must hold 'full', the run others are compared with; found {sorted(runs)}")
    ks = "/".join(str(k) for k in RECALL_AT)
    table = Table(
        title=f"Retrieval in a gallery of {gallery['images']:,} images and {gallery['captions']:,} captions",
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
    full_flops = runs["full"]["flops_per_image"]
    for name in run_order(runs):
        run = runs[name]
        speed = run["images_per_s"]
        share, kept = format_share(run["share"]), format_interval(run["retention"])
        table.add_row(
            name,
            *("/".join(f"{run[direction][f'r{k}']:.1f}" for k in RECALL_AT) for direction in DIRECTIONS),
            f"{run['flops_per_image'] / 1e9:.3g}",
            f"{100 * run['flops_per_image'] / full_flops:.0f}",
            "-" if speed is None else f"{speed:.3g}" if speed < 100 else f"{speed:.0f}",
            share.replace("  ", "\n") if compact else share,
            kept.replace(" [", "\n[") if compact else kept,
        )
    return table


def print_results(metrics: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the table, the verdicts and the notes; rows are wide if the terminal has room or the output is a file."""
    console = console or wide_console(_WIDE)
    console.print(results_table(metrics, compact=console.width < _WIDE))
    print_sentences([*verdicts(metrics), *metrics.get("notes", [])], console)


def wide_console(width: int) -> Console:
    """Returns a console with the terminal's width, or `width` columns for files, where rich would assume 80."""
    console = Console()
    return console if console.is_terminal else Console(width=width)


def print_sentences(sentences: Iterable[str], console: Console) -> None:
    """Prints plain sentences below a table."""
    for sentence in sentences:
        # markup=False: brackets around intervals are not style tags. soft_wrap: one line per sentence in logs.
        console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def format_share(share: Mapping[str, float]) -> str:
    """Formats shares by exit: {'12': .48, '6': .52} -> '6: 52%  12: 48%'."""
    return "  ".join(f"{name}: {100 * share[name]:.0f}%" for name in sorted(share, key=int))


def format_interval(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "undefined"
    return f"{interval['value']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]"


def write_metrics(metrics: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes metrics as JSON atomically: a reader sees the old file or the complete new one.

    Numpy scalars and arrays become numbers and lists; None becomes null. Raises ValueError, and leaves the old file
    unchanged, for NaN or inf and for keys that are not strings; the message gives the path of keys.
    """
    text = json.dumps(_plain(metrics, ()), indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def _plain(value: Any, where: tuple[str, ...]) -> Any:
    place = "/".join(where) or "the top level"
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"metrics: key {key!r} at {place} must be a string, since JSON has no other keys")
        return {key: _plain(item, (*where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*where, str(i))) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metrics: {place} is {value}, expected a finite number (or None for 'not measured')")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"metrics: {place} is a {type(value).__name__}, expected a number, text, list, dict or None")

"""The record of one evaluation: shown as a table, judged in plain sentences, written as metrics.json.

metrics['runs'] maps 'full', 'exit_<blocks>', 'routed' and 'random' to a dict of
  text_to_image, image_to_text: {'r1', 'r5', 'r10'} in percent, 'median_rank' and 'mean_rank'; where there are labels also
    'map10', 'map50', 'map100' (official denominator) and 'map10_standard', ... in percent;
  flops_per_image: 2 x MACs, the complexity model included where the run uses it;
  images_per_s: measured, None where it was not;
  share: {exit -> fraction of the images};
  retention: {'value', 'low', 'high'}, R@5 (mean of both directions) in percent of full depth; None where undefined;
  intervals: 'text_to_image' | 'image_to_text' | 'mean' -> each of these metrics -> 'value', 'difference' (to full depth) and
    'retention' (percent of full depth), each {'value', 'low', 'high'} or None, as of bootstrap_metrics.Comparison.
metrics['gallery'] holds the counts 'images' and 'captions', distractors included, 'queries' with the counts of those asked
for, and the names 'source' and 'distractors' (None without); metrics['comparisons']['routed_minus_random'] holds
{'value', 'low', 'high', 'includes_zero'} in points; metrics['notes'] is a list of sentences.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.metrics import DIRECTIONS, RECALL_AT, chance_recall
from icar_jax.workdir import write_text

_WIDE = 124  # columns the one-line rows need; rich assumes 80 where the output is a file


def run_order(runs: Mapping[str, Any]) -> list[str]:
    """Names of the runs as they are shown: full, static exits by depth, routed, random, then any other."""
    exits = sorted((name for name in runs if name.startswith("exit_")), key=exit_depth)
    known = ["full", *exits, "routed", "random"]
    return [name for name in known if name in runs] + sorted(name for name in runs if name not in known)


def exit_depth(name: str) -> int:
    """'exit_6' -> 6 (blocks run)."""
    try:
        return int(name.removeprefix("exit_"))
    except ValueError:
        raise ValueError(f"run {name!r} must be named exit_<blocks>, such as exit_6") from None


def results_table(metrics: Mapping[str, Any], *, compact: bool = False) -> Table:
    """One row a run; with `compact`, rows of several lines that fit 80 columns.

    Raises ValueError where metrics['runs'] lacks 'full', the run all others are compared with.
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
    """Prints the table, the verdicts and the notes; wide rows where the terminal has room or the output is a file."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDE)
    console.print(results_table(metrics, compact=console.width < _WIDE))
    for line in [*verdicts(metrics), *metrics.get("notes", [])]:
        # markup=False: an interval in brackets is not a style tag. soft_wrap: a sentence stays one line in a log.
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def verdicts(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers show and what they do not, as plain sentences; only about the runs that were made."""
    runs, comparisons = metrics["runs"], metrics.get("comparisons", {})
    lines = [_against_chance(metrics)]
    if "routed" in runs:
        lines.append(_retention(runs["routed"], runs["full"]))
        if "routed_minus_random" in comparisons:
            lines.append(_against_random(comparisons["routed_minus_random"]))
        lines += _time(runs["routed"], runs["full"])
        lines += _one_exit(runs["routed"])
        lines += _static_rivals(runs)
    return lines


def format_share(share: Mapping[str, float]) -> str:
    """{'12': .48, '6': .52} -> '6: 52%  12: 48%'."""
    return "  ".join(f"{name}: {100 * share[name]:.0f}%" for name in sorted(share, key=int))


def format_interval(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return "undefined"
    return f"{interval['value']:.1f} [{interval['low']:.1f}, {interval['high']:.1f}]"


def write_metrics(metrics: Mapping[str, Any], path: str | os.PathLike) -> None:
    """Writes metrics as JSON in one step: a reader sees the old file or the whole new one.

    Numpy scalars and arrays become numbers and lists; None becomes null. Raises ValueError, and leaves the file as
    it was, for NaN or inf and for keys that are not strings, naming the place as a path of keys.
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
                raise ValueError(f"metrics: key {key!r} at {place} must be a string, as JSON has no other keys")
        return {key: _plain(item, (*where, key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*where, str(i))) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metrics: {place} is {value}, expected a finite number (or None for 'not measured')")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"metrics: {place} is a {type(value).__name__}, expected a number, text, list, dict or None")


def _mean_r5(run: Mapping[str, Any]) -> float:
    return sum(run[direction]["r5"] for direction in DIRECTIONS) / len(DIRECTIONS)


def _against_chance(metrics: Mapping[str, Any]) -> str:
    full, gallery = metrics["runs"]["full"], metrics["gallery"]
    parts, least = [], math.inf
    asked = gallery.get("queries", gallery)
    own = asked["captions"] / asked["images"]
    for direction in DIRECTIONS:
        shown = []
        for k in (5, 10):
            chance = chance_recall(gallery["images"], gallery["captions"], k, own)[direction]
            times = full[direction][f"r{k}"] / chance
            least = min(least, times)
            shown.append(f"R@{k} {full[direction][f'r{k}']:.1f}% ({times:.1f} times chance, {chance:.2g}%)")
        parts.append(f"{direction.replace('_', ' ')} {', '.join(shown)}")
    line = f"full depth: {'; '.join(parts)}"
    if least < 2:
        line += ": less than twice chance, so the comparisons below say little"
    return line


def _retention(routed: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    kept = routed["retention"]
    if kept is None:
        return "what routing keeps is undefined: full depth has too few hits at R@5"
    flops = 100 * routed["flops_per_image"] / full["flops_per_image"]
    line = (
        f"routed keeps {kept['value']:.1f}% of full-depth R@5 (mean of both directions) at {flops:.0f}% of its FLOPs, "
        f"router included; 95% interval [{kept['low']:.1f}, {kept['high']:.1f}]"
    )
    if kept["low"] > 100:
        return f"{line}: above 100, so routing retrieves better than full depth here"
    if kept["high"] < 100:
        return f"{line}: below 100, so routing does lose retrieval quality"
    return f"{line}: includes 100, so neither a loss nor a gain against full depth is shown in this gallery"


def _against_random(delta: Mapping[str, Any]) -> str:
    line = (
        f"routed - random = {delta['value']:+.1f} points R@5, 95% interval [{delta['low']:.1f}, {delta['high']:.1f}]"
    )
    if delta["includes_zero"]:
        return f"{line}: includes zero, so routing is not shown to beat random at this share"
    if delta["value"] > 0:
        return f"{line}: above zero, so routing beats random at this share"
    return f"{line}: below zero, so routing is worse than random at this share"


def _time(routed: Mapping[str, Any], full: Mapping[str, Any]) -> list[str]:
    lines = []
    if routed["images_per_s"] is not None and full["images_per_s"] is not None:
        ratio = routed["images_per_s"] / full["images_per_s"]
        word = "loses" if ratio < 1 else "saves"
        lines.append(
            f"routing {word} time: {routed['images_per_s']:.1f} images/s, router included, against "
            f"{full['images_per_s']:.1f} at full depth ({ratio:.2f} times the speed)"
        )
    if routed["flops_per_image"] >= full["flops_per_image"]:
        lines.append("routing saves no FLOPs: with the router counted it costs at least as much as full depth")
    return lines


def _one_exit(routed: Mapping[str, Any]) -> list[str]:
    name, share = max(routed["share"].items(), key=lambda item: item[1])
    if share < 0.995:
        return []
    return [f"{100 * share:.1f}% of the images take exit {name}: this is a static exit with the router's cost on top"]


def _static_rivals(runs: Mapping[str, Any]) -> list[str]:
    """Static exits that are at least as good as the routed run and no dearer: routing is then pointless."""
    routed = runs["routed"]
    rivals = [
        name
        for name in run_order(runs)
        if name.startswith("exit_")
        and runs[name]["flops_per_image"] <= routed["flops_per_image"]
        and _mean_r5(runs[name]) >= _mean_r5(routed)
    ]
    return [
        f"{name} for every image is at least as good as routing at no more FLOPs (mean R@5 "
        f"{_mean_r5(runs[name]):.1f}% against {_mean_r5(routed):.1f}%)"
        for name in rivals
    ]

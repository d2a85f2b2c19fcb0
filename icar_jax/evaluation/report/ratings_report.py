"""Table and figure of a cross-validation on human ratings; `records.cross_validation` documents the record."""

from __future__ import annotations

import os

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.metrics.ratings import Estimate
from icar_jax.evaluation.metrics.within import MEAN
from icar_jax.evaluation.records.cross_validation import CrossValidation
from icar_jax.evaluation.report.figures import new_figure, save
from icar_jax.evaluation.report.table import print_sentences, wide_console

PUBLISHED = "published, best of five"
_WIDE = 132
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's palette


def results_table(record: CrossValidation) -> Table:
    """Returns a table with one row per method and one column of PCC per category, after their mean with its interval."""
    title = f"PCC with the ratings of {record.images:,} images of {record.source}, within categories, {record.folds} folds"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    table.add_column("method", no_wrap=True)
    for header in ("mean PCC", *(name.replace("_", "\n") for name in record.categories), "mean\nSRCC", "% of\ntower", "ms"):
        table.add_column(header, justify="right", no_wrap=True)
    if record.published:
        values = list(record.published.values())
        cells = [f"{np.mean(values):.2f}", *(f"{record.published[name]:.2f}" for name in record.categories)]
        table.add_row(PUBLISHED, *cells, "-", "-", "-", end_section=True)
    for name, result in record.methods.items():
        share = "-" if result.cost.share is None else f"{100 * result.cost.share:.3g}"
        cells = [f"{result.pcc[category].value:.2f}" for category in record.categories]
        table.add_row(
            name.replace("_", " "), _shown(result.pcc[MEAN]), *cells, f"{result.srcc[MEAN].value:.3f}", share,
            f"{result.cost.ms:.3g}",
        )  # fmt: skip
    return table


def print_results(record: CrossValidation, console: Console | None = None) -> None:
    """Prints the table, what it shows, and the notes."""
    console = console or wide_console(_WIDE)
    console.print(results_table(record))
    print_sentences([*verdicts(record), *record.notes], console)


def verdicts(record: CrossValidation) -> list[str]:
    """Returns plain sentences about what the numbers show."""
    lines = []
    for name, margin in record.margins.items():
        line = f"{name.replace('_', ' ')}: mean PCC over {record.best_measure.replace('_', ' ')}, the best of the measures, "
        line += f"{margin.value:+.3f}"
        if margin.low is not None:
            line += f", paired 95% interval [{margin.low:.3f}, {margin.high:.3f}]"
            line += ": not shown to be different" if margin.low <= 0 <= margin.high else ""
        lines.append(line)
    if record.tower is not None:
        shared = [result.cost.added_flops for result in record.methods.values() if result.cost.added_flops is not None]
        added = 100 * max(shared) / float(record.tower["flops"])
        lines.append(
            f"a head that shares the blocks of the tower it routes adds {added:.2g}% of the tower's FLOPs; alone it costs what "
            f"the table says. The whole tower takes {float(record.tower['ms']):.3g} ms"
        )
    return [*lines, f"milliseconds per image, preprocessed, on {record.processor}"]


def figure(record: CrossValidation, path: str | os.PathLike) -> None:
    """Plots the PCC of the learned methods, the best measure and the published ones by category; writes a PNG to `path`."""
    plot, axes = new_figure((9.5, 4.6))
    groups = [*record.categories, MEAN]
    shown = [name for name, result in record.methods.items() if result.penalties or name == record.best_measure]
    for i, name in enumerate(shown):
        found = [record.methods[name].pcc[group] for group in groups]
        values = np.array([p.value for p in found])
        lows = np.array([p.value if p.low is None else min(p.value, p.low) for p in found])
        highs = np.array([p.value if p.high is None else max(p.value, p.high) for p in found])
        at = np.arange(len(groups)) + (i - (len(shown) - 1) / 2) * 0.8 / max(len(shown), 1)
        colour = _COLOURS[i % len(_COLOURS)]
        bars = [values - lows, highs - values]
        axes.errorbar(at, values, bars, fmt="o", color=colour, markersize=4, capsize=2, label=name.replace("_", " "))
    if record.published:
        values = [*record.published.values(), float(np.mean(list(record.published.values())))]
        at = np.arange(len(groups))
        axes.hlines(values, at - 0.45, at + 0.45, color="0.5", linestyle="--", linewidth=1, label=PUBLISHED)
    sizes = {**record.categories, MEAN: record.images}
    axes.set_xticks(range(len(groups)), [f"{name.replace('_', ' ')}\n{sizes[name]} images" for name in groups], fontsize=8)
    axes.axvline(len(groups) - 1.5, color="0.8", linewidth=0.8)
    axes.set_ylabel("PCC with ratings, 95% interval")
    axes.set_title(f"Complexity of {record.images:,} images of {record.source}, {record.folds} folds", fontsize=10.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=4, frameon=False, fontsize=8)
    save(plot, path)


def _shown(found: Estimate) -> str:
    return f"{found.value:.3f}" if found.low is None else f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"

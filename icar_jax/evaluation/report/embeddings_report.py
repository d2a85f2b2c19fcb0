"""Table and figure of an evaluation of saved embeddings."""

from __future__ import annotations

import os

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.metrics.comparison import BOTH
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT, Ranks
from icar_jax.evaluation.records.embeddings import EmbeddingsEvaluation
from icar_jax.evaluation.report.figures import new_figure, save
from icar_jax.evaluation.report.table import format_interval, print_sentences, wide_console

_WIDE = 110
_NAMES = {"median_rank": "median rank", "mean_rank": "mean rank"} | {f"r{k}": f"R@{k}, %" for k in RECALL_AT}
_STYLES = {"text_to_image": ("#0072B2", "o"), "image_to_text": ("#D55E00", "s")}


def embeddings_table(record: EmbeddingsEvaluation) -> Table:
    """One row per metric; columns for both directions and their mean, each with its 95% interval."""
    gallery = record.gallery
    table = Table(
        title=f"Retrieval in a gallery of {gallery.images:,} images and {gallery.captions:,} captions", box=box.ROUNDED
    )
    table.add_column("metric", no_wrap=True)
    for name in (*DIRECTIONS, BOTH):
        table.add_column(f"{name.replace('_', ' ')}\n[95% interval]", justify="right")
    for metric in record.text_to_image:
        name = _NAMES.get(metric) or f"mAP@{metric.removeprefix('map').replace('_', ' ')}, %"
        table.add_row(name, *(format_interval(record.intervals[d].get(metric)) for d in (*DIRECTIONS, BOTH)))
    return table


def print_embeddings(record: EmbeddingsEvaluation, console: Console | None = None) -> None:
    """Prints the table and the notes."""
    console = console or wide_console(_WIDE)
    console.print(embeddings_table(record))
    print_sentences(record.notes, console)


def recall_curves(record: EmbeddingsEvaluation, ranks: Ranks, path: str | os.PathLike) -> None:
    """Plots recall at every k of both directions, with the intervals at 1, 5 and 10 and chance at these k; writes a PNG."""
    figure, axes = new_figure()
    for direction in DIRECTIONS:
        colour, marker = _STYLES[direction]
        found = np.sort(getattr(ranks, direction))
        shares = 100.0 * np.arange(1, len(found) + 1) / len(found)
        last = np.append(found[1:] != found[:-1], True)  # of equal ranks, all queries count
        axes.step(found[last], shares[last], where="post", color=colour, label=direction.replace("_", " "))
        for k in RECALL_AT:
            at = record.intervals[direction][f"r{k}"]
            if at is not None:
                bars = [[max(at.value - at.low, 0.0)], [max(at.high - at.value, 0.0)]]
                axes.errorbar(k, at.value, yerr=bars, color=colour, marker=marker, capsize=3, linestyle="none")
        chance = [record.chance[direction][f"r{k}"] for k in RECALL_AT]
        axes.plot(RECALL_AT, chance, color=colour, linestyle=":", label=f"chance, {direction.replace('_', ' ')}")
    axes.set_xscale("log")
    axes.set_xlim(0.9, max(2.0, max(record.gallery.images, record.gallery.captions)))
    axes.set_ylim(0, 102)
    axes.set_xlabel("k")
    axes.set_ylabel("recall at k, %\n(95% intervals at 1, 5 and 10)")
    axes.set_title(f"Recall at k: {record.gallery.images:,} images, {record.gallery.captions:,} captions", fontsize=10.5)
    axes.legend(frameon=False, fontsize=8.5)
    save(figure, path)

"""Figures of the report, drawn for light and dark themes and legible on a phone."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from icar_jax import workdir
from icar_jax.evaluation.metrics.retrieval import Ranks
from icar_jax.evaluation.records.retrieval import RetrievalEvaluation, Run
from icar_jax.evaluation.report.figures import exit_label, place_labels
from icar_jax.evaluation.report.table import run_order
from icar_jax.evaluation.routing.budget_search import SearchedSettings
from icar_jax.evaluation.routing.frontier import frontier

SIZE_INCHES = (5.4, 4.0)
DECILES = 10


@dataclass(frozen=True)
class Theme:
    """Colours of a theme (after Okabe and Ito); markers differ too, so nothing depends on colour alone."""

    paper: str
    ink: str
    faint: str
    grid: str
    full: str
    exit: str
    routed: str
    random: str
    oracle: str
    static: str
    ramp: tuple[str, str]  # shallow to deep exits

    def of(self, name: str) -> str:
        return getattr(self, _kind(name))

    def depths(self, n: int) -> list[Any]:
        """Returns n colours from the shallowest exit to full depth."""
        blend = matplotlib.colors.LinearSegmentedColormap.from_list("depth", self.ramp)
        return [blend(i / max(1, n - 1)) for i in range(n)]


LIGHT = Theme(
    "#ffffff", "#1c2330", "#5c6675", "#e3e7ee", "#1c2330", "#0b62a4", "#c2410c", "#0f7b5f", "#8a3b8f", "#7a6200",
    ("#86bce6", "#083c68"),
)  # fmt: skip
DARK = Theme(
    "#18202b", "#e8ebf1", "#a3adbd", "#2b3444", "#e8ebf1", "#6cb6f0", "#ff9a62", "#4fd1a8", "#dc9ae0", "#e3c64d",
    ("#3a76ad", "#b5dcff"),
)  # fmt: skip
THEMES = {"light": LIGHT, "dark": DARK}
_MARKERS = {"full": "o", "exit": "s", "routed": "D", "random": "^", "oracle": "*", "static": "P"}

# Draws into axes; a returned function is called after the layout is fixed, to place labels in pixel coordinates.
Drawing = Callable[[Axes, Theme], Callable[[], None] | None]


def render(draw: Drawing, theme: Theme, kind: str) -> bytes:
    """Renders a figure as 'svg' (transparent) or 'png' (white background)."""
    with matplotlib.rc_context({"svg.hashsalt": "icar", "font.size": 10.5}):
        figure = Figure(figsize=SIZE_INCHES, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(theme.faint)
        axes.tick_params(colors=theme.faint)
        axes.grid(color=theme.grid, linewidth=0.8)
        axes.set_axisbelow(True)
        afterwards = draw(axes, theme)
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(theme.ink)
        if afterwards is not None:
            figure.canvas.draw()
            afterwards()
        stream = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(stream, format=kind, transparent=kind == "svg", metadata=metadata)
    return stream.getvalue()


def kept_against_cost(record: RetrievalEvaluation, cost: str) -> Drawing:
    """Plots R@5 against 'measured' or 'counted' cost, both in percent of full depth, over the threshold sweep."""

    def draw(axes: Axes, theme: Theme) -> Callable[[], None]:
        runs = record.runs
        swept = [p for p in record.frontier or () if p.kept is not None]
        if swept:
            at = [(100 * p.cost[cost], p.kept) for p in swept]
            axes.plot(*zip(*at), ".", color=theme.faint, alpha=0.5, markersize=4, zorder=1, label="other thresholds")
            best = [(100 * p.cost[cost], p.kept) for p in frontier(swept, cost)]
            axes.plot(*zip(*best), color=theme.routed, alpha=0.7, linewidth=1.4, zorder=1, label="Pareto frontier")
        axes.axhline(100, color=theme.faint, linewidth=0.8, linestyle=":", zorder=0)
        points = {}
        for name in run_order(runs):
            x, kept = share_of_full(runs, name, cost), runs[name].retention
            if x is None or kept is None:
                continue
            points[name] = 100 * x, kept
            bars = [[max(kept.value - kept.low, 0.0)], [max(kept.high - kept.value, 0.0)]]
            axes.errorbar(
                100 * x, kept.value, yerr=bars, color=theme.of(name), marker=_MARKERS[_kind(name)], markersize=6.5,
                capsize=2.5, elinewidth=1.1, linestyle="none", zorder=3,
            )  # fmt: skip
        axes.margins(x=0.13, y=0.1)
        how = "time per image" if cost == "measured" else "FLOPs per image"
        axes.set_xlabel(f"{how}, % of full depth")
        axes.set_ylabel("R@5 kept, % of full depth")
        if swept:
            axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink, loc="lower right")
        styled = {name: (exit_label(name), theme.of(name)) for name in points}
        return lambda: place_labels(axes, points, (), styled, theme.paper)

    return draw


def budget_search(tried: SearchedSettings) -> Drawing:
    """Plots mean R@5 of all settings tried against cost in percent of full depth, with the bound and the chosen setting."""

    points, chosen, full, cost = tried.settings, tried.chosen, tried.full, tried.cost
    max_drop, budget = tried.max_drop, tried.budget

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot([100 * p.cost[cost] for p in points], [p.recall for p in points], ".", color=theme.faint, alpha=0.5,
                  markersize=4, label="settings tried")  # fmt: skip
        best = frontier(points, cost)
        axes.plot([100 * p.cost[cost] for p in best], [p.recall for p in best], color=theme.exit, label="Pareto frontier")
        bound = {"color": theme.random, "linestyle": "--"}
        if max_drop is not None:
            axes.axhline(full.recall - max_drop, **bound, label=f"{max_drop:g} points below full depth")
        if budget is not None:
            axes.axvline(100 * budget, **bound, label=f"{100 * budget:g}% of full depth")
        axes.plot(100 * full.cost[cost], full.recall, "o", color=theme.full, label="full depth, router included")
        axes.plot(100 * chosen.cost[cost], chosen.recall, "D", color=theme.routed, markersize=8, label="chosen")
        axes.set_xlabel(f"{cost} cost, router included, % of full depth")
        axes.set_ylabel("R@5, %, mean of both directions\n(calibration images)")
        axes.legend(frameon=False, fontsize=9, labelcolor=theme.ink, loc="lower right")

    return draw


def share_of_full(runs: Mapping[str, Run], name: str, cost: str) -> float | None:
    """Returns a run's cost as a fraction of full depth; None if it was not measured."""
    full, run = runs["full"], runs[name]
    if cost == "counted":
        return run.flops_per_image / full.flops_per_image
    return full.images_per_s / run.images_per_s if run.images_per_s and full.images_per_s else None


def shares_by_complexity(scores: np.ndarray, exits: np.ndarray) -> Drawing:
    """Plots the share of each exit per decile of the complexity scores."""
    parts = deciles(scores)
    known = np.unique(exits)

    def draw(axes: Axes, theme: Theme) -> None:
        below = np.zeros(len(parts))
        for exit, colour in zip(known, theme.depths(len(known))):
            height = np.array([100 * np.mean(exits[part] == exit) for part in parts])
            axes.bar(range(1, len(parts) + 1), height, bottom=below, color=colour, width=0.86, label=f"{exit} blocks")
            below += height
        _decile_axis(axes, len(parts))
        axes.set_ylabel("share of the images, %")
        axes.grid(visible=False, axis="x")
        _legend_above(axes, theme, len(known))

    return draw


def recall_by_complexity(scores: np.ndarray, ranks: Mapping[int, Ranks], k: int = 5) -> Drawing:
    """Plots recall at k (mean of both directions) of every exit per decile of the complexity scores."""
    parts = deciles(scores)

    def draw(axes: Axes, theme: Theme) -> None:
        for exit, colour, marker in zip(sorted(ranks), theme.depths(len(ranks)), "osD^vP*X" * len(ranks)):
            hits = hits_per_image(ranks[exit], k)
            values = [100 * hits[part].mean() for part in parts]
            axes.plot(range(1, len(parts) + 1), values, color=colour, marker=marker, markersize=5, label=f"{exit} blocks")
        _decile_axis(axes, len(parts))
        axes.set_ylabel(f"R@{k}, %, mean of both directions")
        axes.set_ylim(bottom=0)
        _legend_above(axes, theme, len(ranks))

    return draw


def rank_changes(changes: Mapping[int, np.ndarray]) -> Drawing:
    """Plots the distribution over queries of the change in target rank, for each early exit; positive is worse."""
    names = ["100 or\nmore", "10 to\n99", "1 to 9", "same", "1 to 9", "10 to\n99", "100 or\nmore"]

    def draw(axes: Axes, theme: Theme) -> None:
        width = 0.84 / max(1, len(changes))
        for i, (exit, colour) in enumerate(zip(sorted(changes), theme.depths(len(changes) + 1))):
            at = np.arange(len(names)) + (i - (len(changes) - 1) / 2) * width
            axes.bar(at, 100 * change_shares(changes[exit]), width=width, color=colour, label=f"{exit} blocks")
        axes.set_xticks(range(len(names)), names, fontsize=9)
        axes.set_xlabel("ranks better   \N{LEFTWARDS ARROW}      \N{RIGHTWARDS ARROW}   ranks worse than at full depth")
        axes.set_ylabel("share of the queries, %")
        axes.grid(visible=False, axis="x")
        _legend_above(axes, theme, len(changes))

    return draw


def change_shares(change: np.ndarray) -> np.ndarray:
    """Returns [7]: shares of changes <= -100, -99..-10, -9..-1, 0, 1..9, 10..99, >= 100."""
    edges = [-99, -9, 0, 1, 10, 100]
    return np.bincount(np.searchsorted(edges, change, side="right"), minlength=7) / max(1, len(change))


def deciles(scores: np.ndarray) -> list[np.ndarray]:
    """Returns image indices per decile of the scores, simplest first; fewer parts if there are fewer than 10 images."""
    order = np.argsort(scores, kind="stable")
    return [part for part in np.array_split(order, DECILES) if len(part)]


def hits_per_image(ranks: Ranks, k: int) -> np.ndarray:
    """Returns [N]: mean of an image's own hit at k and the fraction of its captions that retrieve it in the top k."""
    n = len(ranks.image_to_text)
    captions = np.bincount(ranks.caption_image, minlength=n)
    found = np.bincount(ranks.caption_image, weights=ranks.text_to_image <= k, minlength=n)
    return (found / captions + (ranks.image_to_text <= k)) / 2


def _kind(name: str) -> str:
    kind = name.partition("_")[0]
    return {"budget": "routed", "lossless": "oracle"}.get(kind, kind if kind in _MARKERS else "static")


def _decile_axis(axes: Axes, n: int) -> None:
    axes.set_xticks(range(1, n + 1))
    axes.set_xlabel(f"complexity {'decile' if n == DECILES else 'part'} of the images (1: simplest)")


def _legend_above(axes: Axes, theme: Theme, n: int) -> None:
    axes.legend(
        frameon=False, fontsize=9, labelcolor=theme.ink, ncols=min(n, 4), loc="lower left", bbox_to_anchor=(0, 1.0),
        borderaxespad=0.2, handlelength=1.2, columnspacing=1.2,
    )  # fmt: skip


def write_budget_search(tried: SearchedSettings, file: str | Path) -> None:
    """Writes the `budget_search` figure as a PNG file."""
    workdir.write_bytes(file, render(budget_search(tried), LIGHT, "png"))

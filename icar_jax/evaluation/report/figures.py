"""Figures of an evaluation, written as PNG through matplotlib's Figure objects (no pyplot, so no global state)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.records.retrieval import RetrievalEvaluation
from icar_jax.evaluation.report.table import exit_depth, run_order

SIZE_INCHES = (7.6, 4.8)
DPI = 150

# Okabe and Ito's palette; the marker differs too, so nothing depends on colour alone.
_STYLES = {
    "full": {"color": "#000000", "marker": "o", "label": "full depth"},
    "exit": {"color": "#0072B2", "marker": "s", "label": "one exit for all images"},
    "routed": {"color": "#D55E00", "marker": "D", "label": "routed by complexity (router included)"},
    "random": {"color": "#009E73", "marker": "^", "label": "random routing, same shares"},
    "oracle": {"color": "#882255", "marker": "*", "label": "oracle (upper bound)"},
    "other": {"color": "#CC79A7", "marker": "v", "label": "other"},
}


def retention_against_cost(record: RetrievalEvaluation, path: str | os.PathLike) -> None:
    """Plots the retention of each run against its cost and writes a PNG to `path`.

    x: FLOPs per image in percent of full depth. y: R@5, mean of both directions, in percent of full depth, with its
    interval. A line joins the single-exit runs; routed points above it are better than a single exit of equal cost. Runs
    with undefined retention are named in the figure. Raises ValueError if there is no run 'full'.
    """
    runs, gallery = record.runs, record.gallery
    if "full" not in runs:
        raise ValueError(f"the runs must hold 'full', the reference of both axes; found {sorted(runs)}")
    figure, axes = new_figure()
    axes.margins(x=0.12, y=0.14)
    axes.axhline(100, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    full_flops = runs["full"].flops_per_image
    points = {
        name: (100 * runs[name].flops_per_image / full_flops, kept)
        for name in run_order(runs)
        if (kept := runs[name].retention) is not None
    }
    static = sorted((cost, kept.value) for name, (cost, kept) in points.items() if _kind(name) in ("exit", "full"))
    if len(static) > 1:
        axes.plot(*zip(*static), color=_STYLES["exit"]["color"], linewidth=1.2, alpha=0.55, zorder=1)
    used: set[str] = set()
    for name, (cost, kept) in points.items():
        kind = _kind(name)
        style = _STYLES[kind] | {"label": None if kind in used else _STYLES[kind]["label"]}
        used.add(kind)
        # A percentile interval need not contain the value; a bar cannot be drawn with a negative length.
        bars = [[max(kept.value - kept.low, 0.0)], [max(kept.high - kept.value, 0.0)]]
        # Full depth is drawn larger and behind, because the last single exit often coincides with it.
        size, layer = (11, 2) if kind == "full" else (7, 3)
        axes.errorbar(cost, kept.value, yerr=bars, markersize=size, capsize=3, linestyle="none", zorder=layer, **style)
    axes.set_xlabel("FLOPs per image, % of full depth")
    axes.set_ylabel("R@5 kept, % of full depth\n(mean of both directions, 95% interval)")
    axes.set_title(
        f"Retention against cost: gallery of {gallery.images:,} images, {gallery.captions:,} captions",
        fontsize=10.5,
    )
    missing = [name for name in run_order(runs) if name not in points]
    if missing:
        axes.text(0.02, 0.02, f"undefined (too few hits): {', '.join(missing)}", transform=axes.transAxes, fontsize=8)
    if points:
        # Below the axes, so that it covers no point.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, frameon=False, fontsize=8.5)
    figure.canvas.draw()  # fixes the layout, since labels are placed in pixel coordinates
    styled = {name: (exit_label(name), _STYLES[_kind(name)]["color"]) for name in points}
    place_labels(axes, points, static, styled, paper="white")
    save(figure, path)


def exit_label(name: str) -> str:
    """Returns a run's display name in figures and tables."""
    return f"exit {exit_depth(name)}" if name.startswith("exit_") else name.replace("_", " ")


def complexity_histogram(
    scores: np.ndarray,
    thresholds: Sequence[float],
    path: str | os.PathLike | BinaryIO,
    *,
    exits: Sequence[int | str] | None = None,
    title: str = "",
    size_inches: tuple[float, float] = SIZE_INCHES,
) -> None:
    """Plots a histogram of complexity scores with the thresholds and the share of images at each exit; writes a PNG.

    scores: [N], finite. thresholds: ascending; a score strictly above t goes deeper, so E thresholds make E + 1 exits.
    exits: executed blocks of each exit, shallow to deep, or names; None numbers them. Thresholds that no score or every score
    exceeds are not drawn; the exits they leave unused are named below the axis. Raises ValueError for invalid arguments.
    """
    scores = np.asarray(scores, np.float64)
    limits = np.asarray(thresholds, np.float64)
    _check_scores(scores, limits, exits)
    names = [f"exit {i + 1} of {len(limits) + 1}" for i in range(len(limits) + 1)] if exits is None else exits
    names = [name if isinstance(name, str) else f"{name} blocks" for name in names]
    below, above = np.sum(limits < min(0, scores.min())), np.sum(limits > max(1, scores.max()))
    end = len(limits) - above
    unused = names[:below] + names[end + 1 :]
    limits, names = limits[below:end], names[below : end + 1]
    # side="left" counts thresholds strictly below a score, as routing does.
    segment = np.searchsorted(limits, scores, side="left")
    shares = np.bincount(segment, minlength=len(limits) + 1) / len(scores)
    low, high = min(scores.min(), limits.min(initial=np.inf)), max(scores.max(), limits.max(initial=-np.inf))
    pad = 0.04 * (high - low) or 0.05
    edges = np.concatenate([[low - pad], limits, [high + pad]])

    figure, axes = new_figure(size_inches)
    span = (low, high) if high > low else None
    axes.hist(scores, bins=40, range=span, color="#56B4E9", edgecolor="white", linewidth=0.4)
    axes.set_xlim(edges[0], edges[-1])
    for limit in limits:
        axes.axvline(limit, color="#D55E00", linewidth=1.5, linestyle="--")
    texts = []
    for i, share in enumerate(shares):
        if not len(limits):
            break  # all images at one exit
        texts.append(
            axes.text(
                (edges[i] + edges[i + 1]) / 2,
                1.02,
                f"{names[i]}: {100 * share:.0f}%",
                transform=axes.get_xaxis_transform(),
                ha="center",
            )
        )
    _stagger(figure, texts)
    notes = [f"dashed: threshold {', '.join(f'{t:.3g}' for t in limits)}"] if len(limits) else []
    notes += [f"not used: {', '.join(unused)}"] if unused else []
    axes.set_xlabel("complexity score" + (f"   ({'; '.join(notes)})" if notes else ""))
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("images")
    # A figure title, because the constrained layout places it above the shares.
    figure.suptitle(title or f"Complexity scores of {len(scores):,} images", fontsize=10.5)
    save(figure, path)


def new_figure(size_inches: tuple[float, float] = SIZE_INCHES) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size_inches, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Figure, path: str | os.PathLike | BinaryIO) -> None:
    if isinstance(path, (str, os.PathLike)):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    # Omit matplotlib's version, so that equal figures give equal bytes.
    figure.savefig(path, format="png", metadata={"Software": None})


def _kind(name: str) -> str:
    kind = name.partition("_")[0]
    return {"budget": "routed", "lossless": "oracle"}.get(kind, kind if kind in _STYLES else "other")


def place_labels(
    axes: Axes,
    points: Mapping[str, tuple[float, Interval]],
    line: Sequence[tuple[float, float]],
    styled: Mapping[str, tuple[str, str]],
    paper: str,
) -> None:
    """Places each label at the nearest position around its point that overlaps no marker, bar, line or other label.

    points: name -> (x, interval); line: vertices of a line to avoid; styled: name -> (label, colour); paper: colour behind
    labels. Draw the figure first, so that its layout is fixed.
    """
    to_pixels = axes.transData.transform
    taken = []
    for cost, kept in points.values():
        x, y = to_pixels((cost, kept.value))
        _, bottom = to_pixels((cost, kept.low))
        _, top = to_pixels((cost, kept.high))
        taken += [Bbox([[x - 10, y - 10], [x + 10, y + 10]]), Bbox([[x - 6, bottom - 3], [x + 6, top + 3]])]
    for start, end in zip(line[:-1], line[1:]):
        steps = np.linspace(to_pixels(start), to_pixels(end), 60)
        taken += [Bbox([xy - 2, xy + 2]) for xy in steps]
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = axes.get_window_extent(renderer)
    for name, (cost, kept) in points.items():
        label = axes.annotate(
            styled[name][0],
            (cost, kept.value),
            (0, 0),
            textcoords="offset points",
            fontsize=9,
            va="center",
            color=styled[name][1],
            bbox={"facecolor": paper, "edgecolor": "none", "pad": 0.6},
            zorder=2.5,
        )
        best = None
        for radius in (9, 15, 22, 32):
            for dx, dy in ((1, 0), (-1, 0), (0.8, 0.9), (-0.8, 0.9), (0.8, -0.9), (-0.8, -0.9)):
                label.set_horizontalalignment("left" if dx > 0 else "right")
                label.set_position((radius * dx, radius * dy))
                box = label.get_window_extent(renderer)
                outside = not (frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1)
                clashes = sum(box.overlaps(other) for other in taken) + 10 * outside
                if best is None or clashes < best[0]:
                    best = (clashes, radius * dx, radius * dy, label.get_horizontalalignment(), box)
            if best[0] == 0:
                break
        _, x, y, alignment, box = best
        label.set_horizontalalignment(alignment)
        label.set_position((x, y))
        taken.append(box)


def _stagger(figure: Figure, texts: Sequence[Text]) -> None:
    """Raises share labels that would overlap earlier ones, for example between two close thresholds."""
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    placed = []
    for text in texts:
        for level in range(len(texts)):
            text.set_y(1.02 + 0.055 * level)
            box = text.get_window_extent(renderer)
            if not any(box.overlaps(other) for other in placed):
                break
        placed.append(box)


def _check_scores(scores: np.ndarray, limits: np.ndarray, exits: Sequence[int | str] | None) -> None:
    if scores.ndim != 1 or scores.size == 0:
        raise ValueError(f"scores must be [N] with at least one image, found shape {list(scores.shape)}")
    bad = int(np.count_nonzero(~np.isfinite(scores)))
    if bad:
        raise ValueError(f"{bad} of {len(scores)} complexity scores are NaN or inf; check the complexity model")
    if limits.ndim != 1 or not np.isfinite(limits).all() or np.any(np.diff(limits) < 0):
        raise ValueError(f"thresholds must be finite and ascending, found {limits.tolist()}")
    if exits is not None and len(exits) != len(limits) + 1:
        raise ValueError(f"{len(limits)} thresholds make {len(limits) + 1} exits, found {len(exits)} in exits={list(exits)}")

"""Figures of a complexity model's evaluation: scores against known complexity, and PCC by nuisance."""

from __future__ import annotations

import os

import numpy as np
from matplotlib.axes import Axes

from icar_jax.evaluation.records.complexity import ComplexityEvaluation
from icar_jax.evaluation.report.complexity_table import MODEL, NAMES
from icar_jax.evaluation.report.figures import new_figure, save

KNOWN = "known complexity (rating)"
_BLUE, _ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito's palette


def scores(predicted: np.ndarray, known: np.ndarray, record: ComplexityEvaluation, path: str | os.PathLike) -> None:
    """Plots scores [N] against known complexity [N] (regression) or per class (classification) and writes a PNG to `path`."""
    figure, axes = new_figure()
    if record.head == "regression":
        _scatter(axes, predicted, known, record)
    else:
        _classes(axes, predicted, known, record)
    save(figure, path)


def nuisance(record: ComplexityEvaluation, path: str | os.PathLike) -> None:
    """Plots the PCC of the model and the best classical measure by thirds of each nuisance and writes a PNG to `path`."""
    figure, axes = new_figure()
    over = record.margin.over
    groups = [(name, level, part) for name, levels in record.nuisance.items() for level, part in levels.items()]
    for run, colour, marker, shift in ((MODEL, _ORANGE, "D", -0.12), (over, _BLUE, "s", 0.12)):
        shown = [(i, pcc) for i, (_, _, part) in enumerate(groups) if (pcc := part.pcc[run]) is not None]
        at, values = np.array([i for i, _ in shown]), np.array([pcc.value for _, pcc in shown])
        # A percentile interval need not contain the value, and may be missing.
        lows = np.array([p.value if p.low is None else min(p.value, p.low) for _, p in shown])
        highs = np.array([p.value if p.high is None else max(p.value, p.high) for _, p in shown])
        label = NAMES.get(run, run)
        bars = [values - lows, highs - values]
        axes.errorbar(at + shift, values, bars, color=colour, marker=marker, linestyle="none", capsize=3, label=label)
    axes.set_xticks(range(len(groups)), [f"{name}\n{level}\n{p.from_:.2f} to {p.to:.2f}" for name, level, p in groups])
    axes.tick_params(axis="x", labelsize=7.5)
    for edge in range(1, len(groups)):
        if groups[edge][0] != groups[edge - 1][0]:
            axes.axvline(edge - 0.5, color="0.8", linewidth=0.8)
    what = "rank of the regret" if record.regret else "known complexity"
    axes.set_ylabel(f"PCC with the {what}, 95% interval")
    axes.set_title(f"PCC by nuisance factor: {record.images:,} images of {record.source}", fontsize=10.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False, fontsize=8.5)  # below the axes
    save(figure, path)


def _scatter(axes: Axes, predicted: np.ndarray, known: np.ndarray, record: ComplexityEvaluation) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    # Fewer points are drawn more opaque.
    alpha = float(np.clip(150 / len(predicted), 0.08, 0.6))
    axes.scatter(known, predicted, s=14, color=_BLUE, alpha=alpha, linewidths=0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel(f"rank of the regret at exit {record.regret.exit}" if record.regret else KNOWN)
    axes.set_ylabel("score")
    run = record.runs[MODEL]
    axes.set_title(
        f"PCC {run['pcc'].value:.3f}, SRCC {run['srcc'].value:.3f}, RMSE {run['rmse'].value:.3f} on "
        f"{record.images:,} images of {record.source}",
        fontsize=10.5,
    )


def _classes(axes: Axes, predicted: np.ndarray, known: np.ndarray, record: ComplexityEvaluation) -> None:
    edges, labels = np.linspace(0, 1, 41), known > record.boundary
    for chosen, colour, name in ((~labels, _BLUE, "simple"), (labels, _ORANGE, "complex")):
        axes.hist(predicted[chosen], edges, color=colour, alpha=0.55, label=f"{name} ({int(chosen.sum()):,})")
    limit = record.threshold
    axes.axvline(limit, color="black", linewidth=1, linestyle="--", label=f"threshold {limit:.3f}")
    axes.set_xlim(0, 1)
    axes.set_xlabel("score: probability of class 'complex'")
    axes.set_ylabel("images")
    run = record.runs[MODEL]
    axes.set_title(
        f"F1 {run['f1'].value:.3f}, ROC AUC {run['roc_auc'].value:.3f} on {record.images:,} images of {record.source}",
        fontsize=10.5,
    )
    axes.legend(frameon=False, fontsize=8.5)

"""The record of a complexity model's evaluation: shown as one table, judged in plain sentences, written as metrics.json.

metrics['head'] is 'regression' or 'classification'; 'source' and 'images' say what it was evaluated on.
metrics['runs'] maps 'model' and the classical measures to {metric: {'value', 'low', 'high'}}, the bounds None where there is no
  interval. Regression: pcc, srcc, rmse, rmae. Classification: accuracy, f1, balanced_accuracy, youden, roc_auc, ece.
metrics['margin'] is the model's margin over the best classical measure: {'metric', 'over', 'value', 'low', 'high',
  'includes_zero'}, paired.
metrics['nuisance'] maps noise, blur and contrast (of scenes) to {level: {'from', 'to', 'images', 'pcc': {run: interval}}}.
metrics['cost'] maps each run to 'flops_per_image' (2 x MACs), 'share_of_vit_l14' (of its vision tower) and 'ms_per_image'; the
  model's 'routing_flops' is what it adds to a tower whose blocks it shares.
A classifier also has 'threshold', 'confusion' and 'boundary', the rating above which an image is complex. metrics['notes'] is a
list of sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

MODEL = "model"
TITLES = {
    "pcc": "PCC", "srcc": "SRCC", "rmse": "RMSE", "rmae": "RMAE", "accuracy": "accuracy", "f1": "F1",
    "balanced_accuracy": "balanced\naccuracy", "youden": "Youden's J", "roc_auc": "ROC AUC", "ece": "ECE",
}  # fmt: skip
NAMES = {
    "jpeg_bytes": "JPEG bytes", "edge_density": "edge density", "gradient_entropy": "gradient entropy",
    "all_classical": "all three, linear",
}  # fmt: skip
_WIDE = 124


def results_table(metrics: Mapping[str, Any]) -> Table:
    """One row a run; each value above its 95% interval."""
    table = Table(title=f"Complexity of {metrics['images']:,} images of {metrics['source']}", box=box.ROUNDED, show_lines=True)
    table.add_column("", no_wrap=True)
    for metric in metrics["runs"][MODEL]:
        table.add_column(TITLES[metric], justify="right", no_wrap=True)
    table.add_column("GFLOPs\n(of ViT-L/14)", justify="right", no_wrap=True)
    table.add_column("ms\n/image", justify="right", no_wrap=True)
    for name, run in metrics["runs"].items():
        cost = metrics["cost"][name]
        flops = cost["flops_per_image"]
        counted = "-" if flops is None else f"{flops / 1e9:.3g}\n({_percent(cost['share_of_vit_l14'])})"
        table.add_row(_name(name), *map(_value, run.values()), counted, f"{cost['ms_per_image']:.3g}")
    return table


def nuisance_table(metrics: Mapping[str, Any]) -> Table:
    """PCC of each run on thirds of the images by each nuisance."""
    table = Table(title="PCC by what varies beside the complexity", box=box.ROUNDED)
    table.add_column("", no_wrap=True)
    for name, levels in metrics["nuisance"].items():
        for level in levels:
            table.add_column(f"{name}\n{level}", justify="right", no_wrap=True)
    cells = [part["pcc"] for levels in metrics["nuisance"].values() for part in levels.values()]
    for run in metrics["runs"]:
        table.add_row(_name(run), *("-" if cell[run] is None else f"{cell[run]['value']:.3f}" for cell in cells))
    return table


def print_results(metrics: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables, the verdicts and the notes."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDE)
    console.print(results_table(metrics))
    if metrics["nuisance"]:
        console.print(nuisance_table(metrics))
    for line in [*verdicts(metrics), *metrics["notes"]]:
        console.print(f"- {line}", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def verdicts(metrics: Mapping[str, Any]) -> list[str]:
    """What the numbers show, as plain sentences."""
    margin, cost = metrics["margin"], metrics["cost"][MODEL]
    title = TITLES[margin["metric"]]
    line = (
        f"{title} of the model - of the best classical measure ({_name(margin['over'])}) = {margin['value']:+.3f}, paired 95% "
        f"interval [{margin['low']:.3f}, {margin['high']:.3f}]"
    )
    if margin["includes_zero"]:
        lines = [f"{line}: includes zero, so the model is not shown to beat a few lines of numpy here"]
    elif margin["value"] > 0:
        lines = [f"{line}: above zero, so the model beats them"]
    else:
        lines = [f"{line}: below zero, so a few lines of numpy do better"]
    lines.append(f"a score costs {_percent(cost['share_of_vit_l14'])} of the counted FLOPs of ViT-L/14's vision tower")
    if cost["routing_flops"] != cost["flops_per_image"]:
        lines.append(
            f"as the router of the tower whose blocks it shares, a score adds {cost['routing_flops'] / 1e9:.3g} GFLOPs only"
        )
    return lines


def _name(run: str) -> str:
    return NAMES.get(run, run)


def _value(entry: Mapping[str, float | None]) -> str:
    if entry["low"] is None:
        return f"{entry['value']:.3f}\nno interval"
    return f"{entry['value']:.3f}\n{entry['low']:.3f} to {entry['high']:.3f}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"

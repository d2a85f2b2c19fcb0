"""Format, table and summary sentences of a complexity model's evaluation (metrics.json).

metrics['head'] is 'regression' or 'classification'; 'source' and 'images' identify the evaluated images.
metrics['runs'] maps 'model' and the classical measures to {metric: {'value', 'low', 'high'}}; bounds are None without an
  interval. Regression: pcc, srcc, rmse, rmae. Classification: accuracy, f1, balanced_accuracy, youden, roc_auc, ece.
metrics['margin'] is the model's paired margin over the best classical measure: {'metric', 'over', 'value', 'low', 'high',
  'includes_zero'}; the last three are None without an interval.
metrics['nuisance'] maps noise, blur and contrast (of scenes) to {level: {'from', 'to', 'images', 'pcc': {run: interval}}}.
metrics['cost'] maps each run to 'flops_per_image' (2 x MACs), 'share_of_vit_l14' (of its vision tower) and 'ms_per_image'; the
  model's 'routing_flops' is its additional cost as the router of a tower whose blocks it shares.
For a model trained on regret, the metrics compare with the ranks of the regrets, scaled to [0, 1]. metrics['regret'] holds
  'kind', 'exit', 'clip', 'mean', 'deviation', 'better_early' (fraction of images with negative regret) and 'pcc' with the raw
  regrets, for the model and the known complexity; metrics['over_known'] is a margin as above, or None.
A classifier also has 'threshold', 'confusion' and 'boundary', the rating above which an image is complex. metrics['notes'] is a
list of sentences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.report.table import print_sentences, wide_console

MODEL = "model"
TITLES = {
    "pcc": "PCC", "srcc": "SRCC", "rmse": "RMSE", "rmae": "RMAE", "accuracy": "accuracy", "f1": "F1",
    "balanced_accuracy": "bal. accuracy", "youden": "Youden's J", "roc_auc": "ROC AUC", "ece": "ECE",
}  # fmt: skip
NAMES = {
    "jpeg_bytes": "JPEG bytes", "edge_density": "edge density", "gradient_entropy": "gradient entropy",
    "all_classical": "all three", "known_complexity": "known complexity",
}  # fmt: skip

_WIDE = 104  # columns that intervals with three decimals need


def results_table(metrics: Mapping[str, Any], *, compact: bool = False) -> Table:
    """Returns a table with one column per run and one row per metric, values above 95% intervals; `compact` fits 80 columns."""
    table = _table(metrics, f"{subject(metrics)} of {metrics['images']:,} images of {metrics['source']}", compact)
    runs, cost = metrics["runs"], metrics["cost"]
    for metric in runs[MODEL]:
        table.add_row(TITLES[metric], *(_value(run[metric], 2 if compact else 3) for run in runs.values()))
    table.add_row("GFLOPs/image\nof ViT-L/14", *(_counted(cost[name]) for name in runs))
    table.add_row("ms/image", *(_milliseconds(cost[name]["ms_per_image"]) for name in runs))
    return table


def nuisance_table(metrics: Mapping[str, Any], *, compact: bool = False) -> Table:
    """Returns a table of the PCC of each run on thirds of the images by each nuisance."""
    table = _table(metrics, "PCC by nuisance factor", compact)
    for name, levels in metrics["nuisance"].items():
        for level, part in levels.items():
            cells = (part["pcc"][run] for run in metrics["runs"])
            shown = ("-" if cell is None else f"{cell['value']:.3f}" for cell in cells)
            table.add_row(f"{name} {level}", *shown, end_section=level == "high")
    return table


def print_results(metrics: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the tables, the verdicts and the notes."""
    console = console or wide_console(_WIDE)
    compact = console.width < _WIDE
    console.print(results_table(metrics, compact=compact))
    if metrics["nuisance"]:
        console.print(nuisance_table(metrics, compact=compact))
    print_sentences([*verdicts(metrics), *metrics["notes"]], console)


def _table(metrics: Mapping[str, Any], title: str, compact: bool) -> Table:
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD if compact else box.ROUNDED,
        padding=(0, 0) if compact else (0, 1),
        show_edge=not compact,
    )
    table.add_column("", no_wrap=True)
    for name in metrics["runs"]:
        table.add_column(_name(name).replace(" ", "\n", 1), justify="right", no_wrap=True)
    return table


def verdicts(metrics: Mapping[str, Any]) -> list[str]:
    """Returns plain sentences about what the numbers show."""
    cost = metrics["cost"][MODEL]
    lines = [_margin(metrics["margin"], "the best classical measure ({})", "a few lines of numpy", "do better")]
    if metrics.get("over_known"):
        lines.append(_margin(metrics["over_known"], "the {}", "the images' known complexity", "does better"))
    if "regret" in metrics:
        lines.append(_regret(metrics["regret"]))
    lines.append(f"a score costs {_percent(cost['share_of_vit_l14'])} of the counted FLOPs of ViT-L/14's vision tower")
    if cost["routing_flops"] != cost["flops_per_image"]:
        lines.append(
            f"as the router of the tower whose blocks it shares, a score adds only {cost['routing_flops'] / 1e9:.3g} GFLOPs"
        )
    return lines


def subject(metrics: Mapping[str, Any]) -> str:
    """Returns what the scores predict: 'Complexity', or the regret at an exit."""
    found = metrics.get("regret")
    return f"Regret ({found['kind']}) at exit {found['exit']}" if found else "Complexity"


def _margin(margin: Mapping[str, Any], over: str, other: str, does: str) -> str:
    title = TITLES[margin["metric"]]
    line = f"{title} of the model - of {over.format(_name(margin['over']))} = {margin['value']:+.3f}"
    if margin["low"] is not None:
        line += f", paired 95% interval [{margin['low']:.3f}, {margin['high']:.3f}]"
    if margin["low"] is None:
        return f"{line}: no interval (too few images, or too few of one class), so no conclusion"
    if margin["includes_zero"]:
        return f"{line}: includes zero, so the model is not shown to beat {other} here"
    if margin["value"] > 0:
        them = "them" if does == "do better" else "it"
        return f"{line}: above zero, so the model beats {them}"
    return f"{line}: below zero, so {other} {does}"


def _regret(found: Mapping[str, Any]) -> str:
    pcc = found["pcc"][MODEL]
    shown = "no value" if pcc["value"] is None else f"{pcc['value']:.3f}"
    if pcc["low"] is not None:
        shown += f", 95% interval [{pcc['low']:.3f}, {pcc['high']:.3f}]"
    return (
        f"regret: mean {found['mean']:.3g}, standard deviation {found['deviation']:.3g}, negative for "
        f"{_percent(found['better_early'])} of the images; PCC of the score with the raw regrets: {shown}"
    )


def _name(run: str) -> str:
    return NAMES.get(run, run)


def _value(entry: Mapping[str, float | None], decimals: int) -> str:
    shown = f"{entry['value']:.3f}\n"
    if entry["low"] is None:
        return f"{shown}no interval"
    return shown + f"{entry['low']:.{decimals}f} to {entry['high']:.{decimals}f}"


def _counted(cost: Mapping[str, float | None]) -> str:
    flops = cost["flops_per_image"]
    return "-" if flops is None else f"{flops / 1e9:.3g}\n{_percent(cost['share_of_vit_l14'])}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"

"""The record of a complexity model's evaluation: shown as one table, judged in plain sentences, written as metrics.json.

metrics['head'] is 'regression' or 'classification'; 'source' and 'images' say what it was evaluated on.
metrics['runs'] maps 'model' and the classical measures to {metric: {'value', 'low', 'high'}}, the bounds None where there is no
  interval. Regression: pcc, srcc, rmse, rmae. Classification: accuracy, f1, balanced_accuracy, youden, roc_auc, ece.
metrics['margin'] is the model's margin over the best classical measure: {'metric', 'over', 'value', 'low', 'high',
  'includes_zero'}, paired; the last three None where there is no interval.
metrics['nuisance'] maps noise, blur and contrast (of scenes) to {level: {'from', 'to', 'images', 'pcc': {run: interval}}}.
metrics['cost'] maps each run to 'flops_per_image' (2 x MACs), 'share_of_vit_l14' (of its vision tower) and 'ms_per_image'; the
  model's 'routing_flops' is what it adds to a tower whose blocks it shares.
Of a model that learnt regret the metrics are against the ranks of the regrets, scaled to [0, 1], and metrics['regret'] says
  'kind', 'exit', 'clip', 'mean', 'deviation', 'better_early' (share of images that the exit serves better) and 'pcc' with the
  regrets as they are, of the model and of what is known of the images; metrics['over_known'] is a margin as above, or None.
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
    """One column a run, one row a metric, each value above its 95% interval; `compact` fits 80 columns."""
    table = _table(metrics, f"{subject(metrics)} of {metrics['images']:,} images of {metrics['source']}", compact)
    runs, cost = metrics["runs"], metrics["cost"]
    for metric in runs[MODEL]:
        table.add_row(TITLES[metric], *(_value(run[metric], 2 if compact else 3) for run in runs.values()))
    table.add_row("GFLOPs/image\nof ViT-L/14", *(_counted(cost[name]) for name in runs))
    table.add_row("ms/image", *(_milliseconds(cost[name]["ms_per_image"]) for name in runs))
    return table


def nuisance_table(metrics: Mapping[str, Any], *, compact: bool = False) -> Table:
    """PCC of each run on thirds of the images by each nuisance."""
    table = _table(metrics, "PCC by what varies beside the complexity", compact)
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
    """What the numbers show, as plain sentences."""
    cost = metrics["cost"][MODEL]
    lines = [_margin(metrics["margin"], "the best classical measure ({})", "a few lines of numpy", "do better")]
    if metrics.get("over_known"):
        lines.append(_margin(metrics["over_known"], "the {}", "what is known of the images' complexity", "does better"))
    if "regret" in metrics:
        lines.append(_regret(metrics["regret"]))
    lines.append(f"a score costs {_percent(cost['share_of_vit_l14'])} of the counted FLOPs of ViT-L/14's vision tower")
    if cost["routing_flops"] != cost["flops_per_image"]:
        lines.append(
            f"as the router of the tower whose blocks it shares, a score adds {cost['routing_flops'] / 1e9:.3g} GFLOPs only"
        )
    return lines


def subject(metrics: Mapping[str, Any]) -> str:
    """What the scores are of: 'Complexity', or the regret at an exit."""
    found = metrics.get("regret")
    return f"Regret ({found['kind']}) at exit {found['exit']}" if found else "Complexity"


def _margin(margin: Mapping[str, Any], over: str, rival: str, does: str) -> str:
    title = TITLES[margin["metric"]]
    line = f"{title} of the model - of {over.format(_name(margin['over']))} = {margin['value']:+.3f}"
    if margin["low"] is not None:
        line += f", paired 95% interval [{margin['low']:.3f}, {margin['high']:.3f}]"
    if margin["low"] is None:
        return f"{line}: too few images, or too few of one class, for an interval, so nothing is shown"
    if margin["includes_zero"]:
        return f"{line}: includes zero, so the model is not shown to beat {rival} here"
    if margin["value"] > 0:
        them = "them" if does == "do better" else "it"
        return f"{line}: above zero, so the model beats {them}"
    return f"{line}: below zero, so {rival} {does}"


def _regret(found: Mapping[str, Any]) -> str:
    pcc = found["pcc"][MODEL]
    shown = "no value" if pcc["value"] is None else f"{pcc['value']:.3f}"
    if pcc["low"] is not None:
        shown += f", 95% interval [{pcc['low']:.3f}, {pcc['high']:.3f}]"
    return (
        f"regret is {found['mean']:.3g} on average, deviation {found['deviation']:.3g}, and below zero for "
        f"{_percent(found['better_early'])} of the images; PCC of the score with the regrets as they are: {shown}"
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

"""Table and summary sentences of a complexity model's evaluation; `records.complexity` documents the record."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.metrics.ratings import Estimate
from icar_jax.evaluation.records.complexity import ComplexityEvaluation, Cost, Margin, RegretSummary
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


def results_table(record: ComplexityEvaluation, *, compact: bool = False) -> Table:
    """Returns a table with one column per run and one row per metric, values above 95% intervals; `compact` fits 80 columns."""
    table = _table(record, f"{subject(record)} of {record.images:,} images of {record.source}", compact)
    runs, cost = record.runs, record.cost
    for metric in runs[MODEL]:
        table.add_row(TITLES[metric], *(_value(run[metric], 2 if compact else 3) for run in runs.values()))
    table.add_row("GFLOPs/image\nof ViT-L/14", *(_counted(cost[name]) for name in runs))
    table.add_row("ms/image", *(_milliseconds(cost[name].ms_per_image) for name in runs))
    return table


def nuisance_table(record: ComplexityEvaluation, *, compact: bool = False) -> Table:
    """Returns a table of the PCC of each run on thirds of the images by each nuisance."""
    table = _table(record, "PCC by nuisance factor", compact)
    for name, levels in record.nuisance.items():
        for level, part in levels.items():
            cells = (part.pcc[run] for run in record.runs)
            shown = ("-" if cell is None else f"{cell.value:.3f}" for cell in cells)
            table.add_row(f"{name} {level}", *shown, end_section=level == "high")
    return table


def print_results(record: ComplexityEvaluation, console: Console | None = None) -> None:
    """Prints the tables, the verdicts and the notes."""
    console = console or wide_console(_WIDE)
    compact = console.width < _WIDE
    console.print(results_table(record, compact=compact))
    if record.nuisance:
        console.print(nuisance_table(record, compact=compact))
    print_sentences([*verdicts(record), *record.notes], console)


def _table(record: ComplexityEvaluation, title: str, compact: bool) -> Table:
    table = Table(
        title=title,
        box=box.SIMPLE_HEAD if compact else box.ROUNDED,
        padding=(0, 0) if compact else (0, 1),
        show_edge=not compact,
    )
    table.add_column("", no_wrap=True)
    for name in record.runs:
        table.add_column(_name(name).replace(" ", "\n", 1), justify="right", no_wrap=True)
    return table


def verdicts(record: ComplexityEvaluation) -> list[str]:
    """Returns plain sentences about what the numbers show."""
    cost = record.cost[MODEL]
    lines = [_margin(record.margin, "the best classical measure ({})", "a few lines of numpy", "do better")]
    if record.over_known is not None:
        lines.append(_margin(record.over_known, "the {}", "the images' known complexity", "does better"))
    if record.regret is not None:
        lines.append(_regret(record.regret))
    lines.append(f"a score costs {_percent(cost.share_of_vit_l14)} of the counted FLOPs of ViT-L/14's vision tower")
    if cost.routing_flops != cost.flops_per_image:
        lines.append(
            f"as the router of the tower whose blocks it shares, a score adds only {cost.routing_flops / 1e9:.3g} GFLOPs"
        )
    return lines


def subject(record: ComplexityEvaluation) -> str:
    """Returns what the scores predict: 'Complexity', or the regret at an exit."""
    found = record.regret
    return f"Regret ({found.kind}) at exit {found.exit}" if found else "Complexity"


def _margin(margin: Margin, over: str, other: str, does: str) -> str:
    title = TITLES[margin.metric]
    line = f"{title} of the model - of {over.format(_name(margin.over))} = {margin.value:+.3f}"
    if margin.low is None:
        return f"{line}: no interval (too few images, or too few of one class), so no conclusion"
    line += f", paired 95% interval [{margin.low:.3f}, {margin.high:.3f}]"
    if margin.includes_zero:
        return f"{line}: includes zero, so the model is not shown to beat {other} here"
    if margin.value > 0:
        them = "them" if does == "do better" else "it"
        return f"{line}: above zero, so the model beats {them}"
    return f"{line}: below zero, so {other} {does}"


def _regret(found: RegretSummary) -> str:
    pcc = found.pcc[MODEL]
    shown = "no value" if pcc.value is None else f"{pcc.value:.3f}"
    if pcc.low is not None:
        shown += f", 95% interval [{pcc.low:.3f}, {pcc.high:.3f}]"
    return (
        f"regret: mean {found.mean:.3g}, standard deviation {found.deviation:.3g}, negative for "
        f"{_percent(found.better_early)} of the images; PCC of the score with the raw regrets: {shown}"
    )


def _name(run: str) -> str:
    return NAMES.get(run, run)


def _value(found: Estimate, decimals: int) -> str:
    shown = f"{found.value:.3f}\n"
    if found.low is None:
        return f"{shown}no interval"
    return shown + f"{found.low:.{decimals}f} to {found.high:.{decimals}f}"


def _counted(cost: Cost) -> str:
    flops = cost.flops_per_image
    return "-" if flops is None else f"{flops / 1e9:.3g}\n{_percent(cost.share_of_vit_l14)}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"

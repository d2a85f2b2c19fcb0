"""Prints the result of a calibration as a table and plain sentences, from the checkpoint's description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from icar_jax.evaluation.report.table import print_sentences
from icar_jax.inference.budgets import ABOVE_ALL, BELOW_ALL, Costs


def print_calibration(description: Mapping[str, Any], costs: Costs | None, console: Console | None = None) -> None:
    """Prints the thresholds of a bundle (with its `costs`) or of a classifier, and how they were found."""
    console = console or Console()
    bundle = "routing" in description
    found = description["routing"]["found"] if bundle else description["threshold_found"]
    console.print(_exits(description["routing"], costs) if bundle else _classifier(description["threshold"], found))
    print_sentences(sentences(found, costs), console)


def sentences(found: Mapping[str, Any], costs: Costs | None) -> list[str]:
    """Returns sentences about how the thresholds were found and what they reached."""
    unreadable = f", {found['unreadable']} more could not be read" if found["unreadable"] else ""
    lines = [f"found on {found['images']:,} images of {found['calibration']}{unreadable}"]
    by_recall = found["method"] == "max_recall_drop" or found.get("chosen_by") == "recall"
    if found["method"] == "budget" and not by_recall:
        budget = f"{_percent(found['budget'])} of full depth, {found.get('cost_by', 'counted')} cost"
        lines.append(f"budget: {budget}; exit shares are as even as the budget allows")
    if by_recall:
        lines += _recall(found)
    if "measured" in found:
        took = found["measured"]
        exits = ", ".join(f"{e} blocks {ms:.3g} ms" for e, ms in took["exit_ms"].items())
        lines.append(
            f"mean measured cost {_percent(took['cost'])} of full depth: {exits}, router {took['router_ms']:.3g} ms per image "
            f"(medians of {took['repeats']} timings of {took['images']} images, on this machine)"
        )
        if took["cost"] >= 1:
            lines.append("routing saves no time here: it takes at least as long as running every image at full depth")
    if costs is not None:
        router = _percent(costs.router / costs.full)
        lines.append(f"mean counted cost {_percent(found['cost'])} of full depth, {router} of it for the complexity model")
        if found["cost"] >= 1:
            lines.append("routing saves no FLOPs here: it costs at least as much as running every image at full depth")
    if found["method"] == "metric":
        known = found["low"] is not None
        interval = f"95% interval [{found['low']:.4f}, {found['high']:.4f}]" if known else "too few images for an interval"
        lines.append(
            f"{found['metric']} {found['value']:.4f}, {interval}, on the images that chose the threshold, so it is optimistic "
            f"({found['complex']} of {found['images']} are complex, {found['called_complex']} are classified as complex)"
        )
    return lines


def _recall(found: Mapping[str, Any]) -> list[str]:
    drop = found["drop"]
    how = "every combination on a grid" if found["search"] == "exhaustive" else "coordinate search, a local optimum"
    tried = f"of {found['settings']:,} settings ({how})"
    chosen = (
        f"highest mean R@5 {tried} within {_percent(found['budget'])} of full depth's {found['cost_by']} cost"
        if found["method"] == "budget"
        else f"cheapest {found['cost_by']} cost {tried} that loses at most {found['max_recall_drop']:g} points of mean R@5"
    )
    lines = [
        chosen,
        f"mean R@5 {found['recall']:.2f}% against {found['full_recall']:.2f}% at full depth: a drop of {drop['value']:.2f} "
        f"points, 95% interval [{drop['low']:.2f}, {drop['high']:.2f}], in a gallery of {found['images']:,} images and "
        f"{found['captions']:,} captions",
        "the drop is measured on the images that chose the setting, so it is optimistic; drops also grow with the gallery: "
        "evaluate.py measures the drop on the held-out split",
    ]
    unused = [e for e, share in found["reached"].items() if not share]
    if unused:
        lines.append(f"exits not used: {', '.join(unused)}")
    if alone := found["exit_alone"]:
        lines.append(
            f"exit {alone['exit']} for every image, without a router, also meets the bound and is cheaper: "
            f"{_percent(alone['cost'])} of full depth's {found['cost_by']} cost at mean R@5 {alone['recall']:.2f}%, so routing "
            "gains nothing here"
        )
    return lines


def _exits(routing: Mapping[str, Any], costs: Costs) -> Table:
    table = Table(title="Calibrated exits", box=box.ROUNDED)
    for header in ("blocks", "scores", "share", "GFLOPs\n/image", "% of\nfull depth"):
        table.add_column(header, justify="right", no_wrap=True)
    limits = [None, *routing["thresholds"], None]
    for exit, low, high in zip(routing["exits"], limits, limits[1:]):
        cost = costs.exits[exit] + costs.router
        table.add_row(
            str(exit),
            _range(low, high),
            _percent(routing["found"]["reached"][str(exit)]),
            f"{cost / 1e9:.3g}",
            f"{100 * cost / costs.full:.1f}",
        )
    return table


def _classifier(threshold: float, found: Mapping[str, Any]) -> Table:
    table = Table(title="Calibrated classifier", box=box.ROUNDED)
    for header in ("threshold", found["metric"], "95% interval", "classified complex"):
        table.add_column(header, justify="right", no_wrap=True)
    share = found["called_complex"] / found["images"]
    interval = f"{found['low']:.4f} to {found['high']:.4f}" if found["low"] is not None else "none"
    table.add_row(f"{threshold:.3f}", f"{found['value']:.4f}", interval, _percent(share))
    return table


def _range(low: float | None, high: float | None) -> str:
    if low is not None and low >= ABOVE_ALL or high is not None and high <= BELOW_ALL:
        return "none"
    parts = [f"above {low:.4f}"] if low is not None and low > BELOW_ALL else []
    parts += [f"to {high:.4f}"] if high is not None and high < ABOVE_ALL else []
    return ", ".join(parts) or "all"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"

"""Figure of study.py: retention of every recipe within the target budget, and the cost-recall frontier of the best one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from experiments.retention.recipes import BUDGET, RECIPES
from icar_jax.evaluation.report import figures

STYLES = {  # colour, marker
    "complexity": ("#D55E00", "D"), "regret": ("#0072B2", "s"), "gallery": ("#CC79A7", "v"), "blocks": ("#009E73", "^"),
}  # fmt: skip
OTHER = ("#56B4E9", "P")  # for routers without a style
EXIT = "#882255"
GOAL = 99.0
Row = Mapping[str, Any]


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG with two panels per dataset that has routed rows. record: from `report.write_report`."""
    parts = {name: part for name, part in record["datasets"].items() if any(r["kind"] == "routed" for r in part["rows"])}
    most = max(len({row["recipe"] for row in part["rows"]}) for part in parts.values())
    figure, first = figures.new_figure((13.0, len(parts) * max(4.6, 2.4 + 0.36 * most)))
    figure.delaxes(first)
    for (left, right), (name, part) in zip(figure.subplots(len(parts), 2, squeeze=False), parts.items()):
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        _forest(left, name, part["rows"])
        _frontier(right, name, part)
    figures.save(figure, path)


def _forest(axes: Axes, dataset: str, rows: Sequence[Row]) -> None:
    """Forest plot with one line per recipe: full depth, single exits, and per router the most expensive routing within the
    target time, or else the cheapest one, drawn paler."""
    names = list(dict.fromkeys(row["recipe"] for row in rows if row["retention"] is not None and row["recipe"] != "baseline"))
    routers = [name for name in STYLES if any(row.get("router") == name for row in rows)]
    _lines(axes.axvline)
    marks: list[tuple[Row, float, tuple[str, str, str], str]] = []
    for y, name in enumerate(names):
        own = [row for row in rows if row["recipe"] == name]
        for row in own:
            if row["row"] == "full":
                marks.append((row, y, ("#000000", "o", "full"), "the recipe's full depth, at any cost"))
            elif row["kind"] == "exit":
                marks.append((row, y, (EXIT, "*", "full"), "one exit for all images"))
        for i, router in enumerate(routers):
            at = y + 0.55 * ((i + 1) / (len(routers) + 1) - 0.5) if len(routers) > 1 else y + 0.22
            for suffix, fill in (("", "full"), (" affine", "none")):
                row = within_budget(rows, name, router, bool(suffix))
                if row is not None:
                    label = f"by {router}" + (", calibrated" if suffix else "")
                    marks.append((row, at, (*STYLES.get(router, OTHER), fill), label))
    labelled: set[str] = set()  # only the first mark of a kind gets a legend label
    for row, y, style, label in marks:
        beyond = row["kind"] == "routed" and cost(row) > BUDGET
        label += f", beyond {BUDGET:.0%} of the time" if beyond else ""
        _bar(axes, row, y, style, 0.4 if beyond else 1.0, None if label in labelled else label)
        labelled.add(label)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("mean recall retained, % of the baseline's (95% interval)")
    axes.set_title(f"{dataset}: every recipe, routed within {BUDGET:.0%} of the baseline's time", fontsize=10.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False, fontsize=7.5, columnspacing=1.2)


def _bar(axes: Axes, row: Row, y: float, style: tuple[str, str, str], alpha: float, label: str | None) -> None:
    """Draws a mark (colour, marker, fillstyle) with its interval."""
    kept, (colour, marker, fill) = row["retention"], style
    bars = [[max(kept["value"] - kept["low"], 0)], [max(kept["high"] - kept["value"], 0)]]
    drawn = {"color": colour, "marker": marker, "fillstyle": fill, "alpha": alpha}
    axes.errorbar(kept["value"], y, xerr=bars, linestyle="none", label=label, markersize=4.5, linewidth=1, capsize=1.5, **drawn)


def _frontier(axes: Axes, dataset: str, part: Mapping[str, Any]) -> None:
    """Plots the best recipe at every budget with its exits, random routing and oracle, and the runs without exits."""
    rows = part["rows"]
    best = best_recipe(rows)
    own = [row for row in rows if row["recipe"] == best]
    _lines(axes.axhline)
    axes.axvline(100 * BUDGET, color="0.8", linewidth=0.8, linestyle="--", zorder=0)
    for router in [name for name in STYLES if any(row.get("router") == name for row in own)]:
        colour, marker = STYLES.get(router, OTHER)
        routed = [row for row in own if row["kind"] == "routed" and row["router"] == router and "affine" not in row["row"]]
        _curve(axes, routed, f"routed by {router}", color=colour, marker=marker)
        for kind, line in (("random", ":"), ("oracle", "--")):
            others = [row for row in own if row["kind"] == kind and row["router"] == router]
            _curve(axes, others, f"{kind}, shares of {router}", color=colour, linestyle=line, linewidth=0.9)
    for row in own:
        if row["kind"] in ("exit", "full"):
            _point(axes, row, row["row"].replace("exit_", "exit "), EXIT, "*")
    for row in rows:
        if not RECIPES[row["recipe"]].exits:
            _point(axes, row, row["recipe"], "#000000", "o")
    count = max(len(row["seeds"]) for row in rows)
    axes.set_xlabel("FLOPs per image, % of the baseline's, router included (thin lines: measured time)")
    axes.set_ylabel("mean recall retained, %")
    axes.set_title(
        f"{dataset}: {best}, gallery of {part['gallery']['images']:,} images, {count} seed{'s' if count > 1 else ''}",
        fontsize=10.5,
    )
    axes.margins(x=0.1, y=0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False, fontsize=7.5, columnspacing=1.2)


def best_recipe(rows: Sequence[Row]) -> str:
    """Returns the recipe of the routed row with the highest retention, among rows within the time budget if there are any."""
    routed = [row for row in rows if row["kind"] == "routed" and row["retention"] is not None]
    within = [row for row in routed if cost(row) <= BUDGET]
    return max(within or routed, key=lambda row: row["retention"]["value"])["recipe"]


def within_budget(rows: Sequence[Row], recipe: str, router: str, calibrated: bool) -> Row | None:
    """Returns a recipe's most expensive row of one router within the target time, or the cheapest row if none is within it.

    Rows are chosen by cost, because choosing by recall would select on the evaluated images. Cost is by FLOPs, because the
    times of adjacent budgets differ by less than the noise.
    """
    own = [row for row in rows if row["recipe"] == recipe and row["kind"] == "routed" and row["router"] == router]
    own = [row for row in own if row["row"].endswith("affine") == calibrated and row["retention"] is not None]
    within = [row for row in own if cost(row) <= BUDGET]
    return max(within, key=lambda row: row["counted"]) if within else min(own, key=cost, default=None)


def cost(row: Row) -> float:
    """Returns the measured time as a fraction of full depth's, or the counted cost if not measured."""
    return row["counted"] if row["measured"] is None else row["measured"]


def _curve(axes: Axes, rows: Sequence[Row], label: str, **style: Any) -> None:
    """Plots retention against counted FLOPs; routed rows also show their measured time."""
    rows = sorted((row for row in rows if row["retention"] is not None), key=lambda row: row["counted"])
    if not rows:
        return
    kept = np.array([[row["retention"][name] for name in ("low", "value", "high")] for row in rows])
    x = np.array([100 * row["counted"] for row in rows])
    axes.plot(x, kept[:, 1], label=label, markersize=4.5, **style)
    if "marker" in style:
        axes.fill_between(x, kept[:, 0], kept[:, 2], color=style["color"], alpha=0.12, linewidth=0)
        for row in rows:
            _time(axes, row, style["color"])


def _point(axes: Axes, row: Row, name: str, colour: str, marker: str) -> None:
    kept, x = row["retention"], 100 * row["counted"]
    bars = [[max(kept["value"] - kept["low"], 0)], [max(kept["high"] - kept["value"], 0)]]
    axes.errorbar(x, kept["value"], bars, color=colour, marker=marker, capsize=2, linestyle="none")
    axes.annotate(name, (x, kept["value"]), (5, 5), textcoords="offset points", fontsize=8.5, color=colour)
    _time(axes, row, colour)


def _time(axes: Axes, row: Row, colour: str) -> None:
    """Draws a thin line from a row's FLOPs to its measured time."""
    if row["measured"] is not None:
        x, y = (100 * row["counted"], 100 * row["measured"]), (row["retention"]["value"],) * 2
        axes.plot(x, y, color=colour, linewidth=0.6, marker="|", markevery=[1], markersize=5, alpha=0.8)


def _lines(line: Any) -> None:
    line(100, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    line(GOAL, color="0.8", linewidth=0.8, linestyle="--", zorder=0)

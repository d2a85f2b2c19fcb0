"""Tables and the figure of the study."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from icar_jax.evaluation.report import figures


def interval(found: Mapping[str, float], signed: bool = False) -> str:
    """'48.5 [46.2, 50.9]'."""
    sign = "+" if signed else ""
    return f"{found['value']:{sign}.1f} [{found['low']:{sign}.1f}, {found['high']:{sign}.1f}]"


def markdown(record: Mapping[str, Any]) -> str:
    """Returns both tables."""
    times = record["seconds"] or {}
    full = times.get(f"last_block@{max(m['exit'] for m in record['rows'] if m['row'] == 'last_block')}")
    lines = [
        f"{record['photographs']} photographs ({record['split']}), {len(record['seeds'])} seeds; mean recall at 1, 5 and 10 of "
        "both directions, % [95% interval over images and seeds].",
        "",
        "| row | blocks | counted cost | time | mean recall | minus last_block | kept of recipe, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in record["rows"]:
        fastest = next((times[key] for key in _same_cost(m) if key in times), None)
        time = f"{fastest / full:.2f} ({1e3 * fastest:.1f} ms)" if fastest and full else ""
        lines.append(
            f"| {m['row']} | {m['exit']} | {m['counted']:.2f} | {time} | {interval(m['recall'])} | "
            f"{interval(m['minus_last_block'], True)} | {interval(m['kept'])} |"
        )
    lines += [
        "",
        "Half of the images leave early, the others take full depth. An image loses if it and its captions have a lower mean "
        "recall when it alone leaves early.",
        "",
        "| exit | lose, gain, % of images | router | mean recall | at random | minus random | rank correlation with loss |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for m in record["routing"]:
        found = m["spearman_with_regret"]
        shown = ", ".join("none" if value is None else f"{value:+.2f}" for value in found or ())
        moved = f"{mean(m['lose']):.0f}, {mean(m['gain']):.0f}"
        recalls = f"{interval(m['recall'])} | {interval(m['random'])} | {interval(m['minus_random'], True)}"
        lines.append(f"| {m['exit']} | {moved} | {m['router']} | {recalls} | {shown} |")
    return "\n".join(lines) + "\n"


def _same_cost(m: Mapping[str, Any]) -> list[str]:
    """Names in the times of rows with the same tower as a row's, at its exit."""
    return [f"{each}@{m['exit']}" for each in (m["row"], tower_of(m["row"]), f"{tower_of(m['row'])}_exits")]


def tower_of(row: str) -> str:
    """Returns the name of a row without what says how its heads were trained."""
    return row.removesuffix("_untrained").removesuffix("_exits")


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draws mean recall against counted cost, one line a row with its exits."""
    figure, axes = figures.new_figure()
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for m in record["rows"]:
        method = re.sub(r"_[0-9.]+(?=_untrained|_exits|$)", "", m["row"]).replace("_", " ")
        by_method.setdefault(method, []).append(m)
    for name, found in by_method.items():
        worth = lambda m: not any(o["counted"] <= m["counted"] and o["recall"]["value"] > m["recall"]["value"] for o in found)
        best = sorted((m for m in found if worth(m)), key=lambda m: m["counted"])
        axes.plot([m["counted"] for m in best], [m["recall"]["value"] for m in best], marker="o", markersize=3, label=name)
    axes.set_xlabel("counted cost of an image, full depth = 1")
    axes.set_ylabel("mean recall, %")
    axes.legend(fontsize=7)
    figures.save(figure, path)

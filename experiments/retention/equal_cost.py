"""What random routing keeps at the very cost of a routed row, whose router is in it: by counted FLOPs, or by measured time.

Dice need no router, so at equal shares of the exits they are cheaper; at equal cost they can send more images to full depth.
What they keep there lies between the rows of dice, of an exit for all images and of full depth, which are dice with one side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Point:
    """One way to deal images out without a router: its costs as shares of the baseline's, and recall [1 + R] on resamples."""

    counted: float
    measured: float | None
    values: np.ndarray


def by_flops(points: Sequence[Point], counted: float) -> np.ndarray:
    """[1 + R]: recall at a counted cost, linear between the nearest points; beyond the outermost, theirs."""
    points = sorted(points, key=lambda point: point.counted)
    costs = np.array([point.counted for point in points])
    if counted <= costs[0] or counted >= costs[-1]:
        return points[0 if counted <= costs[0] else -1].values
    above = int(np.searchsorted(costs, counted))
    part = (counted - costs[above - 1]) / (costs[above] - costs[above - 1])
    return (1 - part) * points[above - 1].values + part * points[above].values


def by_time(points: Sequence[Point], measured: float) -> np.ndarray | None:
    """[1 + R]: recall at a measured time, of which dice take what a straight line through the points' times and FLOPs says.

    Single times are too noisy to go from one to the next. Full depth, the dearest point, is had at its own time in any case: it
    needs no queues. None where times do not grow with FLOPs, or fewer than two were taken.
    """
    timed = [point for point in points if point.measured is not None]
    full = max(points, key=lambda point: point.counted)
    if full.measured is not None and measured >= full.measured:
        return full.values
    if len(timed) < 2:
        return None
    slope, start = np.polyfit([point.counted for point in timed], [point.measured for point in timed], 1)
    return by_flops(points, (measured - start) / slope) if slope > 0 else None


def smoothed(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of one run, times of routed ones from a straight line through times and FLOPs of all that one router routes.

    A router's budgets differ in how many images leave early, so time and FLOPs grow together, and single times are noisy:
    `by_time` draws the same line for dice. Where fewer than three budgets were timed, their own times stay.
    """
    found = {name: dict(row) for name, row in rows.items()}
    routed = [row for row in found.values() if row["kind"] == "routed" and row["measured"] is not None]
    for router in {row["router"] for row in routed}:
        mine = [row for row in routed if row["router"] == router]
        counted = np.array([row["counted"] for row in mine])
        if len(np.unique(counted)) >= 3:
            line = np.polyfit(counted, [row["measured"] for row in mine], 1)
            for row, time in zip(mine, np.polyval(line, counted), strict=True):
                row["measured"] = float(time)
    return found

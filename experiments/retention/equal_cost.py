"""Recall of random routing at the same total cost as a routed row, router included: by counted FLOPs or measured time.

Random routing needs no router, so at equal exit shares it is cheaper; at equal cost it can send more images to full depth. Its
recall there is interpolated between the rows of random routing, single exits and full depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class CostPoint:
    """A run without a router: its costs as fractions of the baseline's, and its recall [1 + R] on resamples."""

    counted: float
    measured: float | None
    values: np.ndarray


def recall_at_flops(points: Sequence[CostPoint], counted: float) -> np.ndarray:
    """Returns recall [1 + R] at a counted cost: linear between adjacent points, constant beyond the outermost ones."""
    points = sorted(points, key=lambda point: point.counted)
    costs = np.array([point.counted for point in points])
    if counted <= costs[0] or counted >= costs[-1]:
        return points[0 if counted <= costs[0] else -1].values
    above = int(np.searchsorted(costs, counted))
    part = (counted - costs[above - 1]) / (costs[above] - costs[above - 1])
    return (1 - part) * points[above - 1].values + part * points[above].values


def recall_at_time(points: Sequence[CostPoint], measured: float) -> np.ndarray | None:
    """Returns recall [1 + R] at a measured time, which a linear fit of the points' times on FLOPs converts to FLOPs.

    Single times are too noisy to interpolate. Full depth, the most expensive point, keeps its own time, since it needs no
    queues. Returns None if times do not increase with FLOPs, or if fewer than two points are timed.
    """
    timed = [point for point in points if point.measured is not None]
    full = max(points, key=lambda point: point.counted)
    if full.measured is not None and measured >= full.measured:
        return full.values
    if len(timed) < 2:
        return None
    slope, start = np.polyfit([point.counted for point in timed], [point.measured for point in timed], 1)
    return recall_at_flops(points, (measured - start) / slope) if slope > 0 else None


def smooth_times(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns the rows of one run with the times of routed rows replaced by a linear fit on FLOPs, per router.

    The budgets of a router differ in how many images leave early, so time grows with FLOPs, but single times are noisy;
    `recall_at_time` uses the same fit for random routing. With fewer than three timed budgets, times are unchanged.
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

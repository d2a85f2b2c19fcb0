"""Cost and recall of router settings, the cost-recall frontier, and search over settings.

A setting is a tuple of thresholds. An exit that no image takes is not used. Recall is R@5, mean of both directions, with every
image at the exit its score routes it to, in the resulting mixed gallery.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from icar_jax.evaluation.metrics.retrieval import Distractors, Ranks, recall
from icar_jax.evaluation.routing.assignments import ranks_mixed
from icar_jax.evaluation.routing.thresholds import thresholds_for_shares
from icar_jax.inference.budgets import Costs
from icar_jax.inference.router import assign
from icar_jax.models.reduction.routes import in_cost_order

RECALL_AT = 5
FINE, COARSE = 100, 20  # grid steps of the searched shares, for one early exit and for more
EXHAUSTIVE = 2  # largest number of early exits for exhaustive grid search
_AT_ONCE = 128  # settings ranked per pass


@dataclass(frozen=True)
class Point:
    """One setting with its cost and recall.

    share: exit -> fraction of the images. cost: name -> mean cost as a fraction of full depth, router included. recall: R@5
    in percent, mean of both directions.
    """

    thresholds: tuple[float, ...]
    share: dict[int, float]
    cost: dict[str, float]
    recall: float


AnyPoint = TypeVar("AnyPoint", bound=Point)


@dataclass
class Bench:
    """Embedded images and captions on which settings are evaluated.

    by_exit: exit -> [N, D]; texts: [M, D]; caption_image: [M]; scores: [N] complexity.
    costs: name ('counted', 'measured') -> `Costs`.
    far_by_exit, far_scores, distractors: the distractors, which are routed like the base images.
    """

    by_exit: Mapping[int, np.ndarray]
    texts: np.ndarray
    caption_image: np.ndarray
    scores: np.ndarray
    costs: Mapping[str, Costs]
    far_by_exit: Mapping[int, np.ndarray] | None = None
    far_scores: np.ndarray | None = None
    distractors: Distractors | None = None
    mesh: Any = None
    _known: dict[tuple[float, ...], Point] = field(default_factory=dict, repr=False)

    @property
    def exits(self) -> tuple[int, ...]:
        return in_cost_order(self.by_exit)

    def thresholds(self, cumulative: Sequence[float]) -> tuple[float, ...]:
        """Returns thresholds with which a fraction cumulative[i] of the images leaves at exit i or earlier."""
        return thresholds_for_shares(self.scores, np.diff([0.0, *cumulative, 1.0]))

    def ranks(self, settings: Sequence[Sequence[float]]) -> list[Ranks]:
        """Ranks the queries of both directions under each setting."""
        scores = self.scores if self.far_scores is None else np.concatenate([self.scores, self.far_scores])
        exits = np.stack([assign(scores, self.exits, limits) for limits in settings])
        more = {"far_by_exit": self.far_by_exit, "distractors": self.distractors, "mesh": self.mesh}
        return ranks_mixed(self.by_exit, self.texts, self.caption_image, exits, **more)

    def points(self, settings: Sequence[Sequence[float]]) -> list[Point]:
        """Returns cost and recall of each setting; results are cached, so no setting is ranked twice."""
        wanted = [tuple(float(t) for t in limits) for limits in settings]
        new = [limits for limits in dict.fromkeys(wanted) if limits not in self._known]
        for start in range(0, len(new), _AT_ONCE):
            part = new[start : start + _AT_ONCE]
            for limits, found in zip(part, self.ranks(part)):
                self._known[limits] = self._point(limits, found)
        return [self._known[limits] for limits in wanted]

    def _point(self, limits: tuple[float, ...], found: Ranks) -> Point:
        taken = assign(self.scores, self.exits, limits)
        share = {e: float(np.mean(taken == e)) for e in self.exits}
        both = recall(found, RECALL_AT)
        cost = {name: costs.share_of_full(share) for name, costs in self.costs.items()}
        return Point(limits, share, cost, sum(both.values()) / len(both))

    @property
    def full(self) -> Point:
        """The setting with every image at full depth, router cost included."""
        return self.points([self.thresholds([0.0] * (len(self.exits) - 1))])[0]

    @property
    def known(self) -> list[Point]:
        """All settings evaluated so far."""
        return list(self._known.values())

    @property
    def tried(self) -> int:
        return len(self._known)


def sweep(bench: Bench, steps: int = COARSE) -> list[Point]:
    """Evaluates every pair of exits at increasing shares, to plot the range of what thresholds can reach."""
    early = len(bench.exits) - 1
    settings = []
    for i, j in itertools.combinations(range(early + 1), 2):
        for part in np.arange(steps + 1) / steps:
            # A fraction `part` leaves at exit i, the rest at exit j.
            settings.append(bench.thresholds([0.0] * i + [part] * (j - i) + [1.0] * (early - j)))
    return bench.points(list(dict.fromkeys(settings)))


def frontier(points: Sequence[AnyPoint], cost: str) -> list[AnyPoint]:
    """Returns the Pareto-optimal points in recall and cost, by increasing cost."""
    best: list[AnyPoint] = []
    for point in sorted(points, key=lambda p: (p.cost[cost], -p.recall)):
        if not best or point.recall > best[-1].recall:
            best.append(point)
    return best


def cheapest(bench: Bench, max_drop: float, cost: str) -> Point:
    """Returns the cheapest setting whose mean R@5 is at most `max_drop` points below full depth; see `_best`.

    Ties go to the higher recall. Full depth is among the settings, so there is always a result.
    """
    lowest = bench.full.recall - max_drop - 1e-9
    return _best(bench, lambda p: (p.recall < lowest, p.cost[cost], -p.recall))


def best_within(bench: Bench, budget: float, cost: str) -> Point:
    """Returns the setting with the highest mean R@5 that costs at most `budget` times full depth; ties go to the cheapest.

    The budget must allow the first exit for every image, router included; otherwise no setting meets it. See `_best`.
    """
    return _best(bench, lambda p: (p.cost[cost] > budget + 1e-9, -p.recall, p.cost[cost]))


def _best(bench: Bench, key: Callable[[Point], tuple]) -> Point:
    """Returns the setting that minimises `key`; full depth is always a candidate.

    One or two early exits: exhaustive search over cumulative shares on a grid of 1/FINE or 1/COARSE. More: coordinate search
    on the coarse grid, started from each single exit and from full depth; each threshold in turn moves to its best value
    until none moves, which gives a local optimum.
    """
    early, found = len(bench.exits) - 1, bench.full
    if early <= EXHAUSTIVE:
        n = FINE if early == 1 else COARSE
        grid = np.arange(n + 1) / n
        settings = [bench.thresholds(c) for c in itertools.combinations_with_replacement(grid, early)]
        return min([*bench.points(list(dict.fromkeys(settings))), found], key=key)
    grid = np.arange(COARSE + 1) / COARSE
    for alone in range(early + 1):
        place = [0.0] * alone + [1.0] * (early - alone)
        (now,) = bench.points([bench.thresholds(place)])
        while True:
            before = list(place)
            for i in range(early):
                low, high = (place[i - 1] if i else 0.0), (place[i + 1] if i + 1 < early else 1.0)
                tries = [[*place[:i], float(g), *place[i + 1 :]] for g in grid if low <= g <= high]
                points = bench.points([bench.thresholds(t) for t in tries])
                best = min(range(len(tries)), key=lambda j: key(points[j]))
                if key(points[best]) < key(now):
                    now, place = points[best], tries[best]
            if place == before:
                break
        found = min(found, now, key=key)
    return found

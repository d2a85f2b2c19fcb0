"""Complexity-aware routing: the score of an image selects how many blocks of the tower run.

Images wait in one queue per exit and leave as full batches of static shape; what is left at the end is padded to a few sizes,
and results return in the order the images came in.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from icar_jax.inference.forward import Forward, Pending

MAX_IN_FLIGHT = 4  # batches handed to the device before the oldest result is fetched


def assign(scores: np.ndarray, exits: Sequence[int], thresholds: Sequence[float]) -> np.ndarray:
    """scores [N] -> executed blocks int [N]: an image runs past exit i only where its score is above thresholds[i].

    `exits` ascend and end with full depth; there is one threshold, ascending, for each exit but the last.
    Raises ValueError where they do not fit or a score is not finite.
    """
    check_thresholds(exits, thresholds)
    scores = np.asarray(scores, np.float32)
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} complexity scores are not finite")
    limits = np.asarray(thresholds, np.float32)  # float32 as the scores: a score equal to its limit stays early
    return np.asarray(exits)[np.searchsorted(limits, scores, side="left")]


def check_thresholds(exits: Sequence[int], thresholds: Sequence[float]) -> None:
    """Raises ValueError unless there is one finite, ascending threshold for each exit but the last."""
    if list(exits) != sorted(set(exits)):
        raise ValueError(f"exits {tuple(exits)} must ascend")
    if len(thresholds) != len(exits) - 1:
        raise ValueError(f"exits {tuple(exits)} need {len(exits) - 1} thresholds, found {len(thresholds)}")
    if not np.isfinite(thresholds).all() or list(thresholds) != sorted(thresholds):
        raise ValueError(f"thresholds {tuple(thresholds)} must be finite and ascend")


@dataclass(frozen=True)
class Routed:
    """Embeddings float32 [N, D], unit norm; scores float32 [N]; exits int [N], the executed blocks of each image."""

    embeddings: np.ndarray
    scores: np.ndarray
    exits: np.ndarray

    def share(self, exits: Sequence[int]) -> dict[str, float]:
        """{executed blocks: fraction of the images}."""
        return {str(e): float(np.mean(self.exits == e)) for e in exits}


class InFlight:
    """Batches handed to the device, and the rows that have come back, by the position of their images."""

    def __init__(self):
        self._flying: list[tuple[list[int], Pending]] = []
        self._done: dict[int, np.ndarray] = {}

    def add(self, positions: list[int], pending: Pending) -> None:
        """Takes one more batch; waits for the oldest where too many are under way."""
        self._flying.append((positions, pending))
        while len(self._flying) > MAX_IN_FLIGHT:
            self._land()

    def embeddings(self, count: int, embed_dim: int) -> np.ndarray:
        """Waits for all of them: float32 [count, embed_dim], in the order of the positions."""
        while self._flying:
            self._land()
        out = np.zeros((count, embed_dim), np.float32)
        for position, row in self._done.items():
            out[position] = row
        return out

    def _land(self) -> None:
        positions, pending = self._flying.pop(0)
        self._done.update(zip(positions, pending.result(), strict=True))


class Router:
    """Routes batches of prepared images through `scorer` and then through one of `towers`.

    Args:
        towers: executed blocks -> Forward of that depth; the deepest is full depth.
        scorer: Forward that gives a complexity in [0, 1] for each image.
        thresholds: as for `assign`.
        batch_size: images in a full batch of a queue.
    """

    def __init__(
        self, towers: Mapping[int, Forward], scorer: Forward, thresholds: Sequence[float], batch_size: int
    ):
        self.exits = tuple(sorted(towers))
        check_thresholds(self.exits, thresholds)
        self._towers, self._scorer = towers, scorer
        self.thresholds = tuple(float(t) for t in thresholds)
        self._batch_size = batch_size

    def warm_up(self) -> None:
        """Nothing to compile: the towers and the scorer are compiled on their own."""

    def embed(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], embed_dim: int) -> Routed:
        """batches of (tower pixels [n, S, S, 3], scorer pixels [n, T, T, 3]), uint8 -> Routed over all of them.

        The score of a batch is computed while the towers still work on earlier ones.
        """
        queues: dict[int, list[tuple[int, np.ndarray]]] = {e: [] for e in self.exits}
        flying = InFlight()
        scores: list[np.ndarray] = []
        seen = 0

        def send(exit: int, items: list[tuple[int, np.ndarray]]) -> None:
            positions = [position for position, _ in items]
            flying.add(positions, self._towers[exit].submit(np.stack([pixels for _, pixels in items])))

        for tower_pixels, scorer_pixels in batches:
            if not len(tower_pixels):
                continue
            batch_scores = self._scorer(scorer_pixels)
            scores.append(batch_scores)
            for row, exit in enumerate(assign(batch_scores, self.exits, self.thresholds)):
                queue = queues[int(exit)]
                queue.append((seen + row, tower_pixels[row].copy()))  # a view would keep its whole batch alive
                if len(queue) == self._batch_size:
                    send(int(exit), queue)
                    queues[int(exit)] = []
            seen += len(tower_pixels)
        for exit, queue in queues.items():
            if queue:
                send(exit, queue)
        all_scores = np.concatenate(scores) if scores else np.zeros(0, np.float32)
        return Routed(flying.embeddings(seen, embed_dim), all_scores, assign(all_scores, self.exits, self.thresholds))

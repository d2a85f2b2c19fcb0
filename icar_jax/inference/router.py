"""Complexity-aware routing: the score of an image selects how many blocks of the tower run.

Images wait in one queue per exit and leave as full batches of static shape; what is left at the end is padded to a few sizes,
and results return in the order the images came in. Scores are asked for some batches ahead of the towers, and a thread fetches
what the device has done, so that the device always has work waiting.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from icar_jax.errors import ModelError
from icar_jax.inference.fetch_queue import FetchQueue, Stats
from icar_jax.inference.forward import Forward, Pending, count_compilations, padded_rows

SCORES_AHEAD = 3  # batches whose scores are asked for before the oldest of them is routed


def assign(scores: np.ndarray, exits: Sequence[int], thresholds: Sequence[float]) -> np.ndarray:
    """scores [N] -> executed blocks int [N]: an image runs past exit i only where its score is above thresholds[i].

    `exits` ascend and end with full depth; there is one threshold, ascending, for each exit but the last.
    Raises ModelError where they do not fit or a score is not finite.
    """
    check_thresholds(exits, thresholds)
    scores = np.asarray(scores, np.float32)
    if not np.isfinite(scores).all():
        raise ModelError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} complexity scores are not finite")
    limits = np.asarray(thresholds, np.float32)  # float32 as the scores: a score equal to its limit stays early
    return np.asarray(exits)[np.searchsorted(limits, scores, side="left")]


def check_thresholds(exits: Sequence[int], thresholds: Sequence[float]) -> None:
    """Raises ModelError unless there is one finite, ascending threshold for each exit but the last."""
    if list(exits) != sorted(set(exits)):
        raise ModelError(f"exits {tuple(exits)} must ascend")
    if len(thresholds) != len(exits) - 1:
        raise ModelError(f"exits {tuple(exits)} need {len(exits) - 1} thresholds, found {len(thresholds)}")
    if not np.isfinite(thresholds).all() or list(thresholds) != sorted(thresholds):
        raise ModelError(f"thresholds {tuple(thresholds)} must be finite and ascend")


@dataclass(frozen=True)
class RoutingResult:
    """What routing gives for N images, in the order they came in.

    Attributes:
        embeddings: float32 [N, D], unit norm.
        scores: complexity float32 [N]; nan where nothing was scored.
        exits: int [N], the executed blocks of each image.
        seconds: float64 [N], each image's share of the time in which the device was busy with its score and with its tower.
        stats: of the whole run.
    """

    embeddings: np.ndarray
    scores: np.ndarray
    exits: np.ndarray
    seconds: np.ndarray
    stats: Stats

    def share(self, exits: Sequence[int]) -> dict[str, float]:
        """{executed blocks: fraction of the images}."""
        return {str(e): float(np.mean(self.exits == e)) for e in exits}


class RoutingRun:
    """One run of a router: what was scored and sent, and what has come back. Used as a context manager."""

    def __init__(self):
        self.stats = Stats()
        self._landing = FetchQueue()
        self._towers: list[tuple[int, list[int], Future]] = []
        self._scored: list[tuple[np.ndarray, float]] = []

    def __enter__(self) -> RoutingRun:
        self._start = time.perf_counter()
        self._counter = count_compilations()
        self._compiled = self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._landing.__exit__(*error)
        self._counter.__exit__(*error)

    def inputs(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; what waiting for them takes is noted."""
        iterator = iter(batches)
        while True:
            with self._timed("input_s"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def score(self, pending: Pending, buckets: tuple[int, ...]) -> Future:
        """Notes scores that the device is at work on; `scores` waits for them."""
        rows = sum(n for _, n in pending.parts)
        self.stats.score_padding += padded_rows(rows, buckets)
        return self._landing.add(pending)

    def scores(self, future: Future) -> np.ndarray:
        """float32 [n] of a Future that `score` gave; called once for each, in their order."""
        with self._timed("wait_s"):
            scores, seconds = future.result()
        self.scored(scores, seconds)
        return scores

    def scored(self, scores: np.ndarray, seconds: float) -> None:
        """Notes scores that took so many seconds."""
        self._scored.append((scores, seconds))
        self.stats.score_s += seconds

    def send(self, exit: int, positions: list[int], start: Callable[[], Pending], buckets: tuple[int, ...]) -> None:
        """Starts a tower batch once there is room for one more; its rows are the images at `positions`."""
        with self._timed("wait_s"):
            self._landing.wait_for_room()
        pending, stats = start(), self.stats
        stats.rows[exit] = stats.rows.get(exit, 0) + len(positions)
        stats.padding[exit] = stats.padding.get(exit, 0) + padded_rows(len(positions), buckets)
        self._towers.append((exit, positions, self._landing.add(pending, bounded=True)))

    def finish(self, embed_dim: int) -> RoutingResult:
        """Waits for everything and puts it into order."""
        scores = np.concatenate([s for s, _ in self._scored]) if self._scored else np.zeros(0, np.float32)
        seconds = np.concatenate([np.full(len(s), t / max(1, len(s))) for s, t in self._scored] or [np.zeros(0)])
        embeddings, exits = np.zeros((len(scores), embed_dim), np.float32), np.zeros(len(scores), int)
        for exit, positions, future in self._towers:
            with self._timed("wait_s"):
                rows, took = future.result()
            embeddings[positions], exits[positions] = rows, exit
            seconds[positions] += took / len(positions)
            self.stats.tower_s += took
        self.stats.total_s = time.perf_counter() - self._start
        self.stats.compilations = self._compiled()
        return RoutingResult(embeddings, scores, exits, seconds, self.stats)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        setattr(self.stats, name, getattr(self.stats, name) + time.perf_counter() - start)


@dataclass
class _Queue:
    """The images that wait for one exit: their pixels, one after the other, and which images they are."""

    pixels: np.ndarray
    positions: list[int] = field(default_factory=list)


class Router:
    """Routes batches of prepared images through `scorer` and then through one of `towers`.

    Args:
        towers: executed blocks -> Forward of that depth; the deepest is full depth.
        scorer: Forward that gives a complexity in [0, 1] for each image, or any function that does.
        thresholds: as for `assign`.
        batch_size: images in a full batch of a queue.
    """

    def __init__(self, towers: Mapping[int, Forward], scorer: Any, thresholds: Sequence[float], batch_size: int):
        self.exits = tuple(sorted(towers))
        check_thresholds(self.exits, thresholds)
        self._towers, self._scorer = towers, scorer
        self.thresholds = tuple(float(t) for t in thresholds)
        self._batch_size = batch_size

    def at(self, thresholds: Sequence[float]) -> Router:
        """The same with other thresholds; it shares everything that was compiled."""
        return Router(self._towers, self._scorer, thresholds, self._batch_size)

    def warm_up(self) -> None:
        """Nothing to compile: the towers and the scorer are compiled on their own."""

    def embed(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], embed_dim: int) -> RoutingResult:
        """batches of (tower pixels [n, S, S, 3], scorer pixels [n, T, T, 3]), uint8 -> Routed over all of them.

        Scores are computed SCORES_AHEAD batches before the towers need them, and the towers work meanwhile.
        """
        with RoutingRun() as run:
            queues: dict[int, _Queue] = {}
            ahead: deque[tuple[np.ndarray, Any]] = deque()
            seen = 0
            for pixels, scorer_pixels in run.inputs(batches):
                if not len(pixels):
                    continue
                ahead.append((pixels, self._submit(run, scorer_pixels)))
                if len(ahead) > SCORES_AHEAD:
                    seen += self._enqueue(run, queues, *ahead.popleft(), seen)
            while ahead:
                seen += self._enqueue(run, queues, *ahead.popleft(), seen)
            for exit, queue in queues.items():
                self._send(run, exit, queue)
            return run.finish(embed_dim)

    def _submit(self, run: RoutingRun, pixels: np.ndarray) -> Any:
        if isinstance(self._scorer, Forward):
            return run.score(self._scorer.submit(pixels), self._scorer.buckets)
        start = time.perf_counter()
        return np.asarray(self._scorer(pixels), np.float32), time.perf_counter() - start

    def _enqueue(self, run: RoutingRun, queues: dict[int, _Queue], pixels: np.ndarray, submitted: Any, first: int) -> int:
        """Puts a batch whose first image is the `first` of the run into the queues; full ones leave. Returns its images."""
        if isinstance(submitted, Future):
            scores = run.scores(submitted)
        else:
            scores, seconds = submitted
            run.scored(scores, seconds)
        exits = assign(scores, self.exits, self.thresholds)
        for exit in np.unique(exits).tolist():
            rows = np.flatnonzero(exits == exit)
            while len(rows):
                if exit not in queues:
                    # Never a buffer that was sent: the device may still read it.
                    queues[exit] = _Queue(np.empty((self._batch_size, *pixels.shape[1:]), pixels.dtype))
                queue = queues[exit]
                start = len(queue.positions)
                now, rows = rows[: self._batch_size - start], rows[self._batch_size - start :]
                np.take(pixels, now, axis=0, out=queue.pixels[start : start + len(now)])
                queue.positions += (first + now).tolist()
                if len(queue.positions) == self._batch_size:
                    self._send(run, exit, queues.pop(exit))
        return len(pixels)

    def _send(self, run: RoutingRun, exit: int, queue: _Queue) -> None:
        tower, n = self._towers[exit], len(queue.positions)
        run.send(exit, queue.positions, lambda: tower.submit(queue.pixels[:n]), tower.buckets)


class OneExit:
    """As `Router`, but every image runs to the same exit and none is scored."""

    def __init__(self, exit: int, tower: Forward):
        self.exits, self.thresholds = (exit,), ()
        self._tower = tower

    def embed(self, batches: Iterable[tuple[np.ndarray, Any]], embed_dim: int) -> RoutingResult:
        """batches of (tower pixels uint8 [n, S, S, 3], ignored) -> Routed over all of them; its scores are nan."""
        (exit,), tower = self.exits, self._tower
        with RoutingRun() as run:
            seen = 0
            for pixels, _ in run.inputs(batches):
                if not len(pixels):
                    continue
                run.scored(np.full(len(pixels), np.nan, np.float32), 0.0)
                positions = list(range(seen, seen + len(pixels)))
                run.send(exit, positions, lambda: tower.submit(pixels), tower.buckets)
                seen += len(pixels)
            return run.finish(embed_dim)

"""Complexity-aware routing: the score of an image selects how many blocks of the tower run.

Images are queued per exit and run as full batches of static shape; the last ones are padded to a few sizes. Results are
returned in input order. Scores are computed several batches ahead of the towers, and a thread fetches results from the
device, so that the device always has queued work.
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

from icar_jax import profiling
from icar_jax.errors import ModelError
from icar_jax.inference.fetch_queue import FetchQueue, RoutingStats
from icar_jax.inference.forward import Forward, PendingBatch, count_compilations, padded_rows
from icar_jax.models.reduction.routes import in_cost_order

SCORES_AHEAD = 3  # batches scored in advance before the oldest of them is routed


def assign(scores: np.ndarray, exits: Sequence[int], thresholds: Sequence[float]) -> np.ndarray:
    """Executed blocks int [N] of images with scores [N]: an image runs past exits[i] if its score exceeds thresholds[i].

    `exits` ascend and end with full depth; `thresholds` ascend, one for every exit except the last.
    Raises ModelError if they are invalid or a score is not finite.
    """
    check_thresholds(exits, thresholds)
    scores = np.asarray(scores, np.float32)
    if not np.isfinite(scores).all():
        raise ModelError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} complexity scores are not finite")
    limits = np.asarray(thresholds, np.float32)  # float32 like the scores: a score equal to its threshold exits early
    return np.asarray(exits)[np.searchsorted(limits, scores, side="left")]


def check_thresholds(exits: Sequence[int], thresholds: Sequence[float]) -> None:
    """Raises ModelError unless exits ascend and every exit except the last has one finite, ascending threshold."""
    if len(set(exits)) != len(exits) or tuple(exits) != in_cost_order(exits):
        raise ModelError(f"exits {tuple(exits)} must ascend")
    if len(thresholds) != len(exits) - 1:
        raise ModelError(f"exits {tuple(exits)} need {len(exits) - 1} thresholds, found {len(thresholds)}")
    if not np.isfinite(thresholds).all() or list(thresholds) != sorted(thresholds):
        raise ModelError(f"thresholds {tuple(thresholds)} must be finite and ascend")


@dataclass(frozen=True)
class RoutingResult:
    """Embeddings, scores and exits of N images, in input order.

    Attributes:
        embeddings: float32 [N, D], unit norm.
        scores: complexity float32 [N]; nan if not scored.
        exits: int [N], executed blocks.
        seconds: float64 [N], each image's equal share of the device time of its scoring batch and its tower batch.
        stats: counts and timings of the whole run.
    """

    embeddings: np.ndarray
    scores: np.ndarray
    exits: np.ndarray
    seconds: np.ndarray
    stats: RoutingStats

    def share(self, exits: Sequence[int]) -> dict[str, float]:
        """{executed blocks: fraction of the images}."""
        return {str(e): float(np.mean(self.exits == e)) for e in exits}


class RoutingRun:
    """State of one routing run: scores, dispatched tower batches and statistics. Use it as a context manager."""

    def __init__(self):
        self.stats = RoutingStats()
        self._fetches = FetchQueue()
        self._towers: list[tuple[int, list[int], Future]] = []
        self._scored: list[tuple[np.ndarray, float]] = []

    def __enter__(self) -> RoutingRun:
        self._start = time.perf_counter()
        self._counter = count_compilations()
        self._compiled = self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._fetches.__exit__(*error)
        self._counter.__exit__(*error)
        if error[0] is not None:  # `finish` has not added up the towers
            ended = (future for *_, future in self._towers if not future.cancelled() and future.exception() is None)
            self.stats.tower_s = sum(future.result()[1] for future in ended)
        profiling.device_wait(self.stats.wait_s, self.stats.tower_s, self.stats.score_s)

    def inputs(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yields the batches and records the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            with self._timed("input_s"):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def add_scores(self, pending: PendingBatch, buckets: tuple[int, ...]) -> Future:
        """Queues scores that the device is computing; returns a Future for `wait_scores`."""
        rows = sum(n for _, n in pending.parts)
        self.stats.score_padding += padded_rows(rows, buckets)
        return self._fetches.add(pending)

    def wait_scores(self, future: Future) -> np.ndarray:
        """Scores float32 [n] of a Future from `add_scores`; call it once per Future, in order."""
        with self._timed("wait_s"):
            scores, seconds = future.result()
        self.record_scores(scores, seconds)
        return scores

    def record_scores(self, scores: np.ndarray, seconds: float) -> None:
        """Records scores float32 [n] that took `seconds` to compute."""
        self._scored.append((scores, seconds))
        self.stats.score_s += seconds

    def submit_tower(
        self, exit: int, positions: list[int], start: Callable[[], PendingBatch], buckets: tuple[int, ...]
    ) -> None:
        """Calls `start` to dispatch a tower batch once fewer than MAX_IN_FLIGHT are running; `positions` are its images."""
        with self._timed("wait_s"):
            self._fetches.wait_for_room()
        pending, stats = start(), self.stats
        stats.rows[exit] = stats.rows.get(exit, 0) + len(positions)
        stats.padding[exit] = stats.padding.get(exit, 0) + padded_rows(len(positions), buckets)
        self._towers.append((exit, positions, self._fetches.add(pending, bounded=True)))

    def finish(self, embed_dim: int) -> RoutingResult:
        """Waits for all batches and returns the results in input order."""
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
    """Images waiting for one exit: their pixels and their positions in the input."""

    pixels: np.ndarray
    positions: list[int] = field(default_factory=list)


class Router:
    """Routes batches of preprocessed images through `scorer` and then through one of `towers`.

    Args:
        towers: executed blocks, or route, -> Forward of that exit; routes ascend in cost. The last is full depth.
        scorer: Forward or plain function from images to complexity float32 [n] in [0, 1].
        thresholds: as for `assign`.
        batch_size: images in a full batch of a queue.
    """

    def __init__(self, towers: Mapping[int, Forward], scorer: Any, thresholds: Sequence[float], batch_size: int):
        self.exits = in_cost_order(towers)
        check_thresholds(self.exits, thresholds)
        self._towers, self._scorer = towers, scorer
        self.thresholds = tuple(float(t) for t in thresholds)
        self._batch_size = batch_size

    def at(self, thresholds: Sequence[float]) -> Router:
        """The same router with other thresholds; shares all compiled programs."""
        return Router(self._towers, self._scorer, thresholds, self._batch_size)

    def warm_up(self) -> None:
        """Does nothing: the towers and the scorer are compiled separately."""

    def embed_batches(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], embed_dim: int) -> RoutingResult:
        """RoutingResult of uint8 batches (tower pixels [n, S, S, 3], scorer pixels [n, T, T, 3]).

        Scores are computed SCORES_AHEAD batches before they are needed, while the towers run.
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
            return run.add_scores(self._scorer.submit(pixels), self._scorer.buckets)
        start = time.perf_counter()
        return np.asarray(self._scorer(pixels), np.float32), time.perf_counter() - start

    def _enqueue(self, run: RoutingRun, queues: dict[int, _Queue], pixels: np.ndarray, submitted: Any, first: int) -> int:
        """Queues a batch whose first image has position `first` and dispatches full queues; returns its number of images."""
        if isinstance(submitted, Future):
            scores = run.wait_scores(submitted)
        else:
            scores, seconds = submitted
            run.record_scores(scores, seconds)
        exits = assign(scores, self.exits, self.thresholds)
        for exit in np.unique(exits).tolist():
            rows = np.flatnonzero(exits == exit)
            while len(rows):
                if exit not in queues:
                    # A new buffer: the device may still be reading the previous one.
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
        run.submit_tower(exit, queue.positions, lambda: tower.submit(queue.pixels[:n]), tower.buckets)


class OneExit:
    """A router that runs every image to one exit without scoring."""

    def __init__(self, exit: int, tower: Forward):
        self.exits, self.thresholds = (exit,), ()
        self._tower = tower

    def embed_batches(self, batches: Iterable[tuple[np.ndarray, Any]], embed_dim: int) -> RoutingResult:
        """RoutingResult of batches (tower pixels uint8 [n, S, S, 3], ignored); scores are nan."""
        (exit,), tower = self.exits, self._tower
        with RoutingRun() as run:
            seen = 0
            for pixels, _ in run.inputs(batches):
                if not len(pixels):
                    continue
                run.record_scores(np.full(len(pixels), np.nan, np.float32), 0.0)
                positions = list(range(seen, seen + len(pixels)))
                run.submit_tower(exit, positions, lambda: tower.submit(pixels), tower.buckets)
                seen += len(pixels)
            return run.finish(embed_dim)

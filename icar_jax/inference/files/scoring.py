"""Complexity scores of image files, decoded on threads ahead of the model, in order and in bounded memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from icar_jax.checkpoint import CheckpointError
from icar_jax.data.images import Preprocess, decode
from icar_jax.errors import ModelError
from icar_jax.inference.forward import Forward, count_compilations
from icar_jax.inference.model import Model
from icar_jax.inference.reading import BadFile, map_ordered, read_or_bad
from icar_jax.inference.router import assign


@dataclass(frozen=True)
class ScoreRow:
    """One scored file.

    Attributes:
        score: complexity in [0, 1]; higher is more complex.
        exit: executed blocks selected by the thresholds of a bundle; None without a bundle.
        milliseconds: wall time of reading, decoding and resizing this file on its thread, plus an equal share of the wall time
            of scoring its batch (including padding, excluding compilation). Threads decode in parallel and while the model
            runs, so the column sums to more than the duration of the run.
    """

    file: str
    score: float
    exit: int | None
    milliseconds: float


@dataclass(frozen=True)
class _Prepared:
    file: str
    pixels: np.ndarray
    seconds: float


def require_scorer(model: Model) -> None:
    """Raises CheckpointError for a model that cannot score."""
    if model.scorer is None:
        raise CheckpointError(
            f"{model.path} is a CLIP and cannot score complexity; pass a complexity checkpoint, or combine the two with "
            "`icar bundle`"
        )


def score_files(model: Model, paths: Iterable[str | os.PathLike], *, threads: int = 0) -> Iterator[ScoreRow | BadFile]:
    """Yields a ScoreRow or a BadFile for each path, in order; use `data.sources.files.ImagePaths` for folders and patterns.

    Unreadable files take no place in a batch, so only the last batch is ragged and only the shapes of `Forward` compile.
    `paths` is read about two batches ahead. `threads` decode images; 0 means one per core, up to 8.
    Raises CheckpointError for a CLIP without a complexity model, and ModelError for a non-finite score.
    """
    require_scorer(model)
    waiting: list[_Prepared | BadFile] = []  # in order, until a batch is full
    ready = 0
    preprocess = model.scorer.preprocess

    def read(path: str | os.PathLike) -> _Prepared | BadFile:
        return read_or_bad(os.fspath(path), lambda path: _prepare(path, preprocess))

    for item in map_ordered(read, paths, ahead=2 * model.batch_size, threads=threads):
        waiting.append(item)
        ready += isinstance(item, _Prepared)
        # Bad files are also yielded when no readable file follows to fill a batch.
        if ready == model.batch_size or (not ready and len(waiting) >= model.batch_size):
            yield from _scored(model, waiting)
            waiting, ready = [], 0
    yield from _scored(model, waiting)


def _prepare(path: str, preprocess: Preprocess) -> _Prepared:
    start = time.perf_counter()
    pixels = preprocess.resize(decode(path, at_least=preprocess.decoded_side))
    return _Prepared(path, pixels, time.perf_counter() - start)


def _scored(model: Model, items: list[_Prepared | BadFile]) -> Iterator[ScoreRow | BadFile]:
    good = [item for item in items if isinstance(item, _Prepared)]
    if good:
        scores, seconds = _timed(model.scorer.forward, np.stack([item.pixels for item in good]))
        if not np.isfinite(scores).all():
            file = good[int(np.argmin(np.isfinite(scores)))].file
            raise ModelError(f"the score of {file} is not finite; the complexity model of {model.scorer.path} is broken")
        exits = assign(scores, model.exits, model.thresholds).tolist() if model.thresholds is not None else [None] * len(good)
        results = iter(zip(scores, exits, strict=True))
    for item in items:
        if isinstance(item, BadFile):
            yield item
        else:
            score, exit = next(results)
            # str gives the shortest decimal that round-trips this float32.
            yield ScoreRow(item.file, float(str(score)), exit, 1000 * (item.seconds + seconds / len(good)))


def _timed(forward: Forward, pixels: np.ndarray) -> tuple[np.ndarray, float]:
    """Scores [n] and the seconds they took; reruns the batch if a program was compiled, to time it without compilation."""
    while True:
        with count_compilations() as compiled:
            start = time.perf_counter()
            scores = forward(pixels)
            seconds = time.perf_counter() - start
            if not compiled():
                return scores, seconds

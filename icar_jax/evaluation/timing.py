"""Measured speed: images per second of each static exit and of routing, on prepared images held in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from icar_jax.inference.model import Model
from icar_jax.inference.router import Router

SAMPLE = 512  # images that are timed; a larger gallery tells no more
REPEATS = 3  # the fastest counts: other work on the machine only ever adds time


@dataclass(frozen=True)
class Sample:
    """Prepared images of the gallery: uint8 [n, S, S, 3] for the towers and for the complexity model."""

    clip: np.ndarray
    complexity: np.ndarray | None


def measure(model: Model, sample: Sample, exits: np.ndarray | None) -> dict[str, float]:
    """images/s by run: 'full', 'exit_<blocks>', and with a router also 'routed' and 'random' (the same share).

    exits: [n] executed blocks of the sample's images under routing; None where nothing is routed.
    Compilation is left out, the router's own time counted. The runs take turns, so that a slow moment of the machine
    does not fall on one of them alone.
    """
    model.warm_up()
    batches = _batches(sample, model.batch_size)
    runs: dict[str, Callable[[], object]] = {}
    for exit in model.exits:
        name = "full" if exit == model.exits[-1] else f"exit_{exit}"
        runs[name] = lambda tower=model.towers[exit]: tower(sample.clip)
    if exits is not None:
        runs["routed"] = lambda: model.router.embed(batches, model.embed_dim)
        limits = np.cumsum([np.mean(exits == e) for e in model.exits])[:-1]
        rng = np.random.default_rng(0)
        dice = Router(model.towers, lambda pixels: rng.random(len(pixels), np.float32), limits, model.batch_size)
        runs["random"] = lambda: dice.embed(batches, model.embed_dim)
    best = dict.fromkeys(runs, np.inf)
    for _ in range(REPEATS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return {name: len(sample.clip) / seconds for name, seconds in best.items()}


def _batches(sample: Sample, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    if sample.complexity is None:
        return []
    starts = range(0, len(sample.clip), size)
    return [(sample.clip[i : i + size], sample.complexity[i : i + size]) for i in starts]

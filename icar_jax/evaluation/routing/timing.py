"""Measures throughput of every run and a breakdown of the time, on preprocessed images in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.records import Source
from icar_jax.errors import DataError
from icar_jax.inference.budgets import ABOVE_ALL, Costs
from icar_jax.inference.forward import bucket_sizes, count_compilations, split_batch
from icar_jax.inference.model import Model
from icar_jax.inference.router import Router
from icar_jax.models.clip import Clip
from icar_jax.models.ops import normalise

SAMPLE = 512  # number of timed images
DECODED = 48  # number of images whose decoding is timed
REPEATS = 3  # the fastest repetition counts, since other load on the machine only adds time
COST_REPEATS = 5  # repetitions for costs used to choose thresholds; the median counts

Name = TypeVar("Name", str, int)  # of a timed function, such as a run or an exit


@dataclass(frozen=True)
class Sample:
    """Preprocessed images of the gallery: uint8 [n, S, S, 3] for the towers and for the complexity model."""

    clip: np.ndarray
    complexity: np.ndarray | None


@dataclass(frozen=True)
class Padding:
    """Rows that a router computes only to fill batches.

    rows: their number; share: their fraction of all rows; ms: their time per image, at each exit's time per row.
    """

    rows: int
    share: float
    ms: float


@dataclass
class Timing:
    """Milliseconds per image of each stage of an evaluation, without compilation.

    images, repeats: timed images, and repetitions, of which the fastest counts.
    decode_ms, preprocess_ms: reading images, and resizing them for every model, on one thread.
    tower_ms: exit -> embedding.
    router_ms: complexity score; None without a router. A head that shares the tower's blocks has no score alone: its time is
        that of routing, from `measured_costs`.
    text_ms: embedding, per caption.
    padding: of the routed images; None without routing.
    compile_s, programs: seconds to compile all programs, and their number; None until they are known.
    """

    images: int
    repeats: int
    decode_ms: float
    preprocess_ms: float
    tower_ms: dict[int, float]
    router_ms: float | None
    text_ms: float
    padding: Padding | None
    compile_s: float | None = None
    programs: int | None = None


def sample_of(model: Model, source: Source, n: int = SAMPLE, loading: Mapping[str, Any] | None = None) -> Sample:
    """Preprocesses the first n readable images of a source for a model. Raises DataError if there is none."""
    kept: dict[str, list[np.ndarray]] = {key: [] for key in model.preprocesses}
    with eval_batches(source, model.preprocesses, batch_size=model.batch_size, **(loading or {})) as batches:
        for batch in batches:
            for key, pixels in batch["images"].items():
                kept[key].append(pixels)
            if sum(map(len, kept["clip"])) >= n:
                break
    if not sum(map(len, kept["clip"])):
        raise DataError(f"no image of {source.name} could be read")
    sample = {key: np.concatenate(parts)[:n] for key, parts in kept.items()}
    return Sample(sample["clip"], sample.get(model.scored_on))


def warm_up(model: Model) -> tuple[float, int]:
    """Compiles all programs and returns the seconds it took and their number."""
    start = time.perf_counter()
    with count_compilations() as compiled:
        model.warm_up()
        return time.perf_counter() - start, compiled()


def throughput(
    model: Model,
    sample: Sample,
    exits: np.ndarray | None,
    settings: Mapping[str, Sequence[float]] | None = None,
    static: tuple[Model, Sample] | None = None,
    repeats: int = REPEATS,
    random_assignments: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """Returns images/s per run: 'full', 'exit_<blocks>', and with a router 'routed', 'random' (same shares) and `settings`.

    exits: [n] executed blocks of the sample's images under routing; None without routing.
    settings: additional routed runs, name -> thresholds.
    static: another model and its preprocessed sample, for the run 'static' at its full depth.
    repeats: repetitions of each run; the fastest counts.
    random_assignments: additional runs like 'random', name -> exits [n] whose shares are randomly assigned.
    Times exclude compilation and include the router. Repetitions of all runs are interleaved, so that a temporary slowdown
    of the machine does not affect one run only.
    """
    model.warm_up()
    batches = _batches(sample, model.batch_size)
    runs: dict[str, Callable[[], object]] = {}
    for exit in model.exits:
        name = "full" if exit == model.exits[-1] else f"exit_{exit}"
        runs[name] = lambda tower=model.towers[exit]: tower(sample.clip)
    if exits is not None:
        routers = {"routed": model.router, **{name: model.router.at(limits) for name, limits in (settings or {}).items()}}
        routers |= {
            name: _random_router(model, taken) for name, taken in {"random": exits, **(random_assignments or {})}.items()
        }
        for name, router in routers.items():
            runs[name] = lambda router=router: router.embed_batches(batches, model.embed_dim)
    if static is not None:
        small, pixels = static[0], static[1].clip
        small.warm_up_embed(small.exits[-1])
        runs["static"] = lambda: small.towers[small.exits[-1]](pixels)
    seconds = _interleaved(runs, repeats)
    return {name: len(sample.clip) / min(taken) for name, taken in seconds.items()}


def _random_router(model: Model, exits: np.ndarray) -> Router:
    """Returns a router with random scores and the exit shares of exits [n]."""
    limits = np.cumsum([np.mean(exits == e) for e in model.exits])[:-1]
    rng = np.random.default_rng(0)
    return Router(model.towers, lambda pixels: rng.random(len(pixels), np.float32), limits, model.batch_size)


def measured_costs(model: Model, sample: Sample) -> Costs:
    """Returns median seconds per image of every exit and of the router, over interleaved repetitions.

    The router's time is the time to route all images to the first exit minus the time of that exit alone, so it includes
    scoring, queues and copies. This covers separate complexity models and heads that share the tower's first blocks.
    """
    model.warm_up()
    batches = _batches(sample, model.batch_size)
    first = model.router.at((ABOVE_ALL,) * (len(model.exits) - 1))
    runs: dict[str, Callable[[], object]] = {str(e): lambda e=e: model.towers[e](sample.clip) for e in model.exits}
    runs["router"] = lambda: first.embed_batches(batches, model.embed_dim)
    median = {name: float(np.median(taken)) / len(sample.clip) for name, taken in _interleaved(runs, COST_REPEATS).items()}
    exits = {e: median[str(e)] for e in model.exits}
    return Costs(exits, max(0.0, median["router"] - exits[model.exits[0]]))


def time_breakdown(model: Model, sample: Sample, source: Source, texts: Sequence[str], exits: np.ndarray | None) -> Timing:
    """Times each stage of an evaluation separately. `router_ms` is None for a head that shares the tower."""
    model.warm_up()
    towers = {e: lambda e=e: model.towers[e](sample.clip) for e in model.exits}
    n, taken = len(sample.clip), _interleaved(towers, REPEATS)
    tower_ms = {e: 1e3 * min(seconds) / n for e, seconds in taken.items()}
    decode_ms, preprocess_ms = _decoding(model, source)
    router_ms = None
    if exits is not None and sample.complexity is not None and model.scored_on == "complexity":
        scored = _interleaved({"router": lambda: model.scorer.forward(sample.complexity)}, REPEATS)["router"]
        router_ms = 1e3 * min(scored) / len(sample.complexity)
    some = list(texts[:SAMPLE])
    text_ms = 1e3 * min(_interleaved({"text": lambda: model.encode_text(some)}, REPEATS)["text"]) / len(some)
    padded = padding(exits, tower_ms, model.batch_size) if exits is not None else None
    return Timing(n, REPEATS, decode_ms, preprocess_ms, tower_ms, router_ms, text_ms, padded)


def padding(exits: np.ndarray, tower_ms: Mapping[int, float], batch_size: int) -> Padding:
    """Returns the padding that a router computes for images [n] at these exits, because queues end in partial batches."""
    rows, ms = 0, 0.0
    for exit, count in zip(*np.unique(exits, return_counts=True)):
        thrown = sum(bucket - used for _, used, bucket in split_batch(int(count), bucket_sizes(batch_size)))
        rows += thrown
        ms += thrown * tower_ms[int(exit)]
    return Padding(rows, rows / (rows + len(exits)), ms / len(exits))


def compiler_flops(model: Model, exit: int, *, optimised: bool = False) -> float | None:
    """Returns FLOPs of one image through an exit from XLA's cost analysis; None if the backend does not report them.

    Analyses the lowered program, or the compiled one if `optimised`. XLA also counts norms, activations and softmax, which
    `models.flops` omits. It counts loop bodies once, but these towers have no loops.
    """
    p, clip = model.preprocess, Clip.graph(model.graph.arch)  # in float32
    shape = jax.ShapeDtypeStruct((1, p.image_size, p.image_size, 3), jnp.uint8)
    forward = jax.jit(lambda params, images: clip.encode_image(params, normalise(images, p.mean, p.std), exit))
    program = forward.lower(clip.shapes, shape)
    cost = (program.compile() if optimised else program).cost_analysis()
    cost = cost[0] if isinstance(cost, (list, tuple)) else cost
    return float(cost["flops"]) if cost and cost.get("flops", 0) > 0 else None


def _decoding(model: Model, source: Source) -> tuple[float, float]:
    """Returns milliseconds per image for decoding and preprocessing on one thread; unreadable files are skipped."""
    some = np.unique(np.linspace(0, len(source) - 1, min(DECODED, len(source))).astype(int)).tolist()
    decode, prepare, done = 0.0, 0.0, 0
    for index in some:
        start = time.perf_counter()
        try:
            picture = source[index].image()
        except (OSError, ValueError):
            continue
        middle = time.perf_counter()
        for preprocess in model.preprocesses.values():
            preprocess.resize(picture)
        decode, prepare, done = decode + middle - start, prepare + time.perf_counter() - middle, done + 1
    return 1e3 * decode / max(1, done), 1e3 * prepare / max(1, done)


def _interleaved(runs: Mapping[Name, Callable[[], object]], repeats: int) -> dict[Name, list[float]]:
    """Returns the seconds of each repetition. Each round runs in a new random order, so periodic load affects no single run."""
    taken: dict[Name, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        for name in rng.permutation(list(runs)).tolist():
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


def _batches(sample: Sample, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    # A head that shares the tower's blocks has no pixel input of its own.
    scored = sample.clip if sample.complexity is None else sample.complexity
    return [(sample.clip[i : i + size], scored[i : i + size]) for i in range(0, len(sample.clip), size)]

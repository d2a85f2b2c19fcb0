"""Measured speed: images per second of every run, and where the time goes, on prepared images held in memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.records import Source
from icar_jax.errors import DataError
from icar_jax.inference.budgets import ABOVE_ALL, Costs
from icar_jax.inference.forward import bucket_sizes, count_compilations, cut
from icar_jax.inference.model import Model
from icar_jax.inference.router import Router
from icar_jax.models.clip import Clip
from icar_jax.models.ops import normalise

SAMPLE = 512  # images that are timed; a larger gallery tells no more
DECODED = 48  # images whose decoding is timed
REPEATS = 3  # the fastest counts: other work on the machine only ever adds time
COST_REPEATS = 5  # of the costs that thresholds are chosen by, of which the median counts


@dataclass(frozen=True)
class Sample:
    """Prepared images of the gallery: uint8 [n, S, S, 3] for the towers and for the complexity model."""

    clip: np.ndarray
    complexity: np.ndarray | None


def sample_of(model: Model, source: Source, n: int = SAMPLE, loading: Mapping[str, Any] | None = None) -> Sample:
    """The first n images of a source that can be read, prepared for a model. Raises DataError where there is none."""
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


def warm_up(model: Model) -> dict[str, float]:
    """Compiles everything before it is used: 'compile_s', the seconds that takes, and 'programs', how many there were."""
    start = time.perf_counter()
    with count_compilations() as compiled:
        model.warm_up()
        return {"compile_s": time.perf_counter() - start, "programs": compiled()}


def measure(
    model: Model,
    sample: Sample,
    exits: np.ndarray | None,
    settings: Mapping[str, Sequence[float]] | None = None,
    static: tuple[Model, Sample] | None = None,
    repeats: int = REPEATS,
    dice: Mapping[str, np.ndarray] | None = None,
) -> dict[str, float]:
    """images/s by run: 'full', 'exit_<blocks>', and with a router also 'routed', 'random' (the same share) and `settings`.

    exits: [n] executed blocks of the sample's images under routing; None where nothing is routed.
    settings: further runs of the router, name -> thresholds.
    static: another model and the same images as it takes them, for the run 'static' at its full depth.
    repeats: of each run, of which the fastest counts.
    dice: further runs like 'random', name -> exits [n] whose shares are dealt out.
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
        routers = {"routed": model.router, **{name: model.router.at(limits) for name, limits in (settings or {}).items()}}
        routers |= {name: _dice(model, taken) for name, taken in {"random": exits, **(dice or {})}.items()}
        for name, router in routers.items():
            runs[name] = lambda router=router: router.embed(batches, model.embed_dim)
    if static is not None:
        small, pixels = static[0], static[1].clip
        small.warm_up_embed(small.exits[-1])
        runs["static"] = lambda: small.towers[small.exits[-1]](pixels)
    seconds = _in_turns(runs, repeats)
    return {name: len(sample.clip) / min(taken) for name, taken in seconds.items()}


def _dice(model: Model, exits: np.ndarray) -> Router:
    """A router that draws its scores, with the shares of exits [n]."""
    limits = np.cumsum([np.mean(exits == e) for e in model.exits])[:-1]
    rng = np.random.default_rng(0)
    return Router(model.towers, lambda pixels: rng.random(len(pixels), np.float32), limits, model.batch_size)


def measured_costs(model: Model, sample: Sample) -> Costs:
    """Seconds per image of every exit and of the router, medians over repetitions that take turns.

    The router's time is what routing all images to the first exit takes beyond that exit alone: its score, the queues and
    the copies. So it holds for a complexity model of its own as for a head on the tower's first blocks.
    """
    model.warm_up()
    batches = _batches(sample, model.batch_size)
    first = model.router.at((ABOVE_ALL,) * (len(model.exits) - 1))
    runs: dict[str, Callable[[], object]] = {str(e): lambda e=e: model.towers[e](sample.clip) for e in model.exits}
    runs["router"] = lambda: first.embed(batches, model.embed_dim)
    median = {name: float(np.median(taken)) / len(sample.clip) for name, taken in _in_turns(runs, COST_REPEATS).items()}
    exits = {e: median[str(e)] for e in model.exits}
    return Costs(exits, max(0.0, median["router"] - exits[model.exits[0]]))


def split(model: Model, sample: Sample, source: Source, texts: Sequence[str], exits: np.ndarray | None) -> dict[str, Any]:
    """Where the time of an evaluation goes, apart from one another.

    Returns milliseconds per image 'decode_ms' and 'preprocess_ms' (one thread), 'router_ms' (score alone; None without, and
    where it is a head on the tower, of which `measured_costs` tells what it adds) and 'tower_ms' {exit -> ms}; 'text_ms' per
    caption; 'padding' of the routed sample: 'rows' computed and thrown away, their 'share' of all rows, and the 'ms' per image
    that they take. Compilation is left out.
    """
    model.warm_up()
    towers = {str(e): lambda e=e: model.towers[e](sample.clip) for e in model.exits}
    taken = {name: min(each) for name, each in _in_turns(towers, REPEATS).items()}
    n = len(sample.clip)
    found: dict[str, Any] = {"images": n, "repeats": REPEATS}
    found |= _decoding(model, source)
    found["tower_ms"] = {name: 1e3 * seconds / n for name, seconds in taken.items()}
    found["router_ms"] = None
    if exits is not None and sample.complexity is not None and model.scored_on == "complexity":
        scored = _in_turns({"router": lambda: model.scorer.forward(sample.complexity)}, REPEATS)["router"]
        found["router_ms"] = 1e3 * min(scored) / len(sample.complexity)
    some = list(texts[:SAMPLE])
    found["text_ms"] = 1e3 * min(_in_turns({"text": lambda: model.encode_text(some)}, REPEATS)["text"]) / len(some)
    found["padding"] = padding(exits, found["tower_ms"], model.batch_size) if exits is not None else None
    return found


def padding(exits: np.ndarray, tower_ms: Mapping[str, float], batch_size: int) -> dict[str, float]:
    """Rows that a router computes and throws away for images [n] at these exits, where queues end in part-filled batches.

    Returns 'rows', their 'share' of all rows, and 'ms' per image, at each exit's time for a row that counts.
    """
    rows, ms = 0, 0.0
    for exit, count in zip(*np.unique(exits, return_counts=True)):
        thrown = sum(bucket - used for _, used, bucket in cut(int(count), bucket_sizes(batch_size)))
        rows += thrown
        ms += thrown * tower_ms[str(exit)]
    return {"rows": rows, "share": rows / (rows + len(exits)), "ms": ms / len(exits)}


def compiler_flops(model: Model, exit: int, *, optimised: bool = False) -> float | None:
    """FLOPs of one image through an exit as XLA's cost analysis counts them; None where the backend does not tell.

    Of the program as it was lowered, or as it was compiled (`optimised`, which takes a compilation). XLA also counts norms,
    activations and softmax, which `models.flops` leaves out, and counts the body of a loop once; these towers have none.
    """
    p, clip = model.preprocess, Clip.graph(model.graph.arch)  # in float32
    shape = jax.ShapeDtypeStruct((1, p.image_size, p.image_size, 3), jnp.uint8)
    forward = jax.jit(lambda params, images: clip.encode_image(params, normalise(images, p.mean, p.std), exit))
    program = forward.lower(clip.shapes, shape)
    cost = (program.compile() if optimised else program).cost_analysis()
    cost = cost[0] if isinstance(cost, (list, tuple)) else cost
    return float(cost["flops"]) if cost and cost.get("flops", 0) > 0 else None


def _decoding(model: Model, source: Source) -> dict[str, float]:
    """Milliseconds per image on one thread; files that cannot be read count for nothing."""
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
    return {"decode_ms": 1e3 * decode / max(1, done), "preprocess_ms": 1e3 * prepare / max(1, done)}


def _in_turns(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition. Every turn has an order of its own: what comes and goes with the turns hits no run always."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    rng = np.random.default_rng(0)
    for _ in range(repeats):
        for name in rng.permutation(list(runs)).tolist():
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
    return taken


def _batches(sample: Sample, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    # A head on the tower's own blocks takes no pixels of its own.
    scored = sample.clip if sample.complexity is None else sample.complexity
    return [(sample.clip[i : i + size], scored[i : i + size]) for i in range(0, len(sample.clip), size)]

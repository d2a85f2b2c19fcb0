"""Embeddings of a gallery at every exit, their ranks, and what an exit costs."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from experiments.frozen_towers.rows import Row
from icar_jax import checkpoint
from icar_jax.config import from_dict
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import flops
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.reduction_plan import reduced_vision

BATCH = 50


@dataclass(frozen=True)
class Embedded:
    """Unit-norm embeddings of N images at every exit, and of their M captions.

    by_exit: {executed blocks: float32 [N, D]}; texts: float32 [M, D]; owner: int64 [M], the image of each caption.
    """

    by_exit: dict[int, np.ndarray]
    texts: np.ndarray
    owner: np.ndarray


@dataclass(frozen=True)
class Tower:
    """A trained CLIP as the rows read it: its graph, parameters, preprocessing and tokenizer."""

    graph: Graph[Clip]
    params: Mapping
    preprocess: Preprocess
    tokenizer: Tokenizer


def arch_of(model: Path, row: Row | None = None) -> ClipArch:
    """The architecture of the checkpoint `model`; a `row` that is not trained has its reduction put into the tower."""
    arch = from_dict(checkpoint.describe(model)["arch"], ClipArch, f"{model}: arch")
    if row is None or row.trained:
        return arch
    return dataclasses.replace(arch, vision=reduced_vision(arch.vision, row.reduce, share=row.share))


def read(model: Path, row: Row | None = None) -> Tower:
    """Reads the checkpoint `model` with the architecture of `arch_of`."""
    found = checkpoint.read(model, "clip")
    preprocess = Preprocess.from_dict(found.description["preprocess"])
    return Tower(Clip.graph(arch_of(model, row)), found.params, preprocess, Tokenizer.from_json(found.tokenizer))


def embed(tower: Tower, source: Source) -> Embedded:
    """Embeds every image of `source` at every exit, in one pass, and every caption."""
    p, parts, captions = tower.preprocess, [], []
    run = jax.jit(lambda params, pixels: tower.graph.encode_image_exits(params, normalise(pixels, p.mean, p.std)))
    with eval_batches(source, {"clip": tower.preprocess}, batch_size=BATCH) as batches:
        for batch in tqdm(batches, total=-(-len(source) // BATCH), desc="embed images", unit="batch"):
            pixels = batch["images"]["clip"]
            filled = np.concatenate([pixels, np.zeros((BATCH - len(pixels), *pixels.shape[1:]), pixels.dtype)])
            parts.append({exit: np.asarray(z)[: len(pixels)] for exit, z in run(tower.params, filled).items()})
            captions.extend(batch["captions"])
    by_exit = {exit: np.concatenate([part[exit] for part in parts]) for exit in parts[0]}
    owner = np.repeat(np.arange(len(captions)), [len(group) for group in captions])
    return Embedded(by_exit, embed_texts(tower, [text for group in captions for text in group]), owner)


def embed_texts(tower: Tower, texts: Sequence[str], batch: int = 500) -> np.ndarray:
    """float32 [M, D], unit norm."""
    run = jax.jit(tower.graph.encode_text)
    tokens = tower.tokenizer.encode(list(texts), tower.graph.arch.text.context_length)[0]
    found = []
    for start in range(0, len(tokens), batch):
        some = tokens[start : start + batch]
        filled = np.concatenate([some, np.repeat(some[:1], batch - len(some), 0)])
        found.append(np.asarray(run(tower.params, filled))[: len(some)])
    return np.concatenate(found)


def counted(arch: ClipArch, whole: ClipArch) -> dict[int, float]:
    """{executed blocks: FLOPs of an image, as a share of those of `whole` at full depth}."""
    full = flops.vision_flops(whole.vision)
    return {exit: flops.vision_flops(arch.vision, exit) / full for exit in arch.vision.all_exits}


def seconds(towers: Mapping[str, tuple[Tower, int]], images: int = 32, repeats: int = 5) -> dict[str, float]:
    """{name: median seconds an image} of encoding at one exit; the repetitions of all take turns."""
    pixels = np.random.default_rng(0).integers(0, 255, (images, 1, 1, 3), np.uint8)
    runs, placed = {}, {}
    for name, (tower, exit) in towers.items():
        p, side = tower.preprocess, tower.preprocess.image_size
        one = lambda params, x, t=tower, e=exit, p=p: t.graph.encode_image(params, normalise(x, p.mean, p.std), e)
        x = np.broadcast_to(pixels, (images, side, side, 3)).copy()
        compiled = jax.jit(one).lower(tower.params, x).compile()
        if id(tower) not in placed:
            placed[id(tower)] = jax.device_put(tower.params)
        runs[name] = lambda f=compiled, params=placed[id(tower)], x=x: jax.block_until_ready(f(params, x))
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first run warms up
                taken[name].append((time.perf_counter() - start) / images)
    return {name: float(np.median(values)) for name, values in taken.items()}

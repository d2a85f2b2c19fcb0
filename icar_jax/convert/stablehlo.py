"""`icar export --to stablehlo`: writes every part of a model as a program that JAX runs without this package.

    DEST/
      icar.json              the programs with their inputs and outputs, preprocessing, exits and thresholds
      image_<exit>.stablehlo one for each exit: jax.export's serialised StableHLO, stable for years by its compatibility promise
      text.stablehlo, complexity.stablehlo   where the checkpoint has these parts
      clip.safetensors, complexity.safetensors, tokenizer.json

A program is called with the weights of its file as a flat dict and one batch. Weights are not part of it, so that five exits of
a ViT-L/14 do not take five times its 1.2 GB. Attention is XLA's even if a GPU exports: calls of cuDNN are not stable.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint
from icar_jax.config import from_dict
from icar_jax.convert.export import ExportResult, new_folder
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.hub import card
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.ops import normalise, xla_attention
from icar_jax.models.token_router import BlocksArch, scorer_arch, scorer_class

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
DTYPES = ("float32", "bfloat16")
SUFFIX = ".stablehlo"


@dataclass(frozen=True)
class _Program:
    """A function `fn(params, batch)` and its entry in icar.json; `shape` is that of one row of the batch."""

    name: str
    fn: Callable[[pytree.Tree, jax.Array], jax.Array]
    part: str
    shape: tuple[int, ...]
    dtype: Any
    output: str
    exit: int | None = None


def export_programs(
    source: str | os.PathLike,
    dest: str | os.PathLike,
    *,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    batch: int | None = None,
    dtype: str = "float32",
) -> ExportResult:
    """Writes the programs of a CLIP, a complexity model or a bundle into the new folder `dest`.

    Inputs are prepared uint8 pixels [B, S, S, 3] or int32 tokens [B, L]; outputs are float32 embeddings [B, D] or scores [B],
    computed in `dtype`. The batch size B is free, unless `batch` fixes it. Raises ConvertError for unknown platforms and
    dtypes, and where `dest` exists.
    """
    unknown = [name for name in platforms if name not in PLATFORMS]
    if unknown or not platforms:
        raise ConvertError(f"--platforms {' '.join(platforms)} must be some of {', '.join(PLATFORMS)}")
    if batch is not None and batch < 1:
        raise ConvertError(f"--batch={batch} must be at least 1; leave it out and any batch size fits")
    if dtype not in DTYPES:
        raise ConvertError(f"--dtype={dtype} must be one of {', '.join(DTYPES)}")
    folder = checkpoint.find(source, ("clip", "complexity", "bundle"))
    description = checkpoint.describe(folder)
    bundle = description["kind"] == "bundle"
    parts = {
        part: checkpoint.read(folder / part if bundle else folder, part)
        for part in ("clip", "complexity")
        if bundle or part == description["kind"]
    }
    with new_folder(Path(dest)) as staging:
        programs = [program for part, loaded in parts.items() for program in PARTS[part](loaded, jnp.dtype(dtype))]
        entries = {}
        for program in tqdm(programs, desc="export", unit=" programs"):
            params = parts[program.part].params
            (staging / f"{program.name}{SUFFIX}").write_bytes(_serialised(program, params, tuple(platforms), batch))
            entries[program.name] = _entry(program, batch)
        for part, loaded in parts.items():
            shutil.copyfile(loaded.path / checkpoint.WEIGHTS, staging / f"{part}.safetensors")
            if loaded.tokenizer is not None:
                (staging / checkpoint.TOKENIZER).write_text(loaded.tokenizer, encoding="utf-8")
        about = {
            "format": checkpoint.FORMAT,
            "kind": "stablehlo",
            "programs": entries,
            "platforms": list(platforms),
            "dtype": dtype,
            "preprocess": {part: loaded.description["preprocess"] for part, loaded in parts.items()},
            "identity": {part: checkpoint.identity(loaded.description) for part, loaded in parts.items()},
            "jax": jax.__version__,
        }
        if parts.get("clip") and parts["clip"].tokenizer is not None:
            t = Tokenizer.from_json(parts["clip"].tokenizer)
            about["tokens"] = {"start_id": t.start_id, "end_id": t.end_id, "pad_id": t.pad_id}
        if bundle:
            about["routing"] = description["routing"]
        lacking = "clip" in parts and parts["clip"].tokenizer is None
        notes = ["the checkpoint holds no tokenizer, so none was written"] if lacking else []
        (staging / card.FILE).write_text(card.of_checkpoint(folder, "stablehlo", notes), encoding="utf-8")
        (staging / checkpoint.DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return ExportResult(Path(dest), sorted(file.name for file in Path(dest).iterdir()), notes)


def _clip_programs(loaded: Checkpoint, dtype: Any) -> Iterator[_Program]:
    arch = from_dict(loaded.description["arch"], ClipArch, f"{loaded.path}: arch")
    clip, p = Clip.graph(arch, dtype=dtype, attention=xla_attention), Preprocess.from_dict(loaded.description["preprocess"])
    pytree.require_same(clip.shapes, loaded.params, str(loaded.path))
    side, output = p.image_size, f"float32 [batch, {arch.vision.embed_dim}], unit norm"

    def image(exit: int) -> Callable[[pytree.Tree, jax.Array], jax.Array]:
        return lambda params, pixels: clip.encode_image(params, normalise(pixels, p.mean, p.std), exit)

    for exit in arch.vision.all_exits:
        yield _Program(f"image_{exit}", image(exit), "clip", (side, side, 3), np.uint8, output, exit)
    length = arch.text.context_length
    yield _Program("text", clip.encode_text, "clip", (length,), np.int32, output)


def _complexity_programs(loaded: Checkpoint, dtype: Any) -> Iterator[_Program]:
    arch = scorer_arch(loaded.description["arch"], f"{loaded.path}: arch")
    attention = {"attention": xla_attention} if isinstance(arch, BlocksArch) else {}
    scorer = scorer_class(arch).graph(arch, dtype=dtype, **attention)
    pytree.require_same(scorer.shapes, loaded.params, str(loaded.path))
    p = Preprocess.from_dict(loaded.description["preprocess"])
    shape, output = (p.image_size, p.image_size, 3), "float32 [batch], complexity in [0, 1]"
    score = lambda params, pixels: scorer.score(params, normalise(pixels, p.mean, p.std))
    yield _Program("complexity", score, "complexity", shape, np.uint8, output)


PARTS: dict[str, Callable[[Checkpoint, Any], Iterator[_Program]]] = {
    "clip": _clip_programs,
    "complexity": _complexity_programs,
}


def _serialised(program: _Program, params: pytree.Tree, platforms: tuple[str, ...], batch: int | None) -> bytes:
    rows = batch or jax.export.symbolic_shape("batch")[0]
    flat = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in pytree.flatten(params).items()}
    jitted = jax.jit(lambda leaves, rows: program.fn(pytree.unflatten(leaves), rows))
    shape = jax.ShapeDtypeStruct((rows, *program.shape), program.dtype)
    return bytes(jax.export.export(jitted, platforms=platforms)(flat, shape).serialize())


def _entry(program: _Program, batch: int | None) -> dict[str, Any]:
    sizes = ", ".join(map(str, (batch or "batch", *program.shape)))
    what = "token ids; see 'tokens'" if program.name == "text" else "prepared pixels, RGB, not normalised"
    entry = {
        "file": f"{program.name}{SUFFIX}",
        "weights": f"{program.part}.safetensors",
        "input": f"{np.dtype(program.dtype).name} [{sizes}], {what}",
        "output": program.output.replace("[batch", f"[{batch or 'batch'}"),
    }
    return entry if program.exit is None else {**entry, "exit": program.exit}

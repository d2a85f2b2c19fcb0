"""`icar join`: one CLIP from an image tower and a text tower of two models; the projections are drawn at random."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint
from icar_jax.config import from_dict
from icar_jax.convert import convert
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.hub import download as hub
from icar_jax.convert.layouts.base import Options
from icar_jax.models.clip import Clip, ClipArch, exit_sources
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

# Parameters of a tower that lead into its embedding space; a joined CLIP has its own.
_HEADS = re.compile(r"(vision|text)/(proj|proj_mlp|pooler|map|exits)/.*")


@dataclass(frozen=True)
class Joint:
    """The embedding space of a joined CLIP.

    Attributes:
        embed_dim: its dimensions.
        head: token of the image that is projected: 'cls', 'mean' (of the patches) or 'cls_mean' (both, concatenated).
        projection: 'linear', or 'linear_mlp' for a linear map plus an MLP.
        projection_width: hidden channels of the MLP; 0 without one.
        head_blocks, text_head_blocks: number of last blocks whose pooled tokens a head reads, concatenated.
        exits: numbers of blocks with a head of their own, which reads the same token as `head`.
        seed: of the projections.
    """

    embed_dim: int = 256
    head: str = "cls"
    projection: str = "linear"
    projection_width: int = 0
    exits: tuple[int, ...] = ()
    seed: int = 0
    head_blocks: int = 1
    text_head_blocks: int = 1


def join(
    image: str | os.PathLike, text: str | os.PathLike, dest: str | os.PathLike, joint: Joint = Joint(),
    image_options: Options = Options(), text_options: Options = Options(),
) -> Path:  # fmt: skip
    """Writes the CLIP of `in_memory` as a checkpoint; returns `dest`. Raises ConvertError and CheckpointError."""
    checkpoint.require_replaceable(dest, "clip")
    made = in_memory(image, text, joint, image_options, text_options)
    about = {name: made.description[name] for name in ("arch", "preprocess", "source")}
    return checkpoint.write(dest, "clip", about, made.params, made.tokenizer)


def in_memory(
    image: str | os.PathLike, text: str | os.PathLike, joint: Joint = Joint(), image_options: Options = Options(),
    text_options: Options = Options(),
) -> Checkpoint:  # fmt: skip
    """Returns the checkpoint of a CLIP with the vision tower of `image` and the text tower of `text`; leaves are float32 numpy.

    Both are checkpoints of this library, weights that `icar convert` reads, or names of such on the hub: a tower alone, or a
    CLIP, whose projections are left out. Preprocessing and tokenizer come along. Options are those of `icar convert` for
    weights of other libraries. Raises ConvertError for towers that cannot be joined, and CheckpointError.
    """
    parts = _read(image, image_options, "vision"), _read(text, text_options, "text")
    arch = _arch(parts, joint)
    params = pytree.flatten(jax.tree.map(np.asarray, Clip.init(jax.random.key(joint.seed), arch)))
    copied = {path: leaf for part in parts for path, leaf in pytree.flatten(part.params).items() if not _HEADS.fullmatch(path)}
    lacking = sorted(p for p in params if p.startswith(("vision/", "text/")) and not _HEADS.fullmatch(p) and p not in copied)
    if lacking or (strange := sorted(copied.keys() - params.keys())):
        raise ConvertError(f"the towers do not fit the joined architecture: {', '.join((lacking or strange)[:5])}")
    params |= copied
    params |= {path: params[full] for path, full in exit_sources(pytree.unflatten(params)).items()}
    tokenizer = parts[1].tokenizer
    if tokenizer is None:
        raise ConvertError(f"{text} has no tokenizer, without which the CLIP cannot encode text; pass --tokenizer FILE")
    origins = {part.kind: _origin(part) for part in parts}
    description = {
        "format": checkpoint.FORMAT,
        "kind": "clip",
        "arch": dataclasses.asdict(arch),
        "preprocess": parts[0].description["preprocess"],
        "source": {"joined": origins, "seed": joint.seed},
        "hashes": {checkpoint.WEIGHTS: f"{json.dumps([part.description['hashes'] for part in parts])} {joint}"},
    }
    return Checkpoint(Path(f"{image} + {text}"), "clip", description, pytree.unflatten(params), tokenizer)


def _read(path: str | os.PathLike, options: Options, tower: str) -> Checkpoint:
    """A checkpoint of kind `tower` with the parameters below its name. Raises ConvertError for a model without this tower."""
    path = hub.local(path)
    if not path.exists():
        raise ConvertError(f"{path} does not exist; expected a checkpoint, or weights that `icar convert` reads")
    if checkpoint.is_own(path):
        if options.given():
            named = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(options.given()))
            raise ConvertError(f"{path} is a checkpoint already and has no use for {named}; leave it out")
        folder = checkpoint.find(path, (tower, "clip", "bundle"))
        if checkpoint.describe(folder)["kind"] == "bundle":
            folder = folder / "clip"
        loaded = checkpoint.read(folder, checkpoint.describe(folder)["kind"])
    else:
        loaded = convert.in_memory(path, options)
    if loaded.kind not in (tower, "clip"):
        raise ConvertError(f"{path} is a {loaded.kind} model, expected a {tower} tower or a CLIP")
    if loaded.kind == "clip":
        about = {**loaded.description, "arch": loaded.description["arch"][tower]}
        loaded = dataclasses.replace(loaded, kind=tower, description=about, params={tower: loaded.params[tower]})
    return loaded


def _arch(parts: tuple[Checkpoint, Checkpoint], joint: Joint) -> ClipArch:
    """The architecture of the CLIP. Raises ConvertError for a joint that the towers cannot have."""
    space: dict[str, Any] = {
        "embed_dim": joint.embed_dim, "projection": joint.projection, "projection_width": joint.projection_width,
    }  # fmt: skip
    image, text = (
        from_dict(part.description["arch"], kind, f"{part.path}: arch") for part, kind in zip(parts, (VisionArch, TextArch))
    )
    if joint.embed_dim < 1:
        raise ConvertError(f"--embed-dim={joint.embed_dim} must be at least 1")
    try:
        vision = dataclasses.replace(
            image, head=joint.head, pool=joint.head, exits=tuple(sorted(joint.exits)), head_blocks=joint.head_blocks, **space
        )
        text = dataclasses.replace(text, proj_bias=False, pooler=False, head_blocks=joint.text_head_blocks, **space)
        return ClipArch(vision, text)
    except ValueError as error:
        raise ConvertError(f"{parts[0].path} and {parts[1].path} cannot be joined so: {error}") from error


def _origin(part: Checkpoint) -> dict[str, Any]:
    return {"path": str(part.path), **part.description.get("source", {})}

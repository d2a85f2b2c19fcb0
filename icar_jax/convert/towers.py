"""The vision tower of a converted model, alone or in a CLIP: its parameters, another image size, and added exits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from icar_jax import pytree
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.positions import resize_positions
from icar_jax.convert.rules import Leaf
from icar_jax.models.clip import Clip, ClipArch, exit_sources
from icar_jax.models.vision import POOLS, VisionArch, VisionTower

Arch = ClipArch | VisionArch
Leaves = dict[str, Leaf]


def shapes_of(arch: Arch) -> pytree.Tree:
    """Shapes of the parameters: a CLIP's, or {"vision": the tower's}, the names that it has in a CLIP."""
    return Clip.graph(arch).shapes if isinstance(arch, ClipArch) else {"vision": VisionTower.graph(arch).shapes}


def vision_of(arch: Arch) -> VisionArch:
    """The vision tower's architecture."""
    return arch.vision if isinstance(arch, ClipArch) else arch


def _with_vision(arch: Arch, **changes: Any) -> Arch:
    vision = dataclasses.replace(vision_of(arch), **changes)
    return dataclasses.replace(arch, vision=vision) if isinstance(arch, ClipArch) else vision


def resize(arch: Arch, leaves: Leaves, image_size: int, antialias: bool) -> tuple[Arch, Leaves, dict[str, str]]:
    """(architecture, parameters, entries for `source` of icar.json) with positions for `image_size` pixels; 0 keeps them.

    Raises ConvertError for a size that is not a multiple of the patch size.
    """
    vision = vision_of(arch)
    if not image_size or image_size == vision.image_size:
        return arch, leaves, {}
    if image_size < vision.patch_size or image_size % vision.patch_size:
        raise ConvertError(f"--image-size={image_size} is not a multiple of the patch size {vision.patch_size}")
    grid, old = image_size // vision.patch_size, leaves["vision/pos"]
    new = Leaf(
        (grid * grid + vision.class_token, vision.width),
        old.sources,
        lambda: resize_positions(np.asarray(old), grid, vision.class_token, antialias),
    )
    how = "bicubic, antialiased" if antialias else "bicubic"
    note = {"positions": f"resized from {vision.grid} x {vision.grid} to {grid} x {grid}, {how}"}
    return _with_vision(arch, image_size=image_size), {**leaves, "vision/pos": new}, note


def add_exits(arch: Arch, leaves: Leaves, exits: tuple[int, ...], pool: str) -> tuple[Arch, Leaves]:
    """Exit heads that are initialised from the head of the full tower, in a CLIP each with its own temperature.

    `pool` '' is the pooling at full depth. Raises ConvertError for exits or a pooling that the tower cannot have.
    """
    vision = vision_of(arch)
    pool = pool or vision.head
    if pool not in POOLS:
        raise ConvertError(f"--pool={pool} must be one of {', '.join(POOLS)}")
    try:
        arch = _with_vision(arch, exits=tuple(sorted(exits)), pool=pool)
    except ValueError as error:
        raise ConvertError(f"--exits {' '.join(map(str, exits))}: {error}") from error
    sources = exit_sources(shapes_of(arch))
    return arch, {**leaves, **{path: leaves[full] for path, full in sources.items()}}

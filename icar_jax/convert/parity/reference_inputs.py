"""The request for a reference, and its random inputs: images and captions that depend on the seed alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")
TEXT_POOLS = ("first", "mean")


@dataclass(frozen=True)
class ReferenceRequest:
    """What the user specifies where a source does not, and the number of inputs; fields as of `reference.write_reference`."""

    model_name: str
    activation: str
    heads: tuple[int, ...]
    exits: tuple[int, ...]
    image_size: int
    images: int
    seed: int
    context_length: int = 0
    text_pool: str = ""


def noise(asked: ReferenceRequest, size: int) -> np.ndarray:
    """Images float32 [N, S, S, 3] of smooth noise with 256 levels, scaled to -1..1."""
    rng = np.random.default_rng((asked.seed, 0))
    values = rng.standard_normal((asked.images, size, size, 3))
    for axis in (1, 2):  # neighbouring pixels are similar, as in photographs
        values = values + np.roll(values, 1, axis) + np.roll(values, 2, axis)
    levels = np.clip(128 + 64 * values / values.std(), 0, 255).astype(np.uint8)
    return (levels.astype(np.float32) / 255 - 0.5) / 0.5


def captions(
    asked: ReferenceRequest, context: int, vocabulary: int, *, start: int | None, end: int, pad: int, highest: bool
) -> np.ndarray:
    """Tokens int32 [N, L] of captions of varied length, the first one full; with `highest` all ids lie below `end`."""
    rng = np.random.default_rng((asked.seed, 1))
    words = np.setdiff1d(np.arange(end if highest else vocabulary), [end, pad] + ([] if start is None else [start]))
    first = [] if start is None else [start]
    room = context - len(first) - 1
    rows = np.full((asked.images, context), pad, np.int32)
    for i in range(asked.images):
        length = room if i == 0 else int(rng.integers(min(1, room), room + 1))
        caption = [*first, *rng.choice(words, length), end]
        rows[i, : len(caption)] = caption
    return rows


def nchw(torch: ModuleType, images: np.ndarray) -> Any:
    """A torch tensor [N, 3, S, S] from images [N, S, S, 3]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

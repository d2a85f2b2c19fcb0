"""Resizes position embeddings to another image resolution."""

from __future__ import annotations

import numpy as np

from icar_jax.convert.fields import ConvertError


def resize_positions(pos: np.ndarray, grid: int, class_token: bool, antialias: bool = True) -> np.ndarray:
    """Position embeddings [grid * grid (+ 1), W] from `pos` [N (+ 1), W] of a square grid, in its dtype.

    Interpolated bicubically, as PyTorch's `interpolate(mode="bicubic", align_corners=False)`. With `antialias`, as OpenCLIP and
    timm do, the kernel widens where the grid shrinks; without, as transformers does for most towers, it always reads four
    positions. The row of the class token, the first with `class_token`, is kept. Raises ConvertError for other grids.
    """
    head, patches = (pos[:1], pos[1:]) if class_token else (pos[:0], pos)
    old = round(len(patches) ** 0.5)
    if old * old != len(patches):
        raise ConvertError(f"{len(patches)} patch positions are not a square grid")
    weights = _antialiased(old, grid) if antialias else _plain(old, grid)
    planes = patches.astype(np.float64).reshape(old, old, -1)
    resized = np.einsum("ir,js,rsw->ijw", weights, weights, planes, optimize=True)
    return np.concatenate([head, resized.reshape(grid * grid, -1).astype(pos.dtype)])


def _antialiased(old: int, new: int) -> np.ndarray:
    """[new, old] interpolation weights: Keys' cubic with a = -1/2, stretched by the scale where the grid shrinks."""
    scale = old / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    weights = _cubic((np.arange(old)[None] + 0.5 - centres) / max(scale, 1.0), -0.5)
    return weights / weights.sum(axis=1, keepdims=True)


def _plain(old: int, new: int) -> np.ndarray:
    """[new, old] interpolation weights: Keys' cubic with a = -3/4; beyond the edge its value is repeated."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        at = np.floor(centres).astype(int) + tap
        np.add.at(weights, (np.arange(new), np.clip(at, 0, old - 1)), _cubic(at - centres, -0.75))
    return weights


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    d = np.abs(distance)
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d < 1, near, np.where(d < 2, far, 0))

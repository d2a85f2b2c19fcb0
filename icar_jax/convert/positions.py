"""Resizes position embeddings to another image resolution."""

from __future__ import annotations

import numpy as np

from icar_jax.convert.fields import ConvertError


def resize_positions(pos: np.ndarray, grid: int, class_token: bool) -> np.ndarray:
    """Position embeddings [grid * grid (+ 1), W] from `pos` [N (+ 1), W] of a square grid, in its dtype.

    Interpolated bicubically with antialiasing, as PyTorch's `interpolate(mode="bicubic", antialias=True, align_corners=False)`,
    which OpenCLIP uses. The row of the class token, the first with `class_token`, is kept. Raises ConvertError for other grids.
    """
    head, patches = (pos[:1], pos[1:]) if class_token else (pos[:0], pos)
    old = round(len(patches) ** 0.5)
    if old * old != len(patches):
        raise ConvertError(f"{len(patches)} patch positions are not a square grid")
    weights = _weights(old, grid)
    planes = patches.astype(np.float64).reshape(old, old, -1)
    resized = np.einsum("ir,js,rsw->ijw", weights, weights, planes, optimize=True)
    return np.concatenate([head, resized.reshape(grid * grid, -1).astype(pos.dtype)])


def _weights(old: int, new: int) -> np.ndarray:
    """[new, old] interpolation weights: Keys' cubic with a = -1/2, stretched by the scale where the grid shrinks."""
    scale = old / new
    stretch = max(scale, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * scale
    distance = np.abs((np.arange(old)[None] + 0.5 - centres) / stretch)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)

"""HiRED's two-level budget: how many tokens a whole picture and each of its tiles keep (Arif et al. 2024, arXiv:2408.10945)."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from icar_jax.models.reduction.dropping import class_attention

Array = jax.Array
ALPHA = 0.5  # share of the budget that the whole picture keeps


def first_attention(tower: Any, images: Array) -> Array:
    """images float [B, S, S, 3], normalised -> float32 [B, patches]: the class token's attention in the first block."""
    tokens, block = tower.embed(images), tower.blocks[0]
    _, q, k = block.attn.with_keys(block.ln1(tokens.values))
    first = tower.arch.prefix
    return class_attention(q, k, block.attn.heads)[:, first : first + tower.arch.grid**2]


def whole_budget(patches: int, tiles: int, rate: float, alpha: float = ALPHA) -> int:
    """Returns the patches that the whole picture keeps, of `patches` a picture; `rate` is the share kept of all pictures'."""
    return min(int(int(patches * (1 + tiles) * rate) * alpha), patches)


def tile_budgets(attention: np.ndarray, parts: np.ndarray, rate: float, alpha: float = ALPHA) -> np.ndarray:
    """Returns int [B, tiles]: the patches that each tile keeps.

    The patches of the whole picture that the class token reads most in the first block vote for the tile that shows them.
    Shares are rounded down, as in the published code.

    Args:
        attention: float [B, N], of `first_attention`.
        parts: int [N], the tile that shows each patch, from 0.
        rate: share of the patches of picture and tiles that is kept.
        alpha: share of the budget that the whole picture keeps.
    """
    patches, tiles = len(parts), int(parts.max()) + 1
    total = int(patches * (1 + tiles) * rate)
    rest = min(total - whole_budget(patches, tiles, rate, alpha), tiles * patches)
    marks = np.argsort(-attention, axis=1, kind="stable")[:, : int(patches * (1 - alpha))]
    votes = np.stack([np.bincount(parts[row], minlength=tiles) for row in marks])
    share = votes / np.maximum(votes.sum(1, keepdims=True), 1)
    return np.minimum((share * rest).astype(int), patches)


def quadrants(grid: int, rows: int, columns: int) -> np.ndarray:
    """Returns int [grid^2]: which of rows x columns tiles shows each patch of the whole picture, by its centre."""
    along = lambda count: (np.arange(grid) + 0.5) * count // grid
    return (along(rows)[:, None] * columns + along(columns)[None]).astype(int).ravel()

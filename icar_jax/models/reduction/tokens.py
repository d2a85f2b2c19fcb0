"""The tokens of a vision tower between two blocks."""

from __future__ import annotations

from typing import NamedTuple

import jax

Array = jax.Array


class Tokens(NamedTuple):
    """Tokens of a vision tower: `values` [B, L, W], and `sizes` float32 [B, L], the number of patches merged into each.

    `scores` float32 [B, L] ranks the tokens that the next block drops (reduction 'drop'); None where nothing is dropped there.
    `earlier` [B, n, P, W] are the pooled tokens after the n blocks before, ascending, which later heads read as well
    (`VisionArch.head_blocks`); None where heads read one block.
    """

    values: Array
    sizes: Array  # 1 for the class token, registers, the cross token and unmerged patches
    scores: Array | None = None
    earlier: Array | None = None

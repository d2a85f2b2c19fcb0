"""Runs the blocks of a text tower with CrossGET's token reduction.

The cross token follows the text. In each block it is the anchor, the token that is pooled, plus a trained vector; the anchor's
query guides the matching. Anchor, first and cross token never merge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from icar_jax.models.reduction.matching import complete_graph
from icar_jax.models.reduction.merging import merge
from icar_jax.models.reduction.schedule import Schedule, most_removed
from icar_jax.models.transformer import placed, run_one

Array = jax.Array
PROTECTED = 3  # first token, anchor and cross token


class TextTokens(NamedTuple):
    """Tokens of a text tower between two blocks, the last of them the cross token."""

    values: Array  # [B, N, W]
    sizes: Array  # float32 [B, N]
    anchor: Array  # int [B], place of the pooled token
    length: Array  # int [B], number of tokens before the padding


def run_reduced_text(
    tower: Any,
    x: Array,
    wanted: Iterable[int],
    anchor: Array,
    length: Array,
    schedule: Schedule,
    mask: float | None,
    apart: bool,
) -> tuple[dict[int, TextTokens], list[Array]]:
    """x [B, L, W] before the first block -> ({executed blocks: tokens}, cross token [B, W] that went into each block).

    Args:
        wanted: numbers of executed blocks after which tokens are returned.
        tower: a module with `blocks`, `execution` and `cross` [depth, W].
        anchor: int [B], place of the token that the cross token follows.
        length: int [B], number of tokens before the padding.
        schedule: number of tokens that each block merges, at most what a text of this length allows.
        mask: added to the scores of padding as a key; None masks nothing.
        apart: whether padding only merges into padding.
    """
    at = jnp.take_along_axis(x, anchor[:, None, None], axis=1)
    x = jnp.concatenate([x, at], axis=1)
    tokens, taps, crosses, wanted = TextTokens(x, jnp.ones(x.shape[:2], jnp.float32), anchor, length), {}, [], set(wanted)
    for index, block in enumerate(tower.blocks):
        asked = schedule[index] if index < len(schedule) else 0
        count = min(asked, most_removed(tokens.values.shape[1], PROTECTED))
        merged = tokens.values.shape[1] < x.shape[1]
        call = _call(count, merged, mask, apart, tower.execution)
        tokens, cross = run_one(block, index, call, (tokens, tower.cross[index]), tower.execution)
        crosses.append(cross)
        if index + 1 in wanted:
            taps[index + 1] = tokens
    return taps, crosses


def is_text(tokens: TextTokens) -> Array:
    """bool [B, N]: False for padding; the cross token counts as text."""
    place = jnp.arange(tokens.values.shape[1])[None]
    return (place < tokens.length[:, None]) | (place == tokens.values.shape[1] - 1)


def _call(count: int, merged: bool, mask: float | None, apart: bool, execution: Any) -> Any:
    def call(block: Any, state: tuple[TextTokens, Array]) -> tuple[TextTokens, Array]:
        tokens, row = state
        x, number = placed(tokens.values, execution), tokens.values.shape[1]
        at = lambda x: jnp.take_along_axis(x, tokens.anchor[:, None, None], axis=1)[:, 0]
        cross = jax.lax.stop_gradient(at(x)) + row.astype(x.dtype)[None]
        x = jnp.concatenate([x[:, :-1], cross[:, None]], axis=1)
        text, place = is_text(tokens), jnp.arange(number)[None]

        def reduce(x: Array, q: Array, k: Array) -> tuple[Array, TextTokens]:
            if not count:
                return x, tokens
            never = (place == 0) | (place == tokens.anchor[:, None]) | (place == number - 1)
            matching, importance = complete_graph(k, at(q), count, never, text if apart else None)
            x, sizes = merge(x, tokens.sizes, matching, count, importance)
            anchor = jnp.take_along_axis(matching.order, tokens.anchor[:, None], axis=1)[:, 0]
            length = (~matching.source & (place < tokens.length[:, None])).sum(1)
            return x, TextTokens(x, sizes, anchor, length)

        parts = [jnp.log(tokens.sizes)] if merged else []
        parts += [] if mask is None else [jnp.where(text, 0.0, mask)]
        x, left = block.reduced(x, reduce, None, sum(parts[1:], parts[0]) if parts else None)
        return left._replace(values=placed(x, execution)), cross

    return call

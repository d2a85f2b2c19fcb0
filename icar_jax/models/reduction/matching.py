"""Which tokens merge into which: the matchings of ToMe, PiToMe and CrossGET, without sorting. No gradient flows through them.

Ties go to the lower index. Similarities are symmetric to the last bit, because the nearest neighbour of a token's nearest
neighbour is often the token itself, and such a pair must tie.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from icar_jax.models.ops import dot_t

Array = jax.Array
_NEVER = -jnp.inf


class Matching(NamedTuple):
    """Sources and where they go, for N tokens.

    Attributes:
        source: bool [B, N], tokens that merge into others.
        target: int32 [B, N], for each source the token that it merges into, which is kept; others: any number.
        order: int32 [B, N], positions in the result of the kept tokens; sources: any number.
    """

    source: Array
    target: Array
    order: Array


def cosines(keys: Array, other: Array | None = None) -> Array:
    """keys [B, N, C] -> cosines float32 [B, N, N], symmetric to the last bit; with `other` [B, M, C] -> [B, N, M]."""
    norm = _inverse_norm(keys)
    if other is not None:
        return dot_t(keys, other, keys.dtype) * (norm[:, :, None] * _inverse_norm(other)[:, None])
    similar = dot_t(keys, keys, keys.dtype) * (norm[:, :, None] * norm[:, None])
    return jnp.maximum(similar, jnp.swapaxes(similar, 1, 2))


def _inverse_norm(keys: Array) -> Array:
    return jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(keys.astype(jnp.float32)), -1), 1e-24))


def ranks(values: Array) -> Array:
    """values [B, N] -> int32 [B, N], 0 for the largest; of equal values the first has the lower rank."""
    order = jnp.arange(values.shape[1])
    before = (values[:, None] > values[:, :, None]) | (
        (values[:, None] == values[:, :, None]) & (order[None, None] < order[None, :, None])
    )
    return before.sum(-1)


def in_order(kept: Array) -> Array:
    """bool [B, N] -> int32 [B, N]: positions of the kept tokens in their original order."""
    return jnp.cumsum(kept, axis=1) - 1


def mean_over_heads(keys: Array, heads: int) -> Array:
    """keys [B, N, W] -> [B, N, W / heads], the mean over the heads, ToMe's metric."""
    return keys.reshape(*keys.shape[:2], heads, -1).astype(jnp.float32).mean(2)


def tome(metric: Array, count: int, protected: int) -> Matching:
    """ToMe's bipartite matching (Bolya et al. 2023, arXiv:2210.09461) of `metric` [B, N, C].

    Tokens 0, 2, 4, ... look for the most similar of tokens 1, 3, 5, ...; the `count` most similar pairs merge. The first
    `protected` tokens keep their places and never merge. Order of the result: these, kept seekers, the others.
    """
    metric = jax.lax.stop_gradient(metric)
    tokens = metric.shape[1]
    seekers, others = metric[:, ::2], metric[:, 1::2]
    similar = cosines(seekers, others)
    free = jnp.arange(tokens) >= protected
    similar = jnp.where(free[::2][None, :, None] & free[1::2][None, None], similar, _NEVER)
    gone = ranks(similar.max(-1)) < count
    n = seekers.shape[1]
    place = jnp.arange(tokens)
    weave = lambda even, odd: jnp.stack([even, jnp.pad(odd, ((0, 0), (0, n - odd.shape[1])))], 2).reshape(even.shape[0], -1)
    blank = jnp.zeros(others.shape[:2], jnp.int32)
    source = weave(gone, blank.astype(bool))[:, :tokens]
    target = weave(2 * similar.argmax(-1) + 1, blank)[:, :tokens]
    first = ~source & ((place < protected) | (place % 2 == 0))[None]
    second = jnp.broadcast_to(((place >= protected) & (place % 2 == 1))[None], first.shape)
    order = jnp.where(second, first.sum(1, keepdims=True) + in_order(second), 0)
    if protected < 2:
        return Matching(source, target, jnp.where(first, in_order(first), order))
    even = first & (place >= protected)[None]  # protected tokens first, whatever their parity
    order = jnp.where(even, protected + in_order(even), order)
    return Matching(source, target, jnp.where((place < protected)[None], place[None], order))


def pitome(metric: Array, count: int, protected: int, margin: float = 0.5) -> Matching:
    """PiToMe's matching (Tran et al. 2024, arXiv:2405.16148) of `metric` [B, N, C]; the first `protected` tokens never merge.

    The energy of a token is the mean of elu(cosine - margin) over all tokens. The 2 `count` tokens of highest energy are split
    alternately, by energy, into seekers and others; each seeker merges into its most similar other. Kept tokens stay in order.
    """
    similar = cosines(jax.lax.stop_gradient(metric))
    free = (jnp.arange(metric.shape[1]) >= protected)[None]
    rank = ranks(jnp.where(free, jax.nn.elu(similar - margin).mean(-1), _NEVER))
    source, other = (rank < 2 * count) & (rank % 2 == 0), (rank < 2 * count) & (rank % 2 == 1)
    target = jnp.where(other[:, None], similar, _NEVER).argmax(-1)
    return Matching(source, target, in_order(~source))


def complete_graph(
    keys: Array, guide: Array, count: int, protected: Array, apart: Array | None = None
) -> tuple[Matching, Array]:
    """CrossGET's complete-graph soft matching, guided by the other modality (Shi et al. 2024, arXiv:2305.17455).

    Args:
        keys: [B, N, C]. guide: [B, C], the query whose cosine with a key is the importance of the token.
        count: number of sources.
        protected: bool [B, N] or [1, N], tokens that never merge.
        apart: bool [B, N]; tokens that differ in it never merge. None: all may.

    Returns (matching, importance float32 [B, N]). Kept tokens stay in order.
    """
    keys, guide = jax.lax.stop_gradient((keys, guide))
    importance = cosines(keys, guide[:, None])[:, :, 0]
    free = ~protected
    allowed = free[:, :, None] & free[:, None] & ~jnp.eye(keys.shape[1], dtype=bool)[None]
    if apart is not None:
        allowed &= apart[:, :, None] == apart[:, None]
    similar = jnp.where(allowed, cosines(keys), _NEVER)
    rank = ranks(similar.max(-1))
    # A token only looks at tokens ranked behind it, so of a mutual pair one can be a source.
    closest = jnp.where(rank[:, None] > rank[:, :, None], similar, _NEVER).max(-1)
    source = ranks(closest - importance) < count  # the smallest importance - similarity; -inf, no source, is last
    target = jnp.where(source[:, None], _NEVER, similar).argmax(-1)
    return Matching(source, target, in_order(~source)), importance

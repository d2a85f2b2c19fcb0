"""Dropping of patches (HiRED): the class token's attention says which ones are kept."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from icar_jax.models.reduction.matching import ranks
from icar_jax.models.reduction.merging import take_tokens
from icar_jax.models.reduction.tokens import Tokens

Array = jax.Array


def class_attention(queries: Array, keys: Array, heads: int) -> Array:
    """queries, keys [B, N, W] -> float32 [B, N]: attention of token 0 on every token, summed over the heads. No gradient."""
    queries, keys = jax.lax.stop_gradient((queries[:, 0], keys))
    by_head = lambda x: x.reshape(*x.shape[:-1], heads, -1)
    scores = jnp.einsum(
        "bhd,bnhd->bhn", by_head(queries), by_head(keys), preferred_element_type=jnp.float32, precision="highest"
    )
    return jax.nn.softmax(scores * (queries.shape[-1] // heads) ** -0.5, axis=-1).sum(1)


def drop(tokens: Tokens, count: int, prefix: int) -> Tokens:
    """Tokens of [B, L, W] with scores -> Tokens of [B, L - count, W]: drops the `count` patches of lowest score.

    The first `prefix` tokens are no patches and stay. Kept tokens stay in order; of equal scores the first is kept.
    """
    assert tokens.scores is not None
    length = tokens.values.shape[1]
    first = (jnp.arange(length) < prefix)[None]
    kept = ranks(jnp.where(first, jnp.inf, tokens.scores)) < length - count
    # The index of the nth kept token is the number of tokens up to which fewer than n + 1 are kept.
    index = (jnp.cumsum(kept, axis=1)[:, None] <= jnp.arange(length - count)[None, :, None]).sum(-1)
    return Tokens(take_tokens(tokens.values, index), jnp.take_along_axis(tokens.sizes, index, axis=1))

"""Merging between blocks (`merge`): similar patch tokens are averaged, so later blocks process fewer.

A variant of ToMe for towers that are trained with it, with class token, metric and place of their own; `matching.tome` is ToMe.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from icar_jax.models.reduction.tokens import Tokens

Array = jax.Array


def merge_similar(tokens: Tokens, count: int, prefix: int) -> Tokens:
    """Tokens of [B, L, W] -> Tokens of [B, L - count, W]: merges `count` patches into similar ones.

    The first `prefix` tokens, class token and registers, are no patches and stay as they are.

    Bipartite matching of ToMe (Bolya et al. 2023, arXiv:2210.09461): every second patch is matched with the most similar of
    the other patches, and the `count` most similar pairs are averaged, weighted by size. Order of the result: prefix,
    unmerged patches of the first set, patches of the second set. Two differences from ToMe: similarity is the cosine of the
    centred tokens and not of the keys, and later attention is not proportional to token size, because the tower is trained
    without that.
    """
    (x, sizes), first = tokens[:2], int(prefix)
    # Highest precision: reduced precision could reorder pairs, and would round the tokens in the sums below.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    seeker, other = (x[:, first + start :: 2].astype(jnp.float32) for start in (0, 1))
    seeker_size, other_size = (sizes[:, first + start :: 2] for start in (0, 1))
    (norm, mean), (other_norm, other_mean) = map(_scaled_mean, (seeker, other))
    similar = product("bnw,bmw->bnm", seeker, other) * norm[:, :, None] * other_norm[:, None]
    similar = jax.lax.stop_gradient(similar - mean[:, :, None] * other_mean[:, None])
    best, order = similar.max(-1), jnp.arange(seeker.shape[1])[None]
    # Ranks from pairwise comparison and merging as a matrix product, because sort and gather are slow on all devices.
    before = (best[:, :, None] < best[:, None]) | ((best[:, :, None] == best[:, None]) & (order[:, :, None] > order[:, None]))
    gone, alone = before.sum(-1) < count, order.shape[1] - count
    to = jnp.where(gone, alone + similar.argmax(-1), jnp.cumsum(~gone, axis=1) - 1)
    moves = jnp.where(to[:, None] == jnp.arange(alone + other.shape[1])[None, :, None], seeker_size[:, None], 0.0)
    total = moves.sum(-1) + jnp.pad(other_size, ((0, 0), (alone, 0)))
    moved = product("bmn,bnw->bmw", moves / total[..., None], seeker)
    joined = moved[:, alone:] + (other_size / total[:, alone:])[..., None] * other
    values = [x[:, :first], moved[:, :alone].astype(x.dtype), joined.astype(x.dtype)]
    return Tokens(jnp.concatenate(values, axis=1), jnp.concatenate([sizes[:, :first], total], axis=1))


def _scaled_mean(x: Array) -> tuple[Array, Array]:
    """x [B, N, W] -> (1 / norm of the centred tokens, mean sqrt(W) / norm), [B, N] each.

    The cosine of two centred tokens is their dot product divided by both norms, minus the product of both scaled means. This
    needs no centred copy.
    """
    width, mean, square = x.shape[-1], x.mean(-1), jnp.square(x).sum(-1)
    # For nearly constant tokens the difference is dominated by rounding; the lower bound makes their cosines close to 0.
    norm = jax.lax.rsqrt(jnp.maximum(square - width * jnp.square(mean), 1e-6 * square + 1e-12))
    return norm, mean * norm * width**0.5


def merging_error(merge: tuple[int, ...], depth: int, patches: int) -> str | None:
    """Returns why `merge` is invalid for a tower of `depth` blocks and so many `patches`; None if it is valid."""
    if len(merge) >= depth:
        return f"merge={merge} has {len(merge)} entries, but a tower of {depth} blocks can merge after at most {depth - 1}"
    for block, count in enumerate(merge, 1):
        if not 0 <= count <= patches // 2:
            return f"merge={merge} after {block} blocks: {count} must lie in 0 to {patches // 2}, half of the patches left"
        patches -= count
    return None

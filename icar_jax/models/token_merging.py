"""Token merging: patches that say the same become one on the way up the vision tower; later blocks have fewer to read."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Tokens(NamedTuple):
    """Images on their way up a vision tower: tokens `values` [B, L, W]; `sizes` [B, L], the patches each stands for."""

    values: Array
    sizes: Array  # float32; 1 for the class token and where nothing has been merged


def merge_similar(tokens: Tokens, count: int, class_token: bool) -> Tokens:
    """Tokens [B, L, W] -> the same images with `count` tokens fewer, [B, L - count, W].

    Bipartite matching of ToMe (Bolya et al. 2023, arXiv:2210.09461): every second patch looks for the most similar one among
    the others, and the `count` closest pairs become their mean, weighted by size. The class token stays, in its place; the
    patches that found no one come next, then the others. Similar is the cosine of the centred tokens, which needs no keys.
    Later attention does not weigh a token by its size, as ToMe's does for towers that are not trained to go without.
    """
    (x, sizes), first = tokens, int(class_token)
    # In full precision: accelerators would round away what tells pairs apart, and the tokens themselves in the sums below.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    seeker, other = (x[:, first + start :: 2].astype(jnp.float32) for start in (0, 1))
    seeker_size, other_size = (sizes[:, first + start :: 2] for start in (0, 1))
    (norm, mean), (other_norm, other_mean) = map(_scaled_mean, (seeker, other))
    similar = product("bnw,bmw->bnm", seeker, other) * norm[:, :, None] * other_norm[:, None]
    similar = jax.lax.stop_gradient(similar - mean[:, :, None] * other_mean[:, None])
    best, order = similar.max(-1), jnp.arange(seeker.shape[1])[None]
    # Ranks by comparing all pairs, and moves as a matrix: sorting and gathering are slow on all kinds of devices.
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
    """x [B, N, W] -> 1 / norm of the centred tokens, and mean sqrt(W) / norm, [B, N] each.

    The cosine of two centred tokens is their product over both norms, minus the product of both means: no centred copy.
    """
    width, mean, square = x.shape[-1], x.mean(-1), jnp.square(x).sum(-1)
    # The difference is lost in rounding where a token is nearly constant: held above that, its cosines come out near 0.
    norm = jax.lax.rsqrt(jnp.maximum(square - width * jnp.square(mean), 1e-6 * square + 1e-12))
    return norm, mean * norm * width**0.5


def merging_error(merge: tuple[int, ...], depth: int, patches: int) -> str | None:
    """Why so many patches cannot be merged after each block, in a tower of `depth` blocks; None where they can."""
    if len(merge) >= depth:
        return f"merge={merge} has {len(merge)} entries; after the last of {depth} blocks merging is of no use, give fewer"
    for block, count in enumerate(merge, 1):
        if not 0 <= count <= patches // 2:
            return f"merge={merge} after {block} blocks: {count} must lie in 0 to {patches // 2}, half of the patches left"
        patches -= count
    return None

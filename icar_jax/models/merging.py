"""Token merging: patches that say the same become one on the way up the vision tower; later blocks have fewer to read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

Array = jax.Array


def merge_similar(x: Array, sizes: Array, count: int, class_token: bool) -> tuple[Array, Array]:
    """Tokens [B, L, W] and the patches that each stands for [B, L] -> the same with `count` tokens fewer.

    Bipartite matching of ToMe (Bolya et al. 2023, arXiv:2210.09461): every second patch looks for the most similar one among
    the others, and the `count` closest pairs become their mean, weighted by size. The class token stays, in its place; the
    patches that found no one come next, then the others. Similar is the cosine of the centred tokens, which needs no keys.
    Later attention does not weigh a token by its size, as ToMe's does for towers that are not trained to go without.
    """
    first = int(class_token)
    weight, patches = sizes[:, first:, None], x[:, first:].astype(jnp.float32)
    features = jax.lax.stop_gradient(patches - patches.mean(-1, keepdims=True))
    features = features * jax.lax.rsqrt(jnp.sum(features**2, axis=-1, keepdims=True) + 1e-12)
    # In full precision: accelerators would round away what tells pairs apart, and the tokens themselves in the sums below.
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    similar = product("bnw,bmw->bnm", features[:, ::2], features[:, 1::2])
    seekers, others = similar.shape[1:]
    best, order = similar.max(-1), jnp.arange(seekers)
    # Ranks by comparing all pairs, and moves as matrices: sorting and gathering are slow on all kinds of devices.
    before = (best[:, :, None] < best[:, None]) | ((best[:, :, None] == best[:, None]) & (order[:, None] > order))
    gone = (before.sum(-1) < count)[..., None]
    stays = jax.nn.one_hot(jnp.cumsum(~gone[..., 0], axis=1) - 1, seekers - count) * ~gone
    moves = jnp.concatenate([stays, jax.nn.one_hot(similar.argmax(-1), others) * gone], axis=-1)
    moved, total = (product("bnm,bnw->bmw", moves, part[:, ::2]) for part in (weight * patches, weight))
    there = ((0, 0), (seekers - count, 0), (0, 0))
    total = total + jnp.pad(weight[:, 1::2], there)
    tokens = (moved + jnp.pad((weight * patches)[:, 1::2], there)) / total
    return (
        jnp.concatenate([x[:, :first], tokens.astype(x.dtype)], axis=1),
        jnp.concatenate([sizes[:, :first], total[..., 0]], axis=1),
    )


def merging_error(merge: tuple[int, ...], depth: int, patches: int) -> str | None:
    """Why so many patches cannot be merged after each block, in a tower of `depth` blocks; None where they can."""
    if len(merge) >= depth:
        return f"merge={merge} has {len(merge)} entries; after the last of {depth} blocks merging is of no use, give fewer"
    for block, count in enumerate(merge, 1):
        if not 0 <= count <= patches // 2:
            return f"merge={merge} after {block} blocks: {count} must lie in 0 to {patches // 2}, half of the patches left"
        patches -= count
    return None

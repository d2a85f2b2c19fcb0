"""Regret: what retrieval loses when an image leaves the tower early while all others run to full depth.

With s(i, c) the cosine of image i and caption c and T the temperature of full depth, the term of a pair is

    l_i(z) = 1/2 log(1 + sum_{c not i} exp T (z c - z t_i)) + 1/2 log(1 + sum_{k not i} exp T (z_k t_i - z t_i))

for the image embedded as z, its caption t_i, the captions c of other images, and the other images z_k at full depth: InfoNCE of
both directions. The regret is l_i(z_exit) - l_i(z_full). A router that sorts images by regret gives the early exit to those
that lose least, which is what a complexity score can only hope for.

A caption that fits many images is not found at either depth, however much is lost: each direction may count by the probability
p of the pair at full depth. With q the one at the exit it is p log(p / q), the pair's term of the divergence KL(full || exit).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
KINDS = ("loss", "kl", "cosine")


class ExtraNegatives(NamedTuple):
    """Further pairs that B pairs are compared with: image and text [M, D], unit norm, at full depth.

    `left_out` bool [M]: which are of an image that is among the B already.
    """

    image: Array
    text: Array
    left_out: Array


def loss_regret(
    exit: Array, full: Array, text: Array, scale: Array, more: ExtraNegatives | None = None, weighed: bool = False
) -> Array:
    """Regrets [B] float32 of B pairs among each other, and among `more`; negative where the exit is the better one.

    exit, full, text: [B, D], unit norm, row i of each belongs to pair i; scale: scalar, of full depth. `weighed`: each
    direction counts by the probability of the pair at full depth.
    """
    images, texts, own = full, text, jnp.eye(len(full), dtype=bool)
    if more is not None:
        images, texts = jnp.concatenate([full, more.image]), jnp.concatenate([text, more.text])
        own = jnp.concatenate([own, jnp.broadcast_to(more.left_out, (len(full), len(more.image)))], axis=1)

    def rivalry(rows: Array, columns: Array) -> Array:
        logits = scale * jnp.einsum("id,jd->ij", rows, columns, precision=jax.lax.Precision.HIGHEST)
        return jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=1)  # all but its own

    others = rivalry(text, images)
    at_exit = scale * jnp.sum(exit * text, axis=1)
    at_full = scale * jnp.sum(full * text, axis=1)
    early = jax.nn.softplus(jnp.stack([rivalry(exit, texts), others]) - at_exit)
    late = jax.nn.softplus(jnp.stack([rivalry(full, texts), others]) - at_full)
    return jnp.mean((early - late) * (jnp.exp(-late) if weighed else 1.0), axis=0)


def cosine_regret(exit: Array, full: Array) -> Array:
    """1 - cos(z_exit, z_full), [B] float32 in [0, 2], of unit vectors [B, D]."""
    return 1 - jnp.sum(exit * full, axis=1)


def unit_ranks(values: Array) -> Array:
    """[B] -> the rank of each value from 0 (least) to 1 (greatest), float32; equal values share their mean rank.

    What a score in [0, 1] can be trained to: regrets themselves are long-tailed and shrink as the model learns.
    """
    below = jnp.sum(values[None, :] < values[:, None], axis=1)
    equal = jnp.sum(values[None, :] == values[:, None], axis=1)  # with itself
    return (below + (equal - 1) / 2).astype(jnp.float32) / max(len(values) - 1, 1)

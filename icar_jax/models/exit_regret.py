"""Regret: the increase of the retrieval loss when one image exits early while all others run to full depth.

With T the logit scale of full depth, the symmetric InfoNCE loss of pair i is

    l_i(z) = 1/2 log(1 + sum_{c not i} exp T (z c - z t_i)) + 1/2 log(1 + sum_{k not i} exp T (z_k t_i - z t_i))

where z is the embedding of image i, t_i its caption, c are the captions of other images, and z_k other images at full depth.
The regret is l_i(z_exit) - l_i(z_full). A router that sorts images by regret sends those to the early exit that lose least.

A caption that matches many images is not retrieved at either depth, however large the regret. Optionally each direction is
therefore weighted by the probability p of the pair at full depth. With q the probability at the exit, the weighted regret is
p log(p / q), the pair's term of KL(full || exit).
"""

from __future__ import annotations

from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp

from icar_jax.config.choices import RegretName

Array = jax.Array
KINDS = get_args(RegretName)


class ExtraNegatives(NamedTuple):
    """Extra negative pairs (memory bank): image and text float32 [M, D], unit norm, at full depth.

    `left_out` bool [M]: True for images that are also in the batch, which are masked.
    """

    image: Array
    text: Array
    left_out: Array


def loss_regret(
    exit: Array, full: Array, text: Array, scale: Array, more: ExtraNegatives | None = None, weighed: bool = False
) -> Array:
    """Returns the regrets float32 [B] of B pairs, with the batch and `more` as negatives; negative if the exit is better.

    exit, full, text: [B, D], unit norm, row i of each is pair i; scale: scalar logit scale of full depth. `weighed` weights
    each direction by the probability of the pair at full depth.
    """
    images, texts, own = full, text, jnp.eye(len(full), dtype=bool)
    if more is not None:
        images, texts = jnp.concatenate([full, more.image]), jnp.concatenate([text, more.text])
        own = jnp.concatenate([own, jnp.broadcast_to(more.left_out, (len(full), len(more.image)))], axis=1)

    def negatives(rows: Array, columns: Array) -> Array:
        logits = scale * jnp.einsum("id,jd->ij", rows, columns, precision=jax.lax.Precision.HIGHEST)
        return jax.nn.logsumexp(jnp.where(own, -jnp.inf, logits), axis=1)  # without the positive pair

    others = negatives(text, images)
    at_exit = scale * jnp.sum(exit * text, axis=1)
    at_full = scale * jnp.sum(full * text, axis=1)
    early = jax.nn.softplus(jnp.stack([negatives(exit, texts), others]) - at_exit)
    late = jax.nn.softplus(jnp.stack([negatives(full, texts), others]) - at_full)
    return jnp.mean((early - late) * (jnp.exp(-late) if weighed else 1.0), axis=0)


def cosine_regret(exit: Array, full: Array) -> Array:
    """exit, full [B, D], unit norm -> 1 - cos(z_exit, z_full), float32 [B] in [0, 2]."""
    return 1 - jnp.sum(exit * full, axis=1)


def unit_ranks(values: Array) -> Array:
    """values [B] -> ranks float32 [B] from 0 (smallest) to 1 (largest); ties get their mean rank.

    Used as targets in [0, 1], because regrets are long-tailed.
    """
    below = jnp.sum(values[None, :] < values[:, None], axis=1)
    equal = jnp.sum(values[None, :] == values[:, None], axis=1)  # includes itself
    return (below + (equal - 1) / 2).astype(jnp.float32) / max(len(values) - 1, 1)

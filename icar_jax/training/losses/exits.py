"""Losses across depths: distillation of early exits from full depth, and a batch that mixes images of different exits.

Each exit's contrastive loss compares images of one depth. A routed gallery contains images of different depths, so these losses
compare across depths.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from icar_jax.training.losses.contrastive import cosines

Array = jax.Array
MIXED = 0  # key of the mixed batch in `per_exit`; keys of exits count executed blocks from 1


def distill_cosine(images: dict[int, Array], full: int) -> Array:
    """Returns the scalar mean over early exits and images of 1 - cos(z_exit, z_full), with stop-gradient on z_full.

    images: {executed blocks: [B, D], unit norm}; `full` is full depth. For unit vectors this is half the squared distance.
    """
    teacher = jax.lax.stop_gradient(images[full])
    return _mean(1 - jnp.mean(jnp.sum(image * teacher, axis=1)) for exit, image in images.items() if exit != full)


def distill_init(images: dict[int, Array], teacher: Array, weights: dict[int, float]) -> Array:
    """Returns the scalar sum over exits of weight x mean of 1 - cos(z_exit, z_teacher).

    images: {executed blocks: [B, D]}; teacher: [B, D], embeddings by the initial weights; all unit norm. weights: {executed
    blocks: weight of the exit's contrastive loss}.
    """
    return sum(weights[e] * (1 - jnp.mean(jnp.sum(image * teacher, axis=1))) for e, image in images.items())


def distill_kl(images: dict[int, Array], text: Array, scales: dict[int, Array], full: int) -> Array:
    """Returns the scalar mean over early exits of KL(softmax of full-depth logits || softmax of the exit's logits).

    images: {executed blocks: [B, D]}, text: [B, D], all unit norm; scales: {executed blocks: scalar}. Logits are scale x
    cosine. The KL is averaged over rows and over both directions (softmax over texts, softmax over images). Full depth's images
    and scale and the texts have stop-gradient, so only the exit is trained. Following 2DMSE (Li et al. 2024, arXiv:2402.14776),
    which aligns layers with the last one by KL.
    """
    text = jax.lax.stop_gradient(text)
    teacher = jax.lax.stop_gradient(scales[full]) * cosines(jax.lax.stop_gradient(images[full]), text)
    return _mean(_kl(teacher, scales[e] * cosines(image, text)) for e, image in images.items() if e != full)


def _kl(teacher: Array, student: Array) -> Array:
    """Logits [B, B] of teacher and student -> scalar KL, averaged over rows and both directions."""
    both = []
    for axis in (1, 0):
        p, q = jax.nn.log_softmax(teacher, axis=axis), jax.nn.log_softmax(student, axis=axis)
        both.append(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=axis)))
    return (both[0] + both[1]) / 2


def mixed_images(images: dict[int, Array], key: Array) -> Array:
    """{executed blocks: [B, D]} -> [B, D] in which each image comes from an exit drawn uniformly at random."""
    draws = jax.random.randint(key, (len(next(iter(images.values()))),), 0, len(images))
    first, *others = images.values()
    for i, image in enumerate(others, 1):  # row-wise select, without communication between devices
        first = jnp.where((draws == i)[:, None], image, first)
    return first


def _mean(values) -> Array:
    values = list(values)
    return sum(values) / len(values)

"""What holds early exits to full depth: distillation from the full path, and one gallery of images from different exits.

Each exit's own contrastive loss ranks images of one depth. A routed gallery ranks images of different depths against each
other, so these losses compare across depths.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from icar_jax.training.losses.contrastive import cosines

Array = jax.Array
MIXED = 0  # beside the exits of `losses.per_exit`, which count executed blocks from 1


def distill_cosine(images: dict[int, Array], full: int) -> Array:
    """Mean over the early exits and images of 1 - cos(z_exit, z_full), z_full behind stop_gradient.

    images: {executed blocks: [B, D], unit norm}; `full` is full depth. Returns a scalar. With unit norm its gradient is that of
    half the squared distance to the full embedding.
    """
    teacher = jax.lax.stop_gradient(images[full])
    return _mean(1 - jnp.mean(jnp.sum(image * teacher, axis=1)) for exit, image in images.items() if exit != full)


def distill_init(images: dict[int, Array], held: Array, weights: dict[int, float]) -> Array:
    """Sum over the exits of weight x mean of 1 - cos(z_exit, held), `held` [B, D] being what the first weights said.

    images: {executed blocks: [B, D]}, all unit norm; weights: {executed blocks: its loss's}. Returns a scalar.
    """
    return sum(weights[e] * (1 - jnp.mean(jnp.sum(image * held, axis=1))) for e, image in images.items())


def distill_kl(images: dict[int, Array], text: Array, scales: dict[int, Array], full: int) -> Array:
    """Mean over the early exits of KL(softmax of full depth's logits || softmax of the exit's), both directions averaged.

    images: {executed blocks: [B, D]}, text: [B, D], all unit norm; scales: {executed blocks: scalar}. Logits are scale x
    cosine, the softmax is over the texts of an image and over the images of a text, the mean over rows. Returns a scalar. Full
    depth's images and scale, and the texts, which its logits share with the exit's, are behind stop_gradient: the exit is to
    follow, and nothing is to come towards it. (2DMSE, Li et al. 2024, arXiv:2402.14776, aligns layers with the last by KL.)
    """
    text = jax.lax.stop_gradient(text)
    teacher = jax.lax.stop_gradient(scales[full]) * cosines(jax.lax.stop_gradient(images[full]), text)
    return _mean(_kl(teacher, scales[e] * cosines(image, text)) for e, image in images.items() if e != full)


def _kl(teacher: Array, student: Array) -> Array:
    """Logits [B, B] twice -> scalar."""
    both = []
    for axis in (1, 0):
        p, q = jax.nn.log_softmax(teacher, axis=axis), jax.nn.log_softmax(student, axis=axis)
        both.append(jnp.mean(jnp.sum(jnp.exp(p) * (p - q), axis=axis)))
    return (both[0] + both[1]) / 2


def mixed_images(images: dict[int, Array], key: Array) -> Array:
    """[B, D] of each exit -> [B, D] in which each image comes from an exit drawn for it, every exit as likely as another."""
    draws = jax.random.randint(key, (len(next(iter(images.values()))),), 0, len(images))
    first, *others = images.values()
    for i, image in enumerate(others, 1):  # selected row by row, which moves nothing between devices
        first = jnp.where((draws == i)[:, None], image, first)
    return first


def _mean(values) -> Array:
    values = list(values)
    return sum(values) / len(values)

"""Contrastive losses (InfoNCE and sigmoid), applied at every exit and at full depth, and the losses of the complexity model.

Here every device computes the logits of its rows against all columns; `ring` computes the same losses chunk by chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from icar_jax.config import unknown

Array = jax.Array


def contrastive(
    image: Array, text: Array, scale: Array, direction: str = "symmetric", ids: Array | None = None
) -> Array:  # fmt: skip
    """Returns the scalar InfoNCE loss (CLIP, Radford et al. 2021) over the global batch.

    image, text: [B, D], unit norm; row i of one is paired with row i of the other. scale: scalar.
    `direction`: 'symmetric' averages both directions, 'image_to_text' uses only the softmax over texts.
    `ids` int [B]: rows of the same image; the target of a row is spread evenly over all rows with its id (CrossGET).
    """
    logits = scale * cosines(image, text)
    if ids is None:
        diagonal = jnp.diagonal(logits)
    else:
        same = (ids[:, None] == ids[None]).astype(jnp.float32)
        diagonal = (logits * same).sum(1) / same.sum(1)  # the targets are symmetric: rows and columns share their mean
        if direction == "symmetric":
            diagonal = (diagonal + (logits * same).sum(0) / same.sum(0)) / 2
    image_to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - diagonal)
    if direction == "image_to_text":
        return image_to_text
    return (image_to_text + jnp.mean(jax.nn.logsumexp(logits, axis=0) - diagonal)) / 2


def sigmoid(image: Array, text: Array, scale: Array, bias: Array) -> Array:
    """Returns the scalar sigmoid loss, a binary classification of every image-text pair (SigLIP, Zhai et al. 2023, eq. 1).

    image, text: [B, D], unit norm; row i of one is paired with row i of the other. scale, bias: scalars. The loss is
    -1/B sum_ij log sigmoid(z_ij (scale cos_ij + bias)) with z_ij = 1 for matching pairs and -1 for all others.
    """
    logits = scale * cosines(image, text) + bias
    signed = jnp.where(jnp.eye(len(logits), dtype=bool), logits, -logits)
    return -jnp.mean(jnp.sum(jax.nn.log_sigmoid(signed), axis=1))


def per_exit(
    images: dict[int, Array],
    text: Array,
    scales: dict[int, Array],
    biases: dict[int, Array] | None,
    *,
    kind: str,
    direction: str,
    ids: Array | None = None,
) -> dict[int, Array]:
    """Returns {executed blocks: scalar loss} of the images [B, D] of each exit against the same text [B, D].

    `kind`: 'softmax' (CLIP) or 'sigmoid' (SigLIP). Only softmax uses `direction` and `ids`, only sigmoid uses `biases`.
    `ids` as of `contrastive`. Raises ConfigError for another kind.
    """
    if kind == "softmax":
        return {e: contrastive(image, text, scales[e], direction, ids) for e, image in images.items()}
    if kind == "sigmoid":
        assert biases is not None, "the sigmoid loss needs a bias for each exit"
        return {e: sigmoid(image, text, scales[e], biases[e]) for e, image in images.items()}
    raise unknown("config.loss.kind", kind, ("softmax", "sigmoid"))


def cosines(image: Array, text: Array) -> Array:
    """[B, D], [C, D] -> dot products [B, C] at highest precision, because logits reach 100."""
    return jnp.einsum("id,td->it", image, text, precision=jax.lax.Precision.HIGHEST)


def exit_weights(weights: tuple[float, ...], exits: tuple[int, ...]) -> dict[int, float]:
    """Returns {executed blocks: weight}, normalised to sum 1; an empty tuple gives equal weights."""
    weights = weights or (1.0,) * len(exits)
    total = sum(weights)
    return {blocks: w / total for blocks, w in zip(exits, weights, strict=True)}


def class_weights(kind: str, counts: tuple[int, int]) -> tuple[float, float]:
    """Returns the weights of the classes (simple, complex) for `complexity_loss`, from their numbers of training images.

    'none': 1 and 1. 'balanced': n / (2 n_class), so that both classes have equal total weight and the mean weight of an image
    is 1 (King and Zeng 2001; scikit-learn's 'balanced').
    """
    if kind == "none":
        return (1.0, 1.0)
    return tuple(sum(counts) / (2 * count) for count in counts)


def complexity_loss(
    logits: Array, complexity: Array, head: str, threshold: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Array:
    """logits [B, 1] (regression) or [B, 2] (classification), complexity [B] in [0, 1] -> scalar loss.

    Regression: mean squared error of the sigmoid. Classification: cross-entropy for the class complexity > threshold, each
    image weighted by its class. The mean is over images and not over their weights.
    """
    if head == "regression":
        return jnp.mean(jnp.square(jax.nn.sigmoid(logits[:, 0]) - complexity))
    labels = (complexity > threshold).astype(jnp.int32)
    found = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return jnp.mean(found if weights == (1.0, 1.0) else found * jnp.asarray(weights, jnp.float32)[labels])

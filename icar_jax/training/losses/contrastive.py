"""The contrastive losses, used alike at every exit and at full depth, and the losses of the complexity model.

Here every device forms its rows of all logits; `ring` has the same losses with a chunk of the logits at a time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from icar_jax.config import unknown

Array = jax.Array


def contrastive(image: Array, text: Array, scale: Array, direction: str = "symmetric") -> Array:
    """InfoNCE (CLIP, Radford et al. 2021) over the global batch.

    image, text: [B, D], unit norm, row i of one belongs to row i of the other; scale: scalar. Returns a scalar.
    `direction`: 'symmetric' averages both directions, 'image_to_text' lets each image choose among the texts only.
    """
    logits = scale * cosines(image, text)
    diagonal = jnp.diagonal(logits)
    image_to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - diagonal)
    if direction == "image_to_text":
        return image_to_text
    return (image_to_text + jnp.mean(jax.nn.logsumexp(logits, axis=0) - diagonal)) / 2


def sigmoid(image: Array, text: Array, scale: Array, bias: Array) -> Array:
    """Every image-text pair a decision of its own (SigLIP, Zhai et al. 2023, equation 1).

    image, text: [B, D], unit norm, row i of one belongs to row i of the other; scale, bias: scalars. Returns the scalar
    -1/B sum_ij log sigmoid(z_ij (scale cos_ij + bias)) with z_ij = 1 for the pairs that belong together and -1 for all others.
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
) -> dict[int, Array]:
    """{executed blocks: scalar loss}: images [B, D] of each exit against the same text [B, D].

    `kind`: 'softmax' (CLIP) or 'sigmoid' (SigLIP), which alone reads `biases` and has no `direction`.
    """
    if kind == "softmax":
        return {e: contrastive(image, text, scales[e], direction) for e, image in images.items()}
    if kind == "sigmoid":
        assert biases is not None, "the sigmoid loss needs a bias for each exit"
        return {e: sigmoid(image, text, scales[e], biases[e]) for e, image in images.items()}
    raise unknown("config.loss.kind", kind, ("softmax", "sigmoid"))


def cosines(image: Array, text: Array) -> Array:
    """[B, D], [C, D] -> [B, C]; a device that rounds float32 factors would spoil logits of size 100."""
    return jnp.einsum("id,td->it", image, text, precision=jax.lax.Precision.HIGHEST)


def exit_weights(weights: tuple[float, ...], exits: tuple[int, ...]) -> dict[int, float]:
    """{executed blocks: weight}, normalised to sum 1; an empty tuple weighs all alike."""
    weights = weights or (1.0,) * len(exits)
    total = sum(weights)
    return {blocks: w / total for blocks, w in zip(exits, weights, strict=True)}


def class_weights(kind: str, counts: tuple[int, int]) -> tuple[float, float]:
    """Weights of the classes (simple, complex) for `complexity_loss`, from the counts of their training images.

    'none': 1 and 1. 'balanced': n / (2 n_class), so that both classes weigh alike in sum and an image weighs 1 on average
    (King and Zeng 2001; scikit-learn's 'balanced').
    """
    if kind == "none":
        return (1.0, 1.0)
    return tuple(sum(counts) / (2 * count) for count in counts)


def complexity_loss(
    logits: Array, complexity: Array, head: str, threshold: float, weights: tuple[float, float] = (1.0, 1.0)
) -> Array:
    """logits [B, 1] or [B, 2], complexity [B] in [0, 1] -> scalar.

    Regression: mean squared error of the sigmoid. Classification: cross-entropy with the class complexity > threshold, each
    image weighed by its class; the mean is over the images, so that a batch of few rare ones counts as much as any.
    """
    if head == "regression":
        return jnp.mean(jnp.square(jax.nn.sigmoid(logits[:, 0]) - complexity))
    labels = (complexity > threshold).astype(jnp.int32)
    found = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return jnp.mean(found if weights == (1.0, 1.0) else found * jnp.asarray(weights, jnp.float32)[labels])

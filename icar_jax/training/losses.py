"""The one contrastive loss, used alike at every exit and at full depth, and the losses of the complexity model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def contrastive(image: Array, text: Array, scale: Array, direction: str = "symmetric") -> Array:
    """InfoNCE (CLIP, Radford et al. 2021) over the global batch.

    image, text: [B, D], unit norm, row i of one belongs to row i of the other; scale: scalar. Returns a scalar.
    `direction`: 'symmetric' averages both directions, 'image_to_text' lets each image choose among the texts only.
    """
    logits = scale * jnp.einsum("id,td->it", image, text, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.diagonal(logits)
    image_to_text = jnp.mean(jax.nn.logsumexp(logits, axis=1) - diagonal)
    if direction == "image_to_text":
        return image_to_text
    return (image_to_text + jnp.mean(jax.nn.logsumexp(logits, axis=0) - diagonal)) / 2


def exit_weights(weights: tuple[float, ...], exits: tuple[int, ...]) -> dict[int, float]:
    """{executed blocks: weight}, normalised to sum 1; an empty tuple weighs all alike."""
    weights = weights or (1.0,) * len(exits)
    total = sum(weights)
    return {blocks: w / total for blocks, w in zip(exits, weights, strict=True)}


def complexity_loss(logits: Array, complexity: Array, head: str, threshold: float) -> Array:
    """logits [B, 1] or [B, 2], complexity [B] in [0, 1] -> scalar.

    Regression: mean squared error of the sigmoid. Classification: cross-entropy with the class complexity > threshold.
    """
    if head == "regression":
        return jnp.mean(jnp.square(jax.nn.sigmoid(logits[:, 0]) - complexity))
    labels = (complexity > threshold).astype(jnp.int32)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))

"""From stored pixels to tower inputs, on the device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def normalise(images: Array, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Array:
    """images uint8 [B, S, S, 3] -> float32 [B, S, S, 3], (x / 255 - mean) / std per channel."""
    mean, std = (jnp.asarray(each, jnp.float32).reshape(1, 1, 1, 3) for each in (mean, std))
    return images.astype(jnp.float32) * (1 / (255 * std)) - mean / std


def require_floats(images: Array) -> None:
    """Raises TypeError for integers: what a tower takes is normalised."""
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be normalised floats, got {images.dtype}; icar_jax.models.pixels.normalise(images, mean, std) takes "
            "uint8 pixels"
        )

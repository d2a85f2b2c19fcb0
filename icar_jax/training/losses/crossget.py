"""CrossGET's cross loss between the cross tokens of both towers (Shi et al. 2024, arXiv:2305.17455)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_loss(image: Array, text: Array, form: str = "crossget") -> Array:
    """Returns the scalar divergence of cross tokens, image and text float32 [B, pairs, D], not normalised.

    The softmaxes a and b of a pair are compared with their mean m: (KL(m || a) + KL(m || b)) / 2 with `form` 'crossget', as the
    published code computes it, and (KL(a || m) + KL(b || m)) / 2 with 'jensen_shannon', as the paper names it; the mean over
    pairs and batch.
    """
    log_a, log_b = jax.nn.log_softmax(image), jax.nn.log_softmax(text)
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    mean = (a + b) / 2
    log_mean = jnp.logaddexp(log_a, log_b) - jnp.log(2.0)
    if form == "jensen_shannon":
        each = a * (log_a - log_mean) + b * (log_b - log_mean)
    else:
        each = mean * (2 * log_mean - log_a - log_b)
    return jnp.mean(each.sum(-1)) / 2

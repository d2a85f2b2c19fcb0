"""Random parameters drawn with numpy: of the sizes that `init` draws, without the programs it compiles for every shape."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from icar_jax import pytree
from icar_jax.models.clip import Clip


def params(shapes, seed):
    """float32 parameters like `shapes`; norms, biases and gates as they start, matrices normal with std 1 / sqrt(inputs)."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        name = path.rpartition("/")[2]
        if not shape:
            return np.float32(np.log(1 / 0.07))  # a logit scale
        if name in ("scale", "bias", "beta", "gamma"):
            return np.full(shape, name == "scale", np.float32)
        std = 0.02 if path.startswith("backbone/") or name == "embed" else np.prod(shape[:-1]) ** -0.5
        return (std * rng.standard_normal(shape)).astype(np.float32)

    return pytree.map_with_path(lambda path, each: leaf(path, each.shape), shapes)


def random_params(arch):
    rng = np.random.default_rng(0)
    draw = lambda path, leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape) + path.endswith("/scale"), jnp.float32)
    return pytree.map_with_path(draw, Clip.graph(arch).shapes)

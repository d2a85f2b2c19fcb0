"""Gradient and curvature of an image-text similarity with respect to the pixels.

    python examples/gradients.py MODEL "a red circle" IMAGE

MODEL may be weights of another library; they are converted in memory.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import icar_jax
from icar_jax.data.images import decode
from icar_jax.models.ops import normalise


def main(path: str, text: str, picture: str) -> tuple[np.ndarray, float]:
    model = icar_jax.load(path)
    graph, params = model.clip.split()
    p, tokens = model.preprocess, model.tokenizer([text], model.arch.text.context_length)
    image = normalise(jnp.asarray(p.resize(decode(picture)))[None], p.mean, p.std)
    target = graph.encode_text(params, tokens)[0]

    def similarity(image: jax.Array) -> jax.Array:
        return graph.encode_image(params, image)[0] @ target

    gradient = jax.jit(jax.grad(similarity))(image)
    direction = gradient / jnp.linalg.norm(gradient)
    # Forward over reverse mode: a Hessian-vector product without forming the Hessian.
    along = jax.jit(lambda x, d: jnp.vdot(d, jax.jvp(jax.grad(similarity), (x,), (d,))[1]))(image, direction)
    saliency = np.abs(gradient[0]).max(axis=-1)
    row, column = np.unravel_index(saliency.argmax(), saliency.shape)
    print(f"most sensitive pixel: row {row}, column {column}; curvature along the gradient {along:.2e}")
    return saliency, float(along)


if __name__ == "__main__":
    main(*sys.argv[1:])

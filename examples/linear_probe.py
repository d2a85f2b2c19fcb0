"""Linear probe: fits a classifier on frozen embeddings with L-BFGS.

python examples/linear_probe.py MODEL FOLDER     FOLDER contains one folder of images per class
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import icar_jax


def fit(x: np.ndarray, y: np.ndarray, classes: int, decay: float = 1e-3, steps: int = 100) -> jax.Array:
    """Fits weights [D, classes] to embeddings x [N, D] and labels y int [N]."""
    loss = lambda w: optax.losses.softmax_cross_entropy_with_integer_labels(x @ w, y).mean() + decay * jnp.sum(w * w)
    solver, value_and_grad = optax.lbfgs(), optax.value_and_grad_from_state(loss)
    weights = jnp.zeros((x.shape[1], classes))

    @jax.jit
    def step(weights, state):
        value, grad = value_and_grad(weights, state=state)
        updates, state = solver.update(grad, state, weights, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(weights, updates), state

    state = solver.init(weights)
    for _ in range(steps):
        weights, state = step(weights, state)
    return weights


def main(path: str, folder: str) -> float:
    names = sorted(p.name for p in Path(folder).iterdir() if p.is_dir())
    files = [(file, y) for y, name in enumerate(names) for file in sorted((Path(folder) / name).iterdir())]
    x = icar_jax.load(path).encode_image([file for file, _ in files])
    y = np.array([y for _, y in files])
    held = np.arange(len(y)) % 4 == 0  # every fourth image is held out
    weights = fit(x[~held], y[~held], len(names))
    accuracy = float(np.mean(np.argmax(x[held] @ weights, axis=1) == y[held]))
    print(f"{len(names)} classes, {np.sum(~held)} training images: {100 * accuracy:.1f}% accuracy on {np.sum(held)} held out")
    return accuracy


if __name__ == "__main__":
    main(*sys.argv[1:])

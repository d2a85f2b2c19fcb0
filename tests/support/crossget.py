"""CrossGET's whole CLIP of tests/fixtures/reduction: a file as its authors write it, and what their code computes."""

import numpy as np

from icar_jax.convert.files.torch_writer import write_torch
from tests.support.places import FIXTURES

CASE = FIXTURES / "reduction" / "crossget_case.npz"
IMAGE_R, TEXT_R = 3, 2


def case():
    """{name: array} of the whole CLIP: images [B, C, H, W], tokens, embeddings before the norm, losses, gradients."""
    stored = np.load(CASE)
    return {name.removeprefix("clip/"): stored[name] for name in stored if name.startswith("clip/")}


def write(path, without=()):
    """Writes the checkpoint {"model": ..., "optimizer", "config", "epoch"}; `without` names are left out."""
    state = {name.removeprefix("param/"): value for name, value in case().items() if name.startswith("param/")}
    state = {name: value for name, value in state.items() if name not in without}
    write_torch(path, {"model": state, "optimizer": {"state": {}}, "config": {"batch_size_train": 64}, "epoch": 11})
    return path

"""Checkpoints of format 1 as the first version wrote them: they load, to the last bit of every parameter, and compute the same.

tests/fixtures/format_1 holds two bundles, one with a ConvNeXt and one with a head on the tower's own blocks, and what that
version made of six pictures and three texts. Files are compared by their hashes when they are read.
"""

import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint, pytree
from tests.support.places import FIXTURES

FOLDER = FIXTURES / "format_1"
TEXTS = ["a red square", "two blue circles beside a green line", "many shapes"]


@pytest.fixture(scope="module")
def outputs():
    return dict(np.load(FOLDER / "outputs.npz"))


@pytest.mark.parametrize("kind", ["complexity", "blocks"])
def test_a_bundle_routes_as_it_did(kind, outputs):
    model = icar_jax.load(FOLDER / f"bundle_{kind}", batch_size=4)
    routed = model.route(list(outputs["images"]))
    np.testing.assert_allclose(routed.scores, outputs[f"{kind}/scores"], atol=1e-6)
    np.testing.assert_array_equal(routed.exits, outputs[f"{kind}/exits"])
    np.testing.assert_allclose(routed.embeddings, outputs[f"{kind}/routed"], atol=2e-6)


def test_every_exit_and_the_text_tower(outputs):
    model = icar_jax.load(FOLDER / "bundle_complexity" / "clip", batch_size=4)
    assert model.exits == (1, 3, 4)
    for exit in model.exits:
        np.testing.assert_allclose(model.encode_image(list(outputs["images"]), exit), outputs[f"exit_{exit}"], atol=2e-6)
    np.testing.assert_allclose(model.encode_text(TEXTS, warn=False), outputs["text"], atol=2e-6)


def test_parameters_keep_their_names_and_bits():
    for part in ("bundle_complexity/clip", "bundle_complexity/complexity", "bundle_blocks/complexity"):
        kind = checkpoint.describe(FOLDER / part)["kind"]
        saved = pytree.flatten(checkpoint.read(FOLDER / part, kind).params)
        model = icar_jax.load(FOLDER / part)
        found = pytree.flatten((model.clip if kind == "clip" else model.complexity).split()[1])
        assert found.keys() == saved.keys()
        for path, leaf in saved.items():
            assert found[path].dtype == np.float32 and np.array_equal(found[path], leaf), path

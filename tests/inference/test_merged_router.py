"""A router that reads merged tokens, at the exit of a token-merging tower and deeper."""

import dataclasses

import jax
import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import validate
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.inference.explain import Explainer
from icar_jax.inference.shared_router import SharedRouter
from icar_jax.models.token_router import TokenRouter
from icar_jax.training.loop import train
from tests.support.runs import tiny_config
from tests.support.scorers import pictures, write_clip


@pytest.fixture(scope="module")
def model(merged_bundle):
    return icar_jax.load(merged_bundle, batch_size=8)


def test_routing_at_the_exit_equals_each_exit_run_alone(model, scorer):
    images = pictures(21, seed=3)
    assert isinstance(model.router, SharedRouter) and model.router._tower.shape[0] == 17 - 3
    routed = model.route(images)
    assert set(routed.exits.tolist()) == {3, 4}
    for exit in model.exits:
        alone = model.encode_image(images, exit=exit)
        np.testing.assert_allclose(routed.embeddings[routed.exits == exit], alone[routed.exits == exit], atol=1e-5)
    for one in (model, icar_jax.load(scorer, batch_size=8)):
        np.testing.assert_allclose(one.score(images), routed.scores, atol=1e-6)


def test_a_map_of_merged_patches_is_that_of_the_patches_before(model):
    """A cell is proportional to the gradient of the log odds by the scale of its token before merging."""
    explained = Explainer(model).explain(pictures(2, seed=5))
    scorer, params = model.scorer.complexity, model.scorer.forward.params
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    _, maps = jax.jit(scorer.score_and_map)(params, images)
    assert [each.map.shape for each in explained] == [(4, 4)] * 2 and np.ptp(explained[0].map) > 0
    first, tower = TokenRouter.graph(dataclasses.replace(scorer.arch, blocks=1)), scorer.merge(params).tower

    @jax.jit
    def odds(step):
        """Log odds of both images with their tokens scaled by 1 + `step` [2, 16]."""
        tokens = first.tokens(params, images)
        values = tokens.values.at[:, 1:].multiply(1 + step[:, :, None])
        read = tower.run(tokens._replace(values=values), (3,), 1)[3]
        return jax.scipy.special.logit(scorer.score_of_tokens(params, read))

    for patch in (0, 5, 15):
        step = np.zeros((2, 16), np.float32)
        step[:, patch] = 1e-3
        slope = (odds(step) - odds(-step)) / 2e-3
        np.testing.assert_allclose(maps.reshape(2, 16)[:, patch], 16 * slope, rtol=0.05, atol=0.02)


def test_a_tower_that_merges_otherwise_before_the_head_is_refused(scorer, tmp_path):
    other = write_clip(tmp_path / "clip", merge=(1, 1, 1))
    with pytest.raises(CheckpointError, match=r"a different tower \(merge \(1, 1\) instead of \(1, 2\)\)"):
        make_bundle(other, scorer, tmp_path / "bundle", thresholds=(0.5,))
    later = write_clip(tmp_path / "later", merge=(1, 2, 2))  # merging after the head may differ
    make_bundle(later, scorer, tmp_path / "bundle", thresholds=(0.5,))


def test_a_head_trained_at_the_exit_routes_its_clip(clip, tmp_path):
    config = tiny_config("complexity", steps=3)
    c = config.complexity
    c.variant, c.head, c.clip, c.blocks, c.target, c.regret = "blocks", "regression", str(clip), 3, "regret", "cosine"
    config.data.scenes_pixels = 32
    c.pooled_norm = "parts"
    folder = train(validate(config), tmp_path / "run")
    arch = checkpoint.describe(folder)["arch"]
    assert (arch["blocks"], arch["vision"]["merge"], arch["norm_parts"]) == (3, [1, 2], True)
    trained = icar_jax.load(make_bundle(clip, folder, tmp_path / "bundle", thresholds=(-1.0,)), batch_size=8)
    images = pictures(5)
    np.testing.assert_allclose(trained.route(images).embeddings, trained.encode_image(images, exit=4), atol=1e-5)

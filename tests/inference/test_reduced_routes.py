"""Routes: complexity chooses the blocks and the schedule of token reduction, in a shared tower and with budgets."""

import jax
import numpy as np
import pytest

import icar_jax
from icar_jax.checkpoint import CheckpointError
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.inference.budgets import counted_costs, shares_for_budget
from icar_jax.inference.files.stream import StreamEncoder
from icar_jax.inference.router import check_thresholds
from icar_jax.inference.shared_router import SharedRouter
from icar_jax.models.reduction.routes import in_cost_order, route, route_name
from tests.support.scorers import pictures, write_clip, write_scorer

TOME = {"reduce": "tome", "reduce_routes": (0.9, 0.8), "reduce_after": 2, "exits": (2,), "merge": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("routes")


def bundle(folder, name, clip, blocks=2, thresholds=None):
    path = write_clip(folder / name / "clip", **clip)
    scorer = write_scorer(folder / name / "scorer", path, blocks)
    scores = np.sort(icar_jax.load(scorer, batch_size=8).score(pictures(24, seed=3)))
    cuts = np.linspace(0, 24, len(icar_jax.load(path).exits) + 1)[1:-1].astype(int)
    middle = tuple(float(scores[n - 1 : n + 1].mean()) for n in cuts)
    return icar_jax.load(make_bundle(path, scorer, folder / name / "bundle", thresholds=middle), batch_size=8)


def test_complexity_chooses_blocks_and_schedule(folder):
    model = bundle(folder, "tome", TOME)
    assert model.exits == (2, route(4, 2), route(4, 1), 4) and isinstance(model.router, SharedRouter)
    images = pictures(24, seed=3)
    routed = model.route(images)
    assert set(routed.exits.tolist()) == set(model.exits)
    for exit in model.exits:
        here = routed.exits == exit
        np.testing.assert_allclose(routed.embeddings[here], model.encode_image(images, exit=exit)[here], atol=2e-5)
    costs = counted_costs(model.arch, model.scorer.complexity.arch)
    assert list(costs.exits) == list(model.exits) and list(costs.exits.values()) == sorted(costs.exits.values())
    shares = shares_for_budget(0.85, costs)
    assert costs.share_of_full(dict(zip(in_cost_order(costs.exits), shares))) == pytest.approx(0.85, abs=1e-6)
    encoder = StreamEncoder(model, cheap=True)
    assert set(encoder.embed_batches([{"clip": np.zeros((3, 32, 32, 3), np.uint8)}]).exits.tolist()) == {2}


@pytest.mark.check
def test_dropping_after_the_blocks_that_are_shared(folder):
    model = bundle(folder, "drop", {"reduce": "drop", "reduce_r": (6,), "reduce_after": 2, "exits": (3,), "merge": ()})
    images = pictures(12, seed=3)
    routed = model.route(images)
    assert len(set(routed.exits.tolist())) == 2
    for exit in (3, 4):
        here = routed.exits == exit
        np.testing.assert_allclose(routed.embeddings[here], model.encode_image(images, exit=exit)[here], atol=2e-5)


@pytest.mark.check
def test_a_router_leaves_the_cross_token_out(folder):
    crossget = {"reduce": "crossget", "reduce_r": (2,), "reduce_text": (1,), "exits": (2,), "merge": (), "depth": 3}
    model = bundle(folder, "crossget", crossget)
    images = pictures(12, seed=3)
    routed = model.route(images)
    for exit in (2, 3):
        here = routed.exits == exit
        np.testing.assert_allclose(routed.embeddings[here], model.encode_image(images, exit=exit)[here], atol=2e-5)
    scorer, params = model.scorer.complexity, model.scorer.forward.params
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype(np.float32)
    scores, maps = jax.jit(scorer.score_and_map)(params, x)
    assert maps.shape == (2, 4, 4)
    tokens = jax.jit(scorer.tokens)(params, x)
    assert tokens.values.shape[1] == 18 - 4
    changed = tokens._replace(values=tokens.values.at[:, -1].add(1.0))
    np.testing.assert_array_equal(
        jax.jit(scorer.score_of_tokens)(params, changed), jax.jit(scorer.score_of_tokens)(params, tokens)
    )
    np.testing.assert_allclose(jax.jit(scorer.score_of_tokens)(params, tokens), scores, atol=1e-6)


def test_routes_that_part_before_the_score_are_refused(folder):
    clip = write_clip(folder / "early" / "clip", **TOME | {"reduce_after": 1})
    scorer = write_scorer(folder / "early" / "scorer", clip, 2)
    with pytest.raises(CheckpointError, match="route .4 blocks, schedule 2. that removes other tokens before.*reduce_after=2"):
        make_bundle(clip, scorer, folder / "early" / "bundle", thresholds=(0.2, 0.5, 0.7))


def test_routes_keep_the_order_that_they_are_given_in():
    assert in_cost_order([12, 3]) == (3, 12) and in_cost_order([1012, 3, 12]) == (1012, 3, 12)
    check_thresholds((1012, 3, 12), (0.1, 0.2))
    assert route_name(2012) == "12 blocks, schedule 2" and route_name(12) == "12 blocks"

"""Budgets of a loaded bundle from its stored quantiles, without the calibration images."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import icar_jax
from icar_jax import checkpoint
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError
from icar_jax.data.images import Preprocess
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.inference.budgets import QUANTILES, Costs, pack_quantiles, thresholds_for_budget, unpack_quantiles
from icar_jax.inference.files.corpus import open_corpus
from icar_jax.inference.files.embedding import embed_files
from icar_jax.inference.router import assign
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 3000), st.floats(0.2, 1), st.integers(1, 3))
def test_quantiles_serve_as_well_as_all_scores(seed, n, budget, early):
    rng = np.random.default_rng(seed)
    scores = (rng.random(n) ** rng.uniform(0.2, 5)).astype(np.float32)
    costs = Costs({e + 1: (e + 1) / (early + 1) for e in range(early + 1)}, 0.02)
    if budget < costs.lowest_budget:
        return
    quantiles = unpack_quantiles(pack_quantiles(scores))
    assert len(quantiles) == QUANTILES and (np.diff(quantiles) >= 0).all()
    exits = sorted(costs.exits)

    def cost(of):
        taken = assign(scores, exits, thresholds_for_budget(of, budget, costs))
        return costs.share_of_full({e: np.mean(taken == e) for e in exits})

    assert cost(quantiles) == pytest.approx(cost(scores), abs=2 / QUANTILES + 2 * early / n)


@pytest.fixture(scope="module")
def model(clip_folder, complexity_folder, tmp_path_factory):
    """A bundle whose tower is expensive relative to the complexity model."""
    vision, text = VisionArch(32, 4, 64, 6, 4, 256, 24, exits=(2, 4)), TextArch(16, 300, 16, 1, 2, 32, 24, end_id=299)
    arch, folder = ClipArch(vision, text), tmp_path_factory.mktemp("budget")
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    checkpoint.write(folder / "clip", "clip", description, Clip.init(jax.random.key(0), arch, "random"))
    bundle = make_bundle(folder / "clip", complexity_folder, folder / "bundle", thresholds=(0.3, 0.6))
    scores = icar_jax.load(complexity_folder, batch_size=8).score(pictures())
    routing = checkpoint.describe(bundle)["routing"] | {"scores": pack_quantiles(scores)}
    checkpoint.amend(bundle, {"routing": routing})
    return icar_jax.load(bundle, batch_size=8)


def pictures(n=60):
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) // np.uint8(rng.integers(1, 6)) for _ in range(n)]


def test_a_budget_routes_the_calibration_images_at_its_cost(model):
    from icar_jax.inference.budgets import counted_costs

    costs = counted_costs(model.arch, model.scorer.complexity.arch)
    shares = {}
    for budget in (0.5, 0.8):
        routed = model.route(pictures(), budget=budget)
        np.testing.assert_array_equal(routed.exits, assign(routed.scores, model.exits, model.thresholds_for(budget)))
        np.testing.assert_allclose(model.encode_image(pictures(), budget=budget), routed.embeddings, atol=1e-5)
        shares[budget] = {e: float(np.mean(routed.exits == e)) for e in model.exits}
        assert costs.share_of_full(shares[budget]) == pytest.approx(budget, abs=0.04)  # one image in 60
    assert shares[0.5] != shares[0.8]
    assert model.route(pictures(), budget=1.0).share(model.exits)["6"] > 0.9
    assert model.thresholds == (0.3, 0.6), "the bundle's own thresholds stay"


def test_a_corpus_of_a_budget(model, tmp_path):
    from PIL import Image

    from icar_jax.data.sources.files import ImagePaths

    for i, picture in enumerate(pictures(10)):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    embed_files(model, ImagePaths([str(tmp_path)]), tmp_path / "out", budget=0.5)
    corpus = open_corpus(tmp_path / "out")
    assert corpus.manifest["encoding"]["thresholds"] == list(model.thresholds_for(0.5))
    expected = model.route(pictures(10), budget=0.5)
    assert corpus.rows()["exit"].to_pylist() == expected.exits.tolist()


def test_budgets_that_cannot_be_met(model, clip_folder, complexity_folder, tmp_path):
    with pytest.raises(ConfigError, match="cannot be met: sending every image to exit 2"):
        model.encode_image(pictures(1), budget=0.1)
    with pytest.raises(ConfigError, match="must lie in"):
        model.encode_image(pictures(1), budget=60)
    with pytest.raises(ValueError, match="exclude each other"):
        model.encode_image(pictures(1), exit=2, budget=0.6)
    plain = icar_jax.load(make_bundle(clip_folder, complexity_folder, tmp_path / "b", thresholds=(0.1, 0.2)), batch_size=8)
    with pytest.raises(CheckpointError, match="icar calibrate"):
        plain.encode_image(pictures(1), budget=0.9)
    with pytest.raises(CheckpointError, match="icar bundle"):
        icar_jax.load(clip_folder).encode_image(pictures(1), budget=0.9)

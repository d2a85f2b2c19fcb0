"""Small trained pieces that several tests share; made once a session."""

import dataclasses
import gc

import pytest

import icar_jax
from icar_jax.evaluation.routing.calibration import make_bundle, thresholds_for_shares
from tests.support import compiling
from tests.support.scorers import pictures, write_scorer

compiling.prepare()  # before jax is imported anywhere


from icar_jax import checkpoint
from icar_jax.data.images import Preprocess
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.vision import VisionArch
from tests.support import drawn
from tests.support.runs import random_clip

# Tracing makes objects by the million, and a third of its time went into looking for cycles among them.
gc.collect()
gc.freeze()
gc.set_threshold(200_000, 20, 20)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP checkpoint with exits after 1, 2 and 3 blocks."""
    vision = VisionArch(32, 8, 32, 3, 4, 64, 24, exits=(1, 2))
    return random_clip(tmp_path_factory.mktemp("clip") / "model", vision)


@pytest.fixture(scope="session")
def complexity_folder(tmp_path_factory):
    """A random complexity checkpoint."""
    arch = ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), "regression", 32)
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    params = drawn.params(ComplexityModel.graph(arch).shapes, 3)
    # A fresh head scores nearly all images alike; a steeper last layer spreads them.
    params["head"]["fc3"]["kernel"] = params["head"]["fc3"]["kernel"] * 8
    return checkpoint.write(tmp_path_factory.mktemp("complexity") / "model", "complexity", description, params)


@pytest.fixture(scope="session")
def scorer_folder(clip_folder, tmp_path_factory):
    """A complexity checkpoint: a head on the first block of `clip_folder`."""
    return write_scorer(tmp_path_factory.mktemp("blocks") / "model", clip_folder, 1)


@pytest.fixture(scope="session")
def shared_bundle(clip_folder, scorer_folder, tmp_path_factory):
    """A bundle whose complexity model reads the CLIP's own first block."""
    scores = icar_jax.load(scorer_folder).score(pictures(60))
    thresholds = thresholds_for_shares(scores, (0.3, 0.3, 0.4))
    return make_bundle(clip_folder, scorer_folder, tmp_path_factory.mktemp("shared") / "bundle", thresholds=thresholds)

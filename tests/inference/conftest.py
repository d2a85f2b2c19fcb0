"""Fixtures with a CLIP that merges tokens."""

import numpy as np
import pytest

import icar_jax
from icar_jax.evaluation.routing.calibration import make_bundle
from tests.support.scorers import pictures, write_clip, write_scorer


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("merged") / "clip")


@pytest.fixture(scope="module")
def scorer(clip, tmp_path_factory):
    return write_scorer(tmp_path_factory.mktemp("merged") / "scorer", clip, 3)


@pytest.fixture(scope="module")
def merged_bundle(clip, scorer, tmp_path_factory):
    middle = float(np.median(icar_jax.load(scorer, batch_size=8).score(pictures(40))))
    return make_bundle(clip, scorer, tmp_path_factory.mktemp("merged") / "bundle", thresholds=(middle,))

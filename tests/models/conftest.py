"""Fixtures: a CLIP of four blocks with one early exit."""

import jax
import pytest

from icar_jax.models.clip import Clip
from tests.support.small_clip import ARCH


@pytest.fixture(scope="module")
def params():
    return Clip.init(jax.random.key(0), ARCH)


@pytest.fixture
def clip(params):
    return Clip.graph(ARCH).merge(params)

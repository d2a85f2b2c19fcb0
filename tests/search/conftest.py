"""Fixtures: a bundle, its model, and a folder of 23 pictures."""

import pytest

import icar_jax
from tests.support import collected
from tests.support.collected import draw


@pytest.fixture(scope="module")
def bundle(clip_folder, complexity_folder, tmp_path_factory):
    return collected.bundle(clip_folder, complexity_folder, tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def model(bundle):
    return icar_jax.load(bundle, batch_size=8)


@pytest.fixture
def pictures(tmp_path):
    return draw(tmp_path / "pictures", 23)

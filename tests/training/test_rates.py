"""Freezing and rates by regular expressions of paths, beside the groups."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax import pytree
from icar_jax.config import ConfigError, OptimConfig
from icar_jax.models import variants
from icar_jax.models.clip import Clip
from icar_jax.training.optimizer import make_optimizer, rate_share, require_matches, trainable

ARCH = variants.CLIP["vit_tests"]
SHAPES = Clip.graph(dataclasses.replace(ARCH, vision=dataclasses.replace(ARCH.vision, exits=(1,)))).shapes
CONFIG = OptimConfig(warmup_steps=0, weight_decay=0.0, clip_norm=0.0, lr=1e-2, exit_lr=1e-2, temperature_lr=1e-2)


def moved(config, freeze=()):
    """{path: the largest change of one step with equal gradients}."""
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), SHAPES)
    optimizer = make_optimizer(config, 10, freeze)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    return {path: float(np.abs(leaf).max()) for path, leaf in pytree.flatten(updates).items()}


def test_what_a_regex_finds_does_not_move_and_all_else_does():
    found = moved(CONFIG, ("text", r"vision/blocks/0/", "pos$"))
    still = {path for path, by in found.items() if by == 0}
    expected = {p for p in found if p.startswith(("text/", "vision/blocks/0/")) or p.endswith("pos")}
    assert still == expected and any("vision/blocks/1/" in p for p in set(found) - still)
    assert not trainable("vision/blocks/0/ln1/scale", ("vision/blocks/0/",))


def test_rates_are_shares_of_the_groups_rate_and_the_first_fits():
    config = dataclasses.replace(CONFIG, rates=(r"mlp/=0.0", r"vision/blocks/=0.1", r"^text/=0.5"))
    plain, found = moved(CONFIG), moved(config)
    for path, by in found.items():
        share = 0.0 if "mlp/" in path else 0.1 if "vision/blocks/" in path else 0.5 if path.startswith("text/") else 1.0
        assert by == pytest.approx(share * plain[path], rel=1e-5), path
        assert rate_share(path, config.rates) == share


@pytest.mark.parametrize("freeze, rates, message", [
    (("imgae",), (), r"train.freeze contains 'imgae', which matches none of.*closest: image"),
    ((), ("vison/blocks/=0.1",), r"rates contains 'vison/blocks/', which matches none of.*closest: vision/blocks/"),
    ((".",), (), "freezes every parameter"),
])  # fmt: skip
def test_a_regex_that_finds_nothing_is_an_error(freeze, rates, message):
    require_matches(("image", "vision/blocks/1/"), ("vision=2",), SHAPES)
    with pytest.raises(ConfigError, match=message):
        require_matches(freeze, rates, SHAPES)

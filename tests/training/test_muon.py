"""Muon: which parameters it orthogonalises, what its updates are, and that a run with it is continued like any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from icar_jax import pytree
from icar_jax.config import ConfigError, OptimConfig, validate
from icar_jax.models import variants
from icar_jax.models.clip import Clip
from icar_jax.training.loop import train
from icar_jax.training.optimizer import make_optimizer, orthogonalised, schedule, state_like
from tests.support.runs import metric_lines, tiny_config

SHAPES = Clip.graph(variants.CLIP["vit_tests"]).shapes


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return pytree.map_with_path(lambda _, leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), jnp.float32), SHAPES)


def test_it_orthogonalises_the_matrices_that_multiply_and_nothing_else():
    chosen = {path for path, leaf in pytree.flatten(SHAPES).items() if orthogonalised(path, len(leaf.shape))}
    assert {path.rsplit("/", 2)[-2] for path in chosen} == {"qkv", "out", "fc1", "fc2", "proj"}
    assert not [path for path in chosen if "embed" in path or "pos" in path or "conv" in path]


@pytest.mark.parametrize("freeze", [(), ("text",)])
def test_updates_of_matrices_are_orthogonal_and_of_the_size_of_adams(freeze):
    config = OptimConfig(kind="muon", lr=0.1, weight_decay=0.0, clip_norm=0.0, warmup_steps=0)
    optimizer, adam = (make_optimizer(c, 10, freeze) for c in (config, dataclasses.replace(config, kind="adamw")))
    params, grads = tree(0), tree(1, 1e-3)
    found, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    plain, _ = jax.jit(adam.update)(grads, adam.init(params), params)
    rate = 0.1 * float(schedule(config, 10)(0))
    for path, update in pytree.flatten(found).items():
        update = np.asarray(update, np.float64)
        if freeze and path.startswith("text/"):
            assert not update.any(), path
        elif orthogonalised(path, update.ndim):
            values = np.linalg.svd(update / rate / (0.2 * max(update.shape) ** 0.5), compute_uv=False)
            # Four steps bring all but the smallest near one.
            assert 0.6 < np.quantile(values, 0.05) and values.max() < 1.3, (path, values.min(), values.max())
            assert np.sqrt(np.mean(update**2)) == pytest.approx(0.2 * rate, rel=0.3), path
        else:
            np.testing.assert_allclose(update, pytree.flatten(plain)[path], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("freeze", [(), ("text",)])
def test_every_moment_follows_its_parameter(kind, freeze):
    optimizer = make_optimizer(OptimConfig(kind=kind), 10, freeze)
    named = state_like(optimizer, SHAPES, pytree.map_with_path(lambda path, _: path, SHAPES), "other")
    shapes = jax.eval_shape(optimizer.init, SHAPES)
    assert jax.tree.structure(named) == jax.tree.structure(shapes)
    flat, held = pytree.flatten(SHAPES), []
    for name, leaf in zip(jax.tree.leaves(named), jax.tree.leaves(shapes), strict=True):
        assert name == "other" or flat[name].shape == leaf.shape
        held += [name] * (name != "other")
    learns = [path for path in flat if not (freeze and path.startswith("text/"))]
    moments = lambda path: 1 if kind == "muon" and orthogonalised(path, len(flat[path].shape)) else 2
    assert sorted(held) == sorted(path for path in learns for _ in range(moments(path)))


def test_a_run_with_it_learns_and_is_continued_bit_for_bit(tmp_path):
    config = tiny_config(steps=4)
    config.optim = OptimConfig(kind="muon", warmup_steps=2, mu_dtype="bfloat16")
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut", stop_after=2)
    train(config, tmp_path / "cut")
    losses = [[line["loss"] for line in metric_lines(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1] and np.isfinite(losses[0]).all()
    changed = tiny_config(steps=4)
    with pytest.raises(ConfigError, match="config.optim.kind was 'muon', now 'adamw'"):
        train(changed, tmp_path / "cut")


def test_an_unknown_optimizer_is_named():
    config = tiny_config()
    config.optim.kind = "moun"
    with pytest.raises(ConfigError, match="config.optim.kind='moun' is not known; choose one of adamw, muon; did you mean"):
        validate(config)


def test_plain_adamw_is_what_it_was():
    """The chain as it stood before Muon, against the optimizer as it is."""
    config, params, grads = OptimConfig(clip_norm=0.0), tree(0), tree(1, 1e-3)
    before = optax.scale_by_adam(config.b1, config.b2, config.eps)
    plain, _ = jax.jit(before.update)(grads, before.init(params), params)
    optimizer = make_optimizer(config, 1000)
    found, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    rate = config.lr * float(schedule(config, 1000)(0))
    kernel = "vision/blocks/0/mlp/fc1/kernel"
    expected = -rate * (pytree.flatten(plain)[kernel] + config.weight_decay * pytree.flatten(params)[kernel])
    np.testing.assert_allclose(pytree.flatten(found)[kernel], expected, rtol=1e-5)

"""Class-activation maps: exact for linear heads, equal to the definition for both heads, with unchanged scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.models.complexity import ComplexityArch, ComplexityModel, activation_map
from icar_jax.models.convnext import ConvNeXt, ConvNeXtArch

# Few blocks and shared programs, since compiling the depthwise convolutions is slow.
BACKBONE = ConvNeXtArch((0, 1, 0, 1), (8, 8, 12, 16))


@functools.cache
def model_of(head, seed=0):
    model = ComplexityModel.graph(ComplexityArch(BACKBONE, head, 64))
    leaves, tree = jax.tree.flatten(model.shapes)
    rng = np.random.default_rng(seed)
    # Not by `init`, which is slow.
    params = tree.unflatten([rng.normal(0.3, 0.3, x.shape).astype(np.float32) for x in leaves])
    return model, params


def pictures(n=3, seed=1):
    return np.random.default_rng(seed).standard_normal((n, 64, 64, 3)).astype(np.float32)


@jax.jit
def linear_map(features, kernel):
    return activation_map(lambda x: x.mean(axis=(1, 2)) @ kernel + 0.7, features)


@jax.jit
def relu_map(features, first, last):
    return activation_map(lambda x: jax.nn.relu(x.mean(axis=(1, 2)) @ first) @ last, features)


# One shape, so that all examples use one program.
@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), st.floats(0.01, 10))
def test_the_mean_of_a_linear_heads_map_is_its_output_without_the_bias(seed, scale):
    rng = np.random.default_rng(seed)
    features, kernel = rng.normal(0, scale, (2, 3, 4, 5)).astype(np.float32), rng.standard_normal(5).astype(np.float32)
    values, found = linear_map(features, kernel)
    np.testing.assert_allclose(found, features @ kernel, rtol=1e-4, atol=1e-5)  # Zhou et al. 2016, equation 2
    np.testing.assert_allclose(found.mean(axis=(1, 2)), values - 0.7, rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31))
def test_the_mean_of_a_relu_networks_map_is_its_output_without_biases(seed):
    # Without biases the network is homogeneous: f(x) = <grad f(x), x> (Euler).
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    first, last = rng.standard_normal((5, 7)).astype(np.float32), rng.standard_normal(7).astype(np.float32)
    values, found = relu_map(features, first, last)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), values, rtol=1e-4, atol=1e-4)


@functools.cache
def score_and_map(head, stage):
    model, params = model_of(head)
    return jax.jit(model.score_and_map, static_argnums=2)(params, pictures(), stage)


@functools.cache
def features_of(head):
    backbone = ConvNeXt.graph(BACKBONE)
    _, params = model_of(head)
    return jax.jit(lambda p, x: backbone.feature_map(p, x, 4))(params["backbone"], pictures())


@pytest.mark.parametrize("head, stage", [("classification", 4), ("regression", 4), ("regression", 2)])
def test_the_map_has_the_stages_stride_and_the_score_is_that_of_the_head(head, stage):
    score, found = score_and_map(head, stage)
    side = 64 // 2 ** (stage + 1)
    assert found.shape == (3, side, side) and found.dtype == jnp.float32
    assert np.abs(found).max() > 1e-4
    logits = jax.vmap(functools.partial(logit, head, model_of(head)[1]))(features_of(head).mean(axis=(1, 2)))
    np.testing.assert_allclose(score, jax.nn.sigmoid(logits), atol=1e-5)


@pytest.mark.parametrize("head", ["classification", "regression"])
def test_after_stage_4_it_is_the_gradient_by_the_pooled_features(head):
    _, found = score_and_map(head, 4)
    features = features_of(head)
    gradient = jax.vmap(jax.grad(functools.partial(logit, head, model_of(head)[1])))(features.mean(axis=(1, 2)))
    # Cells are sums of terms of both signs, up to 250 times the map's extremes, which determine float32 rounding.
    terms = np.einsum("bhwc,bc->bhw", np.abs(features), np.abs(gradient))
    expected = np.einsum("bhwc,bc->bhw", np.float64(features), np.float64(gradient))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * terms.max())
    # Both norms ignore a common scale of the channels, so parts of one image are compared.
    assert np.all(np.abs(found.mean(axis=(1, 2))) < 0.05 * np.abs(found).max(axis=(1, 2)))


def logit(head, params, pooled):
    """Log odds of 'complex' of pooled features [C]; independent implementation."""
    x = norm(pooled, params["backbone"]["head"]["norm"], 1e-6)
    x, p = norm(x, params["head"]["norm"], 1e-5), params["head"]
    if head == "classification":
        a, b = x @ p["fc"]["kernel"] + p["fc"]["bias"]
        return b - a
    x = jax.nn.relu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"])
    x = jax.nn.relu(x @ p["fc2"]["kernel"] + p["fc2"]["bias"])
    return (x @ p["fc3"]["kernel"] + p["fc3"]["bias"])[0]


def norm(x, p, eps):
    return (x - x.mean()) * jax.lax.rsqrt(x.var() + eps) * p["scale"] + p["bias"]


def test_other_stages_are_refused():
    model, params = model_of("regression")
    for stage in (0, 1, 5, -1):
        with pytest.raises(ValueError, match="stage 2, 3, 4, not"):
            model.score_and_map(params, pictures(1), stage)

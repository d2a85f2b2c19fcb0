"""The losses of the complexity model, their class weights, and the weights of the exits, against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax.training.losses.contrastive import class_weights, complexity_loss, exit_weights
from icar_jax.training.losses.exits import distill_init

LOGITS = np.random.default_rng(0).standard_normal((6, 2)).astype(np.float32)
RATED = np.array([0.1, 0.5, 0.9, 0.5001, 0.2, 1.0], np.float32)


def test_exit_weights_sum_to_one_and_are_equal_unless_given():
    assert exit_weights((), (2, 4, 6)) == {2: 1 / 3, 4: 1 / 3, 6: 1 / 3}
    assert exit_weights((1.0, 0.0, 3.0), (2, 4, 6)) == {2: 0.25, 4: 0.0, 6: 0.75}
    with pytest.raises(ValueError):
        exit_weights((1.0, 2.0), (2, 4, 6))


def test_balanced_class_weights():
    assert class_weights("none", (30, 10)) == (1.0, 1.0)
    assert class_weights("balanced", (30, 10)) == (40 / 60, 40 / 20)
    assert class_weights("balanced", (5, 5)) == (1.0, 1.0)


def test_regression_is_the_squared_error_of_the_score():
    expected = np.mean((1 / (1 + np.exp(-LOGITS[:, 0].astype(np.float64))) - RATED) ** 2)
    assert complexity_loss(LOGITS[:, :1], RATED, "regression", 0.5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.25, 3.0)])
def test_classification_is_weighted_cross_entropy_above_the_threshold(weights):
    labels = np.array([0, 0, 1, 1, 0, 1])  # the threshold itself is simple
    log_p = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum(1, keepdims=True))
    each = -log_p[np.arange(6), labels] * np.array(weights)[labels]
    found = jax.jit(lambda x: complexity_loss(x, jnp.asarray(RATED), "classification", 0.5, weights))(LOGITS)
    assert found == pytest.approx(each.mean(), rel=1e-5) and found > 0


def test_distillation_from_the_initial_weights_sums_weighted_distances():
    rng = np.random.default_rng(1)
    unit = lambda: (lambda z: z / np.linalg.norm(z, axis=1, keepdims=True))(rng.standard_normal((5, 4)))
    images, held, weights = {2: unit(), 6: unit()}, unit(), {2: 0.2, 6: 0.7}
    expected = sum(weights[e] * np.mean(1 - np.sum(z * held, axis=1)) for e, z in images.items())
    assert distill_init(images, held, weights) == pytest.approx(expected, rel=1e-6)
    assert distill_init({2: held, 6: held}, held, weights) == pytest.approx(0, abs=1e-6)

"""Ridge regression in closed form, against its normal equations, and correlations within categories."""

import numpy as np
import pytest

from icar_jax.errors import DataError
from icar_jax.evaluation.metrics import ratings, within
from icar_jax.evaluation.metrics.ridge import Ridge


def problem(n=40, features=7, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, features)) * rng.uniform(0.1, 10, features) + rng.normal(size=features)
    return x, x @ rng.normal(size=features) + rng.normal(size=n)


def normal_equations(x, y, penalty, groups):
    """Ridge regression of standardised, weighted features by its normal equations; returns predictions of any rows."""
    mean, deviation = x.mean(0), x.std(0)
    weight = np.concatenate([np.full(size, size**-0.5) for size in groups])
    z = (x - mean) / deviation * weight
    scale = np.square(z).sum() / len(z)
    beta = np.linalg.solve(z.T @ z + penalty * scale * np.eye(z.shape[1]), z.T @ (y - y.mean()))
    return lambda rows: (rows - mean) / deviation * weight @ beta + y.mean()


@pytest.mark.parametrize("shape", [(40, 7), (12, 30)])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_equals_the_normal_equations(shape, penalty):
    x, y = problem(*shape)
    groups = (3, shape[1] - 3)
    expected = normal_equations(x, y, penalty, groups)(x)
    np.testing.assert_allclose(Ridge(x, y, groups).fit(penalty)(x), expected, rtol=1e-6, atol=1e-6)


def test_left_out_predictions_are_those_of_fits_without_the_row():
    x, y = problem(20, 4)
    x, y = (x - x.mean(0)) / x.std(0), y - y.mean()
    found = Ridge(x, y).left_out(0.5)
    scale = 0.5 * np.square(x / 2).sum() / len(x)  # 4 features in one group weigh 1 / 2 each
    for i in range(len(x)):
        rest = np.delete(x, i, 0) / 2
        beta = np.linalg.solve(rest.T @ rest + scale * np.eye(4), rest.T @ np.delete(y, i))
        assert found[i] == pytest.approx(x[i] / 2 @ beta, abs=1e-8)


def test_noise_asks_for_a_larger_penalty_than_a_clean_line():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 40))
    clean, noise = x[:, 0] * 3, rng.normal(size=60)
    quality = lambda truth: lambda predicted: -np.square(predicted - truth).mean()
    penalties = (1e-4, 1e-2, 1.0, 100.0)
    assert Ridge(x, noise).best(penalties, quality(noise)).penalty > Ridge(x, clean).best(penalties, quality(clean)).penalty


def test_too_few_images():
    with pytest.raises(DataError, match="at least 3 images, found 2"):
        Ridge(np.zeros((2, 3)), np.zeros(2))


def test_correlations_within_categories_ignore_differences_between_them():
    rng = np.random.default_rng(0)
    categories = ["a"] * 30 + ["b"] * 30
    rated = rng.uniform(size=60)
    predicted = rated + rng.normal(size=60) * 0.1 + np.repeat([0.0, 5.0], 30)
    found = within.within("pcc", predicted, rated, categories, 200)
    expected = {"a": ratings.pcc(predicted[:30], rated[:30]), "b": ratings.pcc(predicted[30:], rated[30:])}
    assert {name: found[name].value for name in expected} == pytest.approx(expected)
    mean = found[within.MEAN]
    assert mean.value == pytest.approx(np.mean(list(expected.values()))) and mean.low < mean.value < mean.high
    assert mean.high - mean.low < max(found[name].high - found[name].low for name in expected)
    assert ratings.pcc(predicted, rated) < 0.5 < mean.value
    itself = within.mean_difference("pcc", predicted, predicted, rated, categories, 200)
    assert (itself.value, itself.low, itself.high) == (0, 0, 0)
    better = within.mean_difference("pcc", predicted, rng.normal(size=60), rated, categories, 200)
    assert better.low > 0


def test_standardised_ratings():
    rated = np.array([0.1, 0.2, 0.3, 0.5, 0.9, 0.4])
    found = within.standardised(rated, list("aaabbc"))
    np.testing.assert_allclose(found, [-1.2247449, 0, 1.2247449, -1, 1, 0], atol=1e-6)

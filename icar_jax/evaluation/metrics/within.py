"""Correlations within categories, for ratings that are only comparable within one, and their mean over the categories."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from icar_jax.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, bounds
from icar_jax.evaluation.metrics.ratings import MAX_UNDEFINED, Estimate, estimate, resampled, value

MEAN = "mean"  # of the categories, unweighted


def within(
    metric: str, predicted: np.ndarray, rated: np.ndarray, categories: Sequence[str], n: int = RESAMPLES
) -> dict[str, Estimate]:
    """Returns category -> a metric of `ratings.OF_RATINGS` with its interval, and 'mean' over the categories.

    predicted, rated: [N]. Images are resampled within each category. Raises MetricError if a category has equal ratings or
    predictions.
    """
    where = indices(categories)
    found = {name: estimate(metric, predicted[rows], rated[rows], n=n) for name, rows in where.items()}
    point = float(np.mean([value(metric, predicted[rows], rated[rows]) for rows in where.values()]))
    return {**found, MEAN: _bounded(point, mean_resampled(metric, predicted, rated, categories, n))}


def mean_difference(
    metric: str, predicted: np.ndarray, other: np.ndarray, rated: np.ndarray, categories: Sequence[str], n: int = RESAMPLES
) -> Estimate:
    """Returns the mean over categories of metric(predicted) - metric(other), with its paired interval."""
    point = mean_within(metric, predicted, rated, categories) - mean_within(metric, other, rated, categories)
    draws = [mean_resampled(metric, scores, rated, categories, n) for scores in (predicted, other)]
    return _bounded(point, draws[0] - draws[1])


def mean_within(metric: str, predicted: np.ndarray, rated: np.ndarray, categories: Sequence[str]) -> float:
    """Returns the mean over the categories of a metric. Raises MetricError as `within`."""
    return float(np.mean([value(metric, predicted[rows], rated[rows]) for rows in indices(categories).values()]))


def mean_resampled(metric: str, predicted: np.ndarray, rated: np.ndarray, categories: Sequence[str], n: int) -> np.ndarray:
    """Returns the mean over the categories in each of `n` resamples, [n]; equal for all predictors of the same images."""
    draws = [
        resampled(metric, predicted[rows], rated[rows], n=n, seed=i) for i, rows in enumerate(indices(categories).values())
    ]
    return np.mean(draws, axis=0)


def indices(categories: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns category -> indices of its images, categories in alphabetical order."""
    names = np.asarray(categories)
    return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}


def standardised(rated: np.ndarray, categories: Sequence[str]) -> np.ndarray:
    """Returns ratings [N] with mean 0 and standard deviation 1 in each category; equal ratings become 0."""
    found = np.zeros(len(rated))
    for rows in indices(categories).values():
        part = np.asarray(rated[rows], np.float64)
        found[rows] = (part - part.mean()) / (part.std() or 1.0)
    return found


def _bounded(point: float, draws: np.ndarray) -> Estimate:
    good = draws[np.isfinite(draws)]
    if len(draws) - len(good) > MAX_UNDEFINED * len(draws):
        return Estimate(point)
    found = bounds(point, good, LEVEL)
    return Estimate(found.value, found.low, found.high)

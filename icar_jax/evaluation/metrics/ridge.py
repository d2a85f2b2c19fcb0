"""Ridge regression in closed form, with the penalty chosen by the predictions of left-out images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from icar_jax.errors import DataError


@dataclass(frozen=True)
class RidgeFit:
    """Prediction ((x - mean) / deviation) @ weights + constant, for features x [N, F]; float64."""

    mean: np.ndarray
    deviation: np.ndarray
    weights: np.ndarray
    constant: float
    penalty: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Predicts [N]."""
        return (features - self.mean) / self.deviation @ self.weights + self.constant


class Ridge:
    """Ridge regression of targets [N] on features [N, F], prepared for many penalties by one eigendecomposition.

    Features are standardised. Those of a group, such as one layer, share a weight of 1 / sqrt(its size), so that a wide layer
    counts no more than a narrow one. A penalty is a share of the mean squared norm of the standardised features.

    groups: sizes of consecutive groups of features; empty is one group. Raises DataError for fewer than three rows.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, groups: Sequence[int] = ()):
        x, y = np.asarray(features, np.float64), np.asarray(targets, np.float64)
        if len(x) < 3:
            raise DataError(f"ridge regression needs at least 3 images, found {len(x)}")
        sizes = list(groups) or [x.shape[1]]
        self._weight = np.concatenate([np.full(size, size**-0.5) for size in sizes])
        self.mean, self.deviation = x.mean(axis=0), x.std(axis=0)
        self.deviation = np.where(self.deviation > 1e-9, self.deviation, 1.0)
        self._x = (x - self.mean) / self.deviation * self._weight
        self.constant = float(y.mean())
        self._targets = y
        gram = self._x @ self._x.T
        self._scale = np.trace(gram) / len(x) or 1.0
        self._values, self._vectors = np.linalg.eigh(gram)
        self._turned = self._vectors.T @ (y - self.constant)

    def fit(self, penalty: float) -> RidgeFit:
        """Returns the fit with a penalty > 0."""
        dual = self._vectors @ (self._turned / (np.maximum(self._values, 0) + penalty * self._scale))
        return RidgeFit(self.mean, self.deviation, self._x.T @ dual * self._weight, self.constant, penalty)

    def left_out(self, penalty: float) -> np.ndarray:
        """Returns the prediction [N] of each target by the fit on all others, for the standardisation of all."""
        inverse = 1 / (np.maximum(self._values, 0) + penalty * self._scale)
        dual = self._vectors @ (self._turned * inverse)
        return self._targets - dual / (np.square(self._vectors) @ inverse)

    def best(self, penalties: Sequence[float], quality: Callable[[np.ndarray], float]) -> RidgeFit:
        """Returns the fit with the penalty whose left-out predictions [N] have the highest `quality`."""
        return self.fit(penalties[int(np.argmax([quality(self.left_out(penalty)) for penalty in penalties]))])

"""Agreement of complexity predictions with known complexity, computed from arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import numpy as np
from tqdm import tqdm

from icar_jax.evaluation.metrics import ratings as m
from icar_jax.evaluation.records.complexity import Margin, NuisanceLevel

LEVELS = ("low", "mid", "high")
OF_CLASSIFIERS = (*m.OF_DECISIONS, *m.OF_SCORES)


@dataclass(frozen=True)
class Predictions:
    """One predictor's scores [N] in [0, 1], and the decision threshold if it is a classifier."""

    scores: np.ndarray
    threshold: float | None = None

    @property
    def decided(self) -> np.ndarray:
        """Decisions, bool [N]: whether the score is strictly above the threshold, compared as float32."""
        return np.asarray(self.scores, np.float32) > np.float32(self.threshold)

    def input_of(self, metric: str) -> np.ndarray:
        """Returns the input of a metric: decisions or scores [N]."""
        return self.decided if metric in m.OF_DECISIONS else self.scores


def rows(
    predictors: Mapping[str, Predictions], truth: np.ndarray, metrics: tuple[str, ...], n: int
) -> dict[str, dict[str, m.Estimate]]:
    """Returns predictor -> metric -> estimate on all images. Raises MetricError if a metric is undefined on all images."""
    with tqdm(total=len(predictors) * len(metrics), desc="bootstrap", unit="interval") as bar:

        def estimate(metric: str, predicted: Predictions) -> m.Estimate:
            bar.update()
            return m.estimate(metric, predicted.input_of(metric), truth, n=n)

        return {name: {metric: estimate(metric, p) for metric in metrics} for name, p in predictors.items()}


def margin(metric: str, model: Predictions, others: Mapping[str, Predictions], truth: np.ndarray, n: int) -> Margin:
    """Returns the model's margin over the best of the others by a metric, with a paired bootstrap interval.

    The best is chosen on the same images, which favours it.
    """
    best = max(others, key=lambda name: m.value(metric, others[name].input_of(metric), truth))
    first, second = model.input_of(metric), others[best].input_of(metric)
    try:
        found = m.difference(metric, first, second, truth, n=n)
    except m.MetricError:
        # Raises again if the metric itself is undefined.
        apart = m.value(metric, first, truth) - m.value(metric, second, truth)
        return Margin(metric, best, apart, None, None, None)
    return Margin(metric, best, *astuple(found), found.includes_zero)


def by_level(
    predictors: Mapping[str, Predictions], truth: np.ndarray, nuisances: Mapping[str, np.ndarray], n: int
) -> dict[str, dict[str, NuisanceLevel]]:
    """Returns nuisance -> level -> the PCC of each predictor on that third of the images. nuisances: name -> [N]."""
    result = {}
    for name, values in nuisances.items():
        thirds = np.array_split(np.argsort(values, kind="stable"), len(LEVELS))
        result[name] = {
            level: NuisanceLevel(
                float(values[part].min()),
                float(values[part].max()),
                len(part),
                {key: _pcc(p.scores[part], truth[part], n) for key, p in predictors.items()},
            )
            for level, part in zip(LEVELS, thirds)
            if len(part)
        }
    return result


def _pcc(scores: np.ndarray, truth: np.ndarray, n: int) -> m.Estimate | None:
    try:
        return m.estimate("pcc", scores, truth, n=n)
    except m.MetricError:
        return None

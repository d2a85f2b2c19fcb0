"""Agreement of complexity predictions with known complexity, as rows of a report computed from arrays.

A row is {metric: {'value', 'low', 'high'}}; low and high are None if there are too few images, or too few of one class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from icar_jax.evaluation.metrics import ratings as m

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
) -> dict[str, dict[str, Any]]:
    """Returns {predictor: {metric: interval}} on all images. Raises MetricError if a metric is undefined on all images."""
    with tqdm(total=len(predictors) * len(metrics), desc="bootstrap", unit="interval") as bar:

        def row(metric: str, predicted: Predictions) -> dict[str, float | None]:
            bar.update()
            return _row(metric, predicted, truth, n)

        return {name: {metric: row(metric, p) for metric in metrics} for name, p in predictors.items()}


def margin(metric: str, model: Predictions, others: Mapping[str, Predictions], truth: np.ndarray, n: int) -> dict[str, Any]:
    """Returns the model's margin over the best of the others by a metric, with a paired bootstrap interval.

    Returns {'metric', 'over', 'value', 'low', 'high', 'includes_zero'}; the last three are None without an interval. The best
    is chosen on the same images, which favours it.
    """
    best = max(others, key=lambda name: m.value(metric, others[name].input_of(metric), truth))
    first, second = model.input_of(metric), others[best].input_of(metric)
    try:
        found = m.difference(metric, first, second, truth, n=n)
    except m.MetricError:
        # Raises again if the metric itself is undefined.
        apart = m.value(metric, first, truth) - m.value(metric, second, truth)
        return {"metric": metric, "over": best, "value": apart, "low": None, "high": None, "includes_zero": None}
    return {"metric": metric, "over": best, **asdict(found), "includes_zero": found.includes_zero}


def by_level(
    predictors: Mapping[str, Predictions], truth: np.ndarray, nuisances: Mapping[str, np.ndarray], n: int
) -> dict[str, dict[str, Any]]:
    """Returns the PCC of each predictor on the low, middle and high third of the images by each nuisance.

    nuisances: name -> [N]. Returns {nuisance: {level: {'from', 'to', 'images', 'pcc': {predictor: interval}}}}; an undefined
    PCC, for example with equal ratings, is None.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, values in nuisances.items():
        thirds = np.array_split(np.argsort(values, kind="stable"), len(LEVELS))
        result[name] = {
            level: {
                "from": float(values[part].min()),
                "to": float(values[part].max()),
                "images": len(part),
                "pcc": {key: _pcc(p.scores[part], truth[part], n) for key, p in predictors.items()},
            }
            for level, part in zip(LEVELS, thirds)
            if len(part)
        }
    return result


def _row(metric: str, predicted: Predictions, truth: np.ndarray, n: int) -> dict[str, float | None]:
    try:
        return asdict(m.interval(metric, predicted.input_of(metric), truth, n=n))
    except m.MetricError:
        # Raises again if the metric itself is undefined.
        return {"value": m.value(metric, predicted.input_of(metric), truth), "low": None, "high": None}


def _pcc(scores: np.ndarray, truth: np.ndarray, n: int) -> dict[str, float | None] | None:
    try:
        return _row("pcc", Predictions(scores), truth, n)
    except m.MetricError:
        return None

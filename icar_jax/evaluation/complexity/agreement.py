"""How well predictions of complexity agree with what is known of the same images: rows of a report, from arrays alone.

A row is {metric: {'value', 'low', 'high'}}; the interval is None where too few images, or too few of a class, allow one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from icar_jax.evaluation.metrics import ratings as m

LEVELS = ("low", "mid", "high")
OF_CLASSIFIERS = (*m.OF_DECISIONS, *m.OF_SCORES)


@dataclass(frozen=True)
class Predictions:
    """One predictor on N images: scores [N] in [0, 1], and the decision threshold of a classifier."""

    scores: np.ndarray
    threshold: float | None = None

    @property
    def decided(self) -> np.ndarray:
        """bool [N]: strictly above the threshold, as float32."""
        return np.asarray(self.scores, np.float32) > np.float32(self.threshold)

    def input_of(self, metric: str) -> np.ndarray:
        """What a metric is computed from: decisions or scores."""
        return self.decided if metric in m.OF_DECISIONS else self.scores


def rows(
    predictors: Mapping[str, Predictions], truth: np.ndarray, metrics: tuple[str, ...], n: int
) -> dict[str, dict[str, Any]]:
    """{predictor: {metric: interval}} on all images. Raises MetricError where a metric of all images has no value."""
    with tqdm(total=len(predictors) * len(metrics), desc="bootstrap", unit="interval") as bar:

        def row(metric: str, predicted: Predictions) -> dict[str, float | None]:
            bar.update()
            return _row(metric, predicted, truth, n)

        return {name: {metric: row(metric, p) for metric in metrics} for name, p in predictors.items()}


def margin(metric: str, model: Predictions, others: Mapping[str, Predictions], truth: np.ndarray, n: int) -> dict[str, Any]:
    """The best of the others by a metric, and the model's margin over it on the same resamples.

    Returns {'metric', 'over', 'value', 'low', 'high', 'includes_zero'}, the last three None where there is no interval. The
    best is chosen on these very images, which favours it.
    """
    best = max(others, key=lambda name: m.value(metric, others[name].input_of(metric), truth))
    first, second = model.input_of(metric), others[best].input_of(metric)
    try:
        found = m.difference(metric, first, second, truth, n=n)
    except m.MetricError:
        # Raises again where there is not even a value.
        apart = m.value(metric, first, truth) - m.value(metric, second, truth)
        return {"metric": metric, "over": best, "value": apart, "low": None, "high": None, "includes_zero": None}
    return {"metric": metric, "over": best, **found.as_dict(), "includes_zero": found.includes_zero}


def by_level(
    predictors: Mapping[str, Predictions], truth: np.ndarray, nuisances: Mapping[str, np.ndarray], n: int
) -> dict[str, dict[str, Any]]:
    """PCC of each predictor on the images with a low, middle or high value of each nuisance: thirds of equal number.

    nuisances: name -> [N]. Returns {nuisance: {level: {'from', 'to', 'images', 'pcc': {predictor: interval}}}}; a PCC that
    has no value, as of three images rated alike, is None.
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
        return m.interval(metric, predicted.input_of(metric), truth, n=n).as_dict()
    except m.MetricError:
        # Raises again where there is not even a value.
        return {"value": m.value(metric, predicted.input_of(metric), truth), "low": None, "high": None}


def _pcc(scores: np.ndarray, truth: np.ndarray, n: int) -> dict[str, float | None] | None:
    try:
        return _row("pcc", Predictions(scores), truth, n)
    except m.MetricError:
        return None

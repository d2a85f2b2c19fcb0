"""Agreement of predicted complexity with human ratings or labels, with bootstrap intervals, in numpy.

Every metric is a function of how often each image was drawn: `counts` [R, N] -> [R]. The metric of the data set uses one row
of ones; its interval uses one row per resample (`bootstrap.resample_counts`). Ranks, curves and bins are computed from the
counts, so there is no loop over resamples.

Ratings: pcc, srcc, rmse, rmae, as IC9600 defines them (Feng et al. 2023: RMSE = sqrt(mean e^2), RMAE = sqrt(mean |e|)).
Labels: accuracy, f1, balanced_accuracy, youden for decisions; roc_auc and ece for scores. The positive class is 'complex'.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from icar_jax.errors import IcarError
from icar_jax.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Interval, bounds, resample_counts

ECE_BINS = 15
OF_RATINGS = ("pcc", "srcc", "rmse", "rmae")
OF_DECISIONS = ("accuracy", "f1", "balanced_accuracy", "youden")
OF_SCORES = ("roc_auc", "ece")
MAX_UNDEFINED = 0.05  # largest share of resamples that may be undefined (one class, no variance) and are dropped
_CONSTANT = 1e-14  # largest variance, of values scaled to [-1, 1], that is due to rounding alone

Statistic = Callable[[np.ndarray], np.ndarray]  # counts [R, N] -> [R], nan where undefined


class MetricError(IcarError, ValueError):
    """A metric is undefined for these inputs; the message says why."""


@dataclass(frozen=True)
class Confusion:
    """Counts of images by decision and label; positive means complex."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int


@dataclass(frozen=True)
class Estimate:
    """A metric with the bounds of its bootstrap interval.

    low, high: None where there are too few images for an interval, or too few of one class; value: None where it is undefined.
    """

    value: float | None
    low: float | None = None
    high: float | None = None


def pcc(predicted: Any, rated: Any) -> float:
    """Pearson's correlation of two arrays [N]. Raises MetricError if either is constant."""
    return value("pcc", predicted, rated)


def srcc(predicted: Any, rated: Any) -> float:
    """Spearman's rank correlation of two arrays [N]; ties take their average rank. Raises as `pcc` does."""
    return value("srcc", predicted, rated)


def rmse(predicted: Any, rated: Any) -> float:
    """sqrt(mean e^2) of two arrays [N]."""
    return value("rmse", predicted, rated)


def rmae(predicted: Any, rated: Any) -> float:
    """sqrt(mean |e|) of two arrays [N]: root of the mean absolute error, as IC9600 defines it."""
    return value("rmae", predicted, rated)


def accuracy(decided: Any, labels: Any) -> float:
    """Fraction of correct decisions; two arrays [N] of bool, 0 or 1."""
    return value("accuracy", decided, labels)


def f1(decided: Any, labels: Any) -> float:
    """2 TP / (2 TP + FP + FN) for the class 'complex'; 0 if no image is complex and none was predicted complex."""
    return value("f1", decided, labels)


def balanced_accuracy(decided: Any, labels: Any) -> float:
    """Mean of the true positive and true negative rates. Raises MetricError if the labels hold only one class."""
    return value("balanced_accuracy", decided, labels)


def youden(decided: Any, labels: Any) -> float:
    """Youden's J = true positive rate + true negative rate - 1, in [-1, 1]. Raises as `balanced_accuracy` does."""
    return value("youden", decided, labels)


def roc_auc(scores: Any, labels: Any) -> float:
    """Share of (complex, simple) pairs that the scores order correctly; ties count half. Raises MetricError for one class."""
    return value("roc_auc", scores, labels)


def ece(scores: Any, labels: Any) -> float:
    """Expected calibration error of p(complex): sum over bins of (share of images) x |mean score - share of complex images|.

    Uses 15 bins of equal width, (i / 15, (i + 1) / 15], the first closed below (Naeini et al. 2015; for one class as in
    scikit-learn's calibration_curve). Sampling noise biases ECE upwards, so small samples and bootstrap intervals are biased
    upwards. Raises MetricError for scores outside [0, 1].
    """
    return value("ece", scores, labels)


def confusion(decided: Any, labels: Any) -> Confusion:
    """Returns the confusion counts of two arrays [N] of bool, 0 or 1."""
    d, y = _checked("accuracy", decided, labels)
    return Confusion(int((d * y).sum()), int((d * (1 - y)).sum()), int(((1 - d) * (1 - y)).sum()), int(((1 - d) * y).sum()))


def rate(metric: str, tp: np.ndarray, fp: np.ndarray, tn: np.ndarray, fn: np.ndarray) -> np.ndarray:
    """Computes one of OF_DECISIONS from equally shaped arrays of counts; 0/0 counts as 0, as in ICAR's threshold search."""
    if metric == "accuracy":
        return _ratio(tp + tn, tp + fp + tn + fn)
    if metric == "f1":
        return _ratio(2 * tp, 2 * tp + fp + fn)
    sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    if metric == "balanced_accuracy":
        return (sensitivity + specificity) / 2
    if metric == "youden":
        return sensitivity + specificity - 1
    raise MetricError(f"unknown metric {metric!r} of decisions; expected one of {', '.join(OF_DECISIONS)}")


def value(metric: str, predicted: Any, truth: Any) -> float:
    """Computes a metric by name from predicted [N] and truth [N].

    predicted: ratings for OF_RATINGS, decisions (0 or 1) for OF_DECISIONS, scores for OF_SCORES. truth: ratings or labels.
    Raises MetricError for different shapes, non-finite values, and if the metric is undefined.
    """
    statistic, n = _statistic(metric, predicted, truth)
    point = float(statistic(np.ones((1, n)))[0])
    if not np.isfinite(point):
        raise MetricError(_undefined(metric, predicted, truth))
    return point


def interval(metric: str, predicted: Any, truth: Any, *, n: int = RESAMPLES, seed: int = 0, level: float = LEVEL) -> Interval:
    """Returns a metric with its percentile interval over `n` bootstrap resamples of the images.

    Undefined resamples (one class only, or no variance) are dropped; if more than 5% are undefined, raises MetricError.
    """
    statistic, images = _statistic(metric, predicted, truth)
    return _interval(metric, statistic, value(metric, predicted, truth), images, n, seed, level)


def estimate(metric: str, predicted: Any, truth: Any, *, n: int = RESAMPLES) -> Estimate:
    """Returns a metric with its interval, or without one where `interval` raises. Raises MetricError if it is undefined."""
    try:
        return Estimate(*astuple(interval(metric, predicted, truth, n=n)))
    except MetricError:
        # Raises again if the metric itself is undefined.
        return Estimate(value(metric, predicted, truth))


def difference(
    metric: str, predicted: Any, other: Any, truth: Any, *, n: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Returns metric(predicted) - metric(other) on the same images, with its paired bootstrap interval."""
    first, images = _statistic(metric, predicted, truth)
    second, _ = _statistic(metric, other, truth)
    point = value(metric, predicted, truth) - value(metric, other, truth)
    return _interval(metric, lambda counts: first(counts) - second(counts), point, images, n, seed, level)


def resampled(metric: str, predicted: Any, truth: Any, *, n: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns a metric in each of `n` bootstrap resamples of the images, float64 [n]; nan where it is undefined."""
    statistic, images = _statistic(metric, predicted, truth)
    return np.concatenate([statistic(counts) for counts in resample_counts(images, n, seed)])


def _interval(metric: str, statistic: Statistic, point: float, images: int, n: int, seed: int, level: float) -> Interval:
    if n < 1 or not 0.0 < level < 1.0:
        raise MetricError(f"an interval needs n >= 1 resamples and 0 < level < 1, found n={n}, level={level}")
    values = np.concatenate([statistic(counts) for counts in resample_counts(images, n, seed)])
    good = values[np.isfinite(values)]
    if len(values) - len(good) > MAX_UNDEFINED * len(values):
        raise MetricError(
            f"{metric} is undefined in {len(values) - len(good)} of {len(values)} resamples of {images} images, so it has no "
            "interval; use more images, or more of the rarer class"
        )
    return bounds(point, good, level)


def _statistic(metric: str, predicted: Any, truth: Any) -> tuple[Statistic, int]:
    p, t = _checked(metric, predicted, truth)
    if metric == "pcc":
        return _pearson(p, t), len(p)
    if metric == "srcc":
        return _spearman(p, t), len(p)
    if metric in ("rmse", "rmae"):
        errors = (p - t) ** 2 if metric == "rmse" else np.abs(p - t)
        return lambda counts: np.sqrt(counts @ errors / counts.sum(1)), len(p)
    if metric in OF_DECISIONS:
        return _decisions(metric, p, t), len(p)
    return (_auc if metric == "roc_auc" else _ece)(p, t), len(p)


def _checked(metric: str, predicted: Any, truth: Any) -> tuple[np.ndarray, np.ndarray]:
    known = (*OF_RATINGS, *OF_DECISIONS, *OF_SCORES)
    if metric not in known:
        raise MetricError(f"unknown metric {metric!r}; expected one of {', '.join(known)}")
    p, t = np.asarray(predicted, np.float64), np.asarray(truth, np.float64)
    if p.ndim != 1 or p.shape != t.shape or not p.size:
        raise MetricError(f"{metric} needs two arrays [N] of equal length, N >= 1; found {list(p.shape)} and {list(t.shape)}")
    for name, array in (("predictions", p), ("ratings or labels", t)):
        if bad := int(np.count_nonzero(~np.isfinite(array))):
            raise MetricError(f"{metric}: {bad} of {len(array)} {name} are NaN or inf")
    if metric not in OF_RATINGS and not np.isin(t, (0, 1)).all():
        raise MetricError(f"{metric} needs labels that are 0 (simple) or 1 (complex), found {t[~np.isin(t, (0, 1))][0]:g}")
    if metric in OF_DECISIONS and not np.isin(p, (0, 1)).all():
        raise MetricError(
            f"{metric} needs decisions that are 0 or 1, found {p[~np.isin(p, (0, 1))][0]:g}; apply a threshold to the scores"
        )
    if metric == "ece" and (p.min() < 0 or p.max() > 1):
        raise MetricError(f"ece needs probabilities in [0, 1], found {p.min():g} to {p.max():g}")
    return p, t


def _undefined(metric: str, predicted: Any, truth: Any) -> str:
    p, t = _checked(metric, predicted, truth)
    if metric in OF_RATINGS:
        which = "predictions" if not np.ptp(p) else "ratings" if not np.ptp(t) else "predictions or ratings, up to rounding,"
        return f"{metric} is undefined: all {len(p)} {which} are equal ({p[0] if which == 'predictions' else t[0]:g})"
    return f"{metric} is undefined: all {len(t)} labels are of class {'complex' if t[0] else 'simple'}; it needs both classes"


def _pearson(x: np.ndarray, y: np.ndarray) -> Statistic:
    x, y = _scaled(x), _scaled(y)

    def statistic(counts: np.ndarray) -> np.ndarray:
        n = counts.sum(1)
        mean_x, mean_y = counts @ x / n, counts @ y / n
        var_x, var_y = counts @ (x * x) / n - mean_x**2, counts @ (y * y) / n - mean_y**2
        return _correlation(counts @ (x * y) / n - mean_x * mean_y, var_x, var_y)

    return statistic


def _spearman(x: np.ndarray, y: np.ndarray) -> Statistic:
    rank_x, rank_y = _Ties(x), _Ties(y)

    def statistic(counts: np.ndarray) -> np.ndarray:
        n = counts.sum(1, keepdims=True)
        # Average ranks have mean (n + 1) / 2 regardless of ties.
        a, b = ((ties.ranks(counts) - (n + 1) / 2) / n for ties in (rank_x, rank_y))
        return _correlation(*(np.einsum("rn,rn,rn->r", counts, p, q) / n[:, 0] for p, q in ((a, b), (a, a), (b, b))))

    return statistic


def _decisions(metric: str, decided: np.ndarray, labels: np.ndarray) -> Statistic:
    cells = np.stack([decided * labels, decided * (1 - labels), (1 - decided) * (1 - labels), (1 - decided) * labels], 1)

    def statistic(counts: np.ndarray) -> np.ndarray:
        tp, fp, tn, fn = (counts @ cells).T
        values = rate(metric, tp, fp, tn, fn)
        if metric in ("balanced_accuracy", "youden"):
            values = np.where((tp + fn > 0) & (tn + fp > 0), values, np.nan)
        return values

    return statistic


def _auc(scores: np.ndarray, labels: np.ndarray) -> Statistic:
    ties = _Ties(scores)

    def statistic(counts: np.ndarray) -> np.ndarray:
        positive, negative = ties.sums(counts * labels), ties.sums(counts * (1 - labels))
        below = np.cumsum(negative, 1) - negative
        pairs = positive.sum(1) * negative.sum(1)
        right = (positive * (below + negative / 2)).sum(1)
        return np.where(pairs > 0, right / np.maximum(pairs, 1), np.nan)

    return statistic


def _ece(scores: np.ndarray, labels: np.ndarray) -> Statistic:
    inner = np.linspace(0, 1, ECE_BINS + 1)[1:-1]
    member = np.eye(ECE_BINS)[np.searchsorted(inner, scores)]
    gaps = member * (scores - labels)[:, None]
    return lambda counts: np.abs(counts @ gaps).sum(1) / counts.sum(1)


class _Ties:
    """Groups images by equal value, in ascending order of the values."""

    def __init__(self, values: np.ndarray):
        _, self._group, sizes = np.unique(values, return_inverse=True, return_counts=True)
        self._order = np.argsort(self._group, kind="stable")
        self._starts = np.cumsum(sizes) - sizes

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """Sums image weights [R, N] within groups -> [R, G]."""
        return np.add.reduceat(weights[:, self._order], self._starts, axis=1)

    def ranks(self, counts: np.ndarray) -> np.ndarray:
        """Returns the 1-based average rank [R, N] of each image, given how often each was drawn (counts [R, N])."""
        sizes = self.sums(counts)
        return (np.cumsum(sizes, 1) - sizes + (sizes + 1) / 2)[:, self._group]


def _scaled(x: np.ndarray) -> np.ndarray:
    """Centres and scales to [-1, 1]; leaves correlation unchanged and avoids cancellation in the moments."""
    x = x - x.mean() if np.ptp(x) else np.zeros_like(x)
    return x / np.abs(x).max() if x.any() else x


def _correlation(covariance: np.ndarray, var_x: np.ndarray, var_y: np.ndarray) -> np.ndarray:
    defined = (var_x > _CONSTANT) & (var_y > _CONSTANT)
    product = np.sqrt(np.where(defined, var_x * var_y, 1.0))
    return np.where(defined, np.clip(covariance / product, -1.0, 1.0), np.nan)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.where(below > 0, above / np.maximum(below, 1), 0.0)

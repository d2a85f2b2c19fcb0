"""Metrics of ratings and labels compared with scipy and scikit-learn; intervals with a plain loop over resamples."""

import numpy as np
import pytest
import scipy.stats
import sklearn.calibration
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.evaluation.metrics import ratings as m
from icar_jax.evaluation.metrics.bootstrap import resample_indices

# A coarse grid, for frequent ties, and any finite numbers.
TIED = st.integers(0, 6).map(lambda v: v / 6)
SCORE = st.one_of(TIED, st.floats(0, 1, width=32))
few = settings(max_examples=60, deadline=None)


@st.composite
def ratings(draw, value=SCORE):
    n = draw(st.integers(2, 40))
    return tuple(np.array(draw(st.lists(value, min_size=n, max_size=n)), np.float64) for _ in range(2))


@st.composite
def labelled(draw, score=SCORE):
    n = draw(st.integers(2, 40))
    scores = np.array(draw(st.lists(score, min_size=n, max_size=n)), np.float64)
    return scores, np.array(draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)))


@few
@given(ratings())
def test_correlations_are_those_of_scipy(pair):
    x, y = pair
    for ours, theirs in ((m.pcc, scipy.stats.pearsonr), (m.srcc, scipy.stats.spearmanr)):
        if min(np.std(x), np.std(y)) < 1e-4:  # scipy warns about rounding; constant inputs are tested below
            continue
        assert ours(x, y) == pytest.approx(theirs(x, y).statistic, abs=1e-7)


@few
@given(ratings(st.floats(-1e6, 1e6)))
def test_errors_are_as_the_benchmark_defines_them(pair):
    x, y = pair
    assert m.rmse(x, y) == pytest.approx(sklearn.metrics.mean_squared_error(y, x) ** 0.5)
    assert m.rmae(x, y) == pytest.approx(sklearn.metrics.mean_absolute_error(y, x) ** 0.5)


def test_rmae_is_the_root_of_the_mean_absolute_error():
    assert m.rmae([0.1, 0.5], [0.2, 0.8]) == pytest.approx(np.sqrt(0.2))
    assert m.rmse([0.1, 0.5], [0.2, 0.8]) == pytest.approx(np.sqrt(0.05))


@few
@given(labelled(st.integers(0, 1)))
def test_decisions_are_those_of_sklearn(pair):
    decided, labels = pair
    assert m.accuracy(decided, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, decided))
    assert m.f1(decided, labels) == pytest.approx(sklearn.metrics.f1_score(labels, decided, zero_division=0))
    c = m.confusion(decided, labels)
    theirs = sklearn.metrics.confusion_matrix(labels, decided, labels=[0, 1])
    assert [[c.true_negative, c.false_positive], [c.false_negative, c.true_positive]] == theirs.tolist()
    if len(set(labels)) == 2:
        assert m.balanced_accuracy(decided, labels) == pytest.approx(sklearn.metrics.balanced_accuracy_score(labels, decided))
        assert m.youden(decided, labels) == pytest.approx(
            sum(sklearn.metrics.recall_score(labels, decided, pos_label=c, zero_division=0) for c in (0, 1)) - 1
        )


@few
@given(labelled())
def test_auc_and_calibration_error_are_those_of_sklearn(pair):
    scores, labels = pair
    if len(set(labels)) == 2:
        assert m.roc_auc(scores, labels) == pytest.approx(sklearn.metrics.roc_auc_score(labels, scores))
    share, mean = sklearn.calibration.calibration_curve(labels, scores, n_bins=m.ECE_BINS, strategy="uniform")
    sizes = np.bincount(np.searchsorted(np.linspace(0, 1, m.ECE_BINS + 1)[1:-1], scores))
    assert m.ece(scores, labels) == pytest.approx(np.abs(share - mean) @ sizes[sizes > 0] / len(scores), abs=1e-9)


def slow_interval(metric, p, t, n, seed):
    """Reference: recomputes the metric on each resample."""
    values = []
    for indices in resample_indices(len(p), n, seed):
        for row in indices:
            try:
                values.append(m.value(metric, p[row], t[row]))
            except m.MetricError:
                pass
    return np.quantile(values, [0.025, 0.975])


@pytest.mark.parametrize("metric", [*m.OF_RATINGS, *m.OF_DECISIONS, *m.OF_SCORES])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 1000), n=st.integers(12, 40))
def test_intervals_are_those_of_a_loop_over_resamples(metric, seed, n):
    rng = np.random.default_rng(seed)
    t = rng.integers(0, 6, n) / 5 if metric in m.OF_RATINGS else (np.arange(n) % 2).astype(float)
    p = np.clip(np.round(0.6 * t + 0.4 * rng.random(n), 1), 0, 1)
    p = p > 0.5 if metric in m.OF_DECISIONS else p
    found = m.interval(metric, p, t, n=40, seed=seed)
    low, high = slow_interval(metric, np.asarray(p, float), t, 40, seed)
    assert found.value == m.value(metric, p, t)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
    assert found.low <= found.high


def test_a_metric_minus_itself_is_zero_in_every_resample():
    rng = np.random.default_rng(0)
    t, p = rng.random(50), rng.random(50)
    found = m.difference("srcc", p, p, t, n=50)
    assert (found.value, found.low, found.high) == (0, 0, 0) and found.includes_zero
    # Monotone maps preserve ranks and linear maps preserve correlation, so paired differences are exactly zero.
    assert m.difference("srcc", p**3, p, t, n=50).high == 0
    assert abs(m.difference("pcc", 3 * p - 1, p, t, n=50).high) < 1e-12


def test_a_paired_interval_is_narrower_than_unpaired_ones():
    rng = np.random.default_rng(1)
    t = rng.random(200)
    a, b = t + 0.30 * rng.standard_normal(200), t + 0.32 * rng.standard_normal(200)
    both = m.difference("pcc", a, b, t, n=300)
    apart = [m.interval("pcc", x, t, n=300) for x in (a, b)]
    assert both.high - both.low < sum(i.high - i.low for i in apart)


@pytest.mark.parametrize(
    "metric, predicted, truth, message",
    [
        ("pcc", [0.5, 0.5, 0.5], [0.1, 0.2, 0.3], "all 3 predictions are equal"),
        ("srcc", [0.1, 0.2, 0.3], [0.5, 0.5, 0.5], "all 3 ratings are equal"),
        ("roc_auc", [0.1, 0.2], [1, 1], "all 2 labels are of class complex"),
        ("youden", [0, 1], [0, 0], "class simple; it needs both"),
        ("balanced_accuracy", [0, 1], [1, 1], "needs both classes"),
        ("f1", [0.3, 1], [1, 1], "apply a threshold to the scores"),
        ("accuracy", [0, 1], [1, 2], "labels that are 0"),
        ("ece", [0.5, 1.5], [0, 1], "probabilities in"),
        ("rmse", [0.1], [0.1, 0.2], "of equal length"),
        ("rmse", [], [], "of equal length"),
        ("pcc", [0.1, np.nan], [0.1, 0.2], "1 of 2 predictions are NaN"),
        ("accuracy_", [1], [1], "unknown metric"),
    ],
)
def test_undefined_metrics_raise_a_specific_error(metric, predicted, truth, message):
    with pytest.raises(m.MetricError, match=message):
        m.value(metric, predicted, truth)


def test_too_few_of_a_class_have_no_interval():
    labels = np.array([1] + [0] * 9)
    with pytest.raises(m.MetricError, match="more of the rarer class"):
        m.interval("roc_auc", np.linspace(0, 1, 10), labels, n=200)


def test_intervals_have_nominal_coverage():
    """200 data sets of known correlation: between 88% and 100% of the 95% intervals hold it."""
    rng, held = np.random.default_rng(3), 0
    for k in range(200):
        x = rng.standard_normal(80)
        y = 0.8 * x + 0.6 * rng.standard_normal(80)
        found = m.interval("pcc", x, y, n=200, seed=k)
        held += found.low <= 0.8 <= found.high
    assert 176 <= held

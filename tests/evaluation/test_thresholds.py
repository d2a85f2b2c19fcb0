"""Thresholds compared with plain loops: of a classifier over the grid, of exits over all splits of the images."""

from fractions import Fraction
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from icar_jax.config import ConfigError
from icar_jax.evaluation.routing import thresholds as th
from icar_jax.inference import budgets as bg
from icar_jax.inference.router import assign

quick = settings(max_examples=60, deadline=None)
# Ties, grid points, and numbers close to grid points.
SCORES = st.lists(
    st.one_of(st.integers(0, 8).map(lambda v: v / 8), st.integers(0, 1000).map(lambda v: v / 1000), st.floats(0, 1, width=32)),
    min_size=1,
    max_size=25,
)


def slow_value(metric, decided, labels):
    """Computes the metric in exact fractions from its definition; 0/0 = 0."""
    tp = sum(d and y for d, y in zip(decided, labels))
    tn = sum(not d and not y for d, y in zip(decided, labels))
    fp, fn = sum(decided) - tp, sum(labels) - tp
    over = lambda a, b: Fraction(int(a), int(b)) if b else Fraction(0)
    return {
        "f1": over(2 * tp, 2 * tp + fp + fn),
        "accuracy": over(tp + tn, len(labels)),
        "balanced_accuracy": (over(tp, tp + fn) + over(tn, tn + fp)) / 2,
        "youden": over(tp, tp + fn) + over(tn, tn + fp) - 1,
    }[metric]


@pytest.mark.parametrize("metric", th.METRICS)
@settings(max_examples=15, deadline=None)
@given(scores=SCORES, seed=st.integers(0, 99))
def test_the_threshold_is_that_of_a_loop_over_the_grid(metric, scores, seed):
    labels = np.random.default_rng(seed).integers(0, 2, len(scores)).tolist()
    best = (Fraction(-2), None)
    for step in range(1001):
        threshold = step / 1000
        decided = [np.float32(s) > np.float32(threshold) for s in scores]
        found = slow_value(metric, decided, labels)
        if found >= best[0]:  # ties: the highest threshold
            best = (found, threshold)
    threshold, value = th.best_threshold(np.array(scores), np.array(labels), metric)
    assert threshold == best[1] and value == pytest.approx(float(best[0]), abs=1e-12)


def test_a_score_on_the_threshold_is_not_complex():
    assert th.best_threshold(np.array([0.2, 0.4]), np.array([0, 1])) == (0.399, 1.0)
    assert th.best_threshold(np.array([0.1, 0.2]), np.array([0, 0]), "f1") == (1.0, 0.0)


def test_a_grid_of_ones_own():
    np.testing.assert_array_equal(th.threshold_grid(0, 1, 0.001), th.GRID)
    np.testing.assert_array_equal(th.threshold_grid(0.1, 0.5, 0.15), [0.1, 0.25, 0.4])
    scores, labels = np.array([0.2, 0.4]), np.array([0, 1])
    assert th.best_threshold(scores, labels, grid=th.threshold_grid(0.1, 0.5, 0.15)) == (0.25, 1.0)
    for wrong in ((0, 1, 0), (0.5, 0.5, 0.1), (-0.1, 1, 0.1), (0, 1.1, 0.1), (0, 0.1, 0.2)):
        with pytest.raises(ConfigError, match="expected 0 <= LOW < HIGH <= 1"):
            th.threshold_grid(*wrong)


@pytest.mark.parametrize(
    "scores, labels, metric, message",
    [
        ([0.5], [0], "auc", "use one of accuracy, f1"),
        ([0.5, 0.5], [0], "f1", "one label"),
        ([0.5], [2], "f1", "one label"),
        ([], [], "f1", "at least one"),
        ([1.5], [1], "f1", "from 1.5 to 1.5"),
        ([np.nan], [1], "f1", "finite"),
    ],
)
def test_invalid_arguments_raise(scores, labels, metric, message):
    with pytest.raises(ValueError, match=message):
        th.best_threshold(np.array(scores), np.array(labels), metric)


@st.composite
def budgets(draw, most_exits=4):
    exits = sorted(draw(st.sets(st.integers(1, 24), min_size=2, max_size=most_exits)))
    costs = bg.Costs({e: 3.0 + e for e in exits}, draw(st.floats(0, 3)))
    budget = draw(st.floats(0.05, 1))
    assume(budget >= costs.lowest_budget)
    return costs, budget


@quick
@given(budgets(), SCORES)
def test_a_budget_is_met(case, scores):
    costs, budget = case
    scores, exits = np.array(scores, np.float32), sorted(costs.exits)
    limits = bg.thresholds_for_budget(scores, budget, costs)
    taken = assign(scores, exits, limits)  # also checks that thresholds are ascending
    assert costs.share_of_full({e: np.mean(taken == e) for e in exits}) <= budget + 1e-9


@quick
@given(budgets(most_exits=2), SCORES)
def test_of_two_exits_no_other_threshold_spends_more_of_the_budget(case, scores):
    costs, budget = case
    scores, exits = np.array(scores, np.float32), sorted(costs.exits)

    def cost(threshold):
        taken = assign(scores, exits, (threshold,))
        return costs.share_of_full({e: np.mean(taken == e) for e in exits})

    every = [cost(t) for t in [bg.BELOW_ALL, *scores.tolist()]]
    best = max((c for c in every if c <= budget + 1e-9), default=None)
    assert cost(bg.thresholds_for_budget(scores, budget, costs)[0]) == pytest.approx(best)


@quick
@given(budgets())
def test_shares_meet_the_budget_and_are_the_most_even_that_do(case):
    costs, budget = case
    shares = np.array(bg.shares_for_budget(budget, costs))
    exits = sorted(costs.exits)
    assert shares.sum() == pytest.approx(1) and shares.min() >= 0
    reachable = min(budget, costs.share_of_full({e: float(e == exits[-1]) for e in exits}))
    assert costs.share_of_full(dict(zip(exits, shares))) == pytest.approx(reachable, abs=1e-6)
    entropy = lambda p: -sum(v * np.log(v) for v in p if v > 0)
    # Every other split of 12 images over the exits with the same cost is less even.
    for cuts in combinations_with_replacement(range(13), len(exits) - 1):
        other = np.diff([0, *cuts, 12]) / 12
        if abs(costs.share_of_full(dict(zip(exits, other))) - reachable) < 1e-9:
            assert entropy(other) <= entropy(shares) + 1e-6


def test_the_cost_of_equal_shares_gives_equal_shares():
    costs = bg.Costs({4: 1.0, 8: 2.0, 12: 3.0}, 0.3)
    assert bg.shares_for_budget(2.3 / 3, costs) == pytest.approx([1 / 3] * 3)
    scores = np.linspace(0, 1, 300, dtype=np.float32)
    limits = bg.thresholds_for_budget(scores, 2.3 / 3, costs)
    assert np.bincount(assign(scores, (4, 8, 12), limits))[[4, 8, 12]].tolist() == [100, 100, 100]


@pytest.mark.parametrize("budget, message", [(0.3, "at least 0.4334"), (1.01, "must lie in"), (0.0, "must lie in")])
def test_an_unmet_budget_names_the_lowest_one(budget, message):
    costs = bg.Costs({4: 1.0, 12: 3.0}, 0.3)
    with pytest.raises(ConfigError, match=message):
        bg.thresholds_for_budget(np.array([0.5]), budget, costs)
    bg.thresholds_for_budget(np.array([0.5]), 0.4334, costs)  # the lowest budget of the message can be met


def test_no_router_and_the_whole_budget_is_full_depth():
    costs = bg.Costs({4: 1.0, 8: 2.0, 12: 3.0}, 0.0)
    assert bg.shares_for_budget(1.0, costs) == (0, 0, 1)
    assert bg.thresholds_for_budget(np.array([0.1, 0.9]), 1.0, costs) == (bg.BELOW_ALL, bg.BELOW_ALL)


def test_shares_meet_their_quantiles():
    scores = np.arange(10) / 10
    assert th.thresholds_for_shares(scores, (0.3, 0.2, 0.5)) == pytest.approx((0.25, 0.45))
    assert th.thresholds_for_shares(scores, (0.0, 1.0)) == (bg.BELOW_ALL,)
    assert th.full_shares((), (4, 8)) == (0.5, 0.5) and th.full_shares((0.2,), (4, 8)) == (0.2, 0.8)
    for wrong in ((0.5, 0.4), (1.2,), (-0.1,)):
        with pytest.raises(ConfigError, match="do not match the exits"):
            th.full_shares(wrong, (4, 8))

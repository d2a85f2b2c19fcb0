"""Cost and recall of router settings, and the search for the best one, compared with brute force."""

import itertools

import numpy as np
import pytest

from icar_jax.evaluation.metrics.retrieval import Distractors, ranks, recall
from icar_jax.evaluation.routing.assignments import take_exits
from icar_jax.evaluation.routing.frontier import Bench, best_within, cheapest, frontier, sweep
from icar_jax.inference.budgets import Costs
from icar_jax.inference.router import assign


def bench(exits=(1, 2, 3), n=40, far=0, seed=0):
    """Images whose embeddings approach their captions with depth, complex images more slowly."""
    rng = np.random.default_rng(seed)
    scores = rng.random(n + far).astype(np.float32)
    target = rng.normal(size=(n + far, 8))
    noise = rng.normal(size=(n + far, 8))

    def unit(x):
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    by_exit = {e: unit(target + noise * 0.4 * (max(exits) - e + 1) * scores[:, None]) for e in exits}
    owner = np.repeat(np.arange(n), 2)
    texts = unit(target[:n][owner] + 0.5 * rng.normal(size=(2 * n, 8)))
    costs = {"counted": Costs({e: float(e) for e in exits}, 0.2), "measured": Costs({e: 1.0 + e * e for e in exits}, 0.5)}
    more = {}
    if far:
        more = {"far_by_exit": {e: v[n:] for e, v in by_exit.items()}, "far_scores": scores[n:]}
        more["distractors"] = Distractors(np.zeros((far, 8), np.float32), unit(target[n:]), np.arange(far))
    return Bench({e: v[:n] for e, v in by_exit.items()}, texts, owner, scores[:n], costs, **more)


@pytest.mark.parametrize("far", [0, 15])
def test_a_point_equals_plain_ranking(far):
    b = bench(far=far)
    limits = (0.3, 0.6)
    (point,) = b.points([limits])
    exits = assign(b.scores, b.exits, limits)
    distractors = None
    if far:
        rows = take_exits(b.far_by_exit, assign(b.far_scores, b.exits, limits))
        distractors = Distractors(rows, b.distractors.text_embed, b.distractors.caption_image)
    plain = recall(ranks(take_exits(b.by_exit, exits), b.texts, b.caption_image, distractors=distractors), 5)
    assert point.recall == pytest.approx(sum(plain.values()) / 2)
    assert point.cost["counted"] == pytest.approx((exits.mean() + 0.2) / 3)
    assert point.cost["measured"] == pytest.approx(((1.0 + exits**2).mean() + 0.5) / 10)
    assert sum(point.share.values()) == pytest.approx(1)
    assert b.tried == 1 and b.points([limits])[0] is point and b.tried == 1, "no setting is ranked twice"


@pytest.mark.parametrize("cost", ["counted", "measured"])
@pytest.mark.parametrize("drop", [0.0, 2.0, 10.0, 100.0])
def test_the_cheapest_of_all_settings_on_the_grid(cost, drop):
    b = bench(exits=(1, 2))
    found = cheapest(b, drop, cost)
    shares = np.arange(101) / 100
    points = b.points([b.thresholds([s]) for s in shares])
    kept = [p for p in points if p.recall >= b.full.recall - drop - 1e-9]
    assert found.cost[cost] == min(p.cost[cost] for p in kept) and found.recall >= b.full.recall - drop - 1e-9
    if drop == 100.0:
        assert found.share == {1: 1.0, 2: 0.0}


def test_two_early_exits_try_every_combination():
    b = bench()
    found = cheapest(b, 3.0, "measured")
    grid = np.arange(21) / 20
    points = b.points([b.thresholds(c) for c in itertools.combinations_with_replacement(grid, 2)])
    assert found.cost["measured"] == min(p.cost["measured"] for p in points if p.recall >= b.full.recall - 3.0 - 1e-9)


@pytest.mark.parametrize("cost", ["counted", "measured"])
@pytest.mark.parametrize("budget", [0.45, 0.7, 1.0, 2.0])
def test_the_best_recall_of_all_settings_within_a_budget(cost, budget):
    for exits, grid in (((1, 3), np.arange(101) / 100), ((1, 2, 3), np.arange(21) / 20)):
        b = bench(exits=exits)
        found = best_within(b, budget, cost)
        points = b.points([b.thresholds(c) for c in itertools.combinations_with_replacement(grid, len(exits) - 1)])
        within = [p for p in points if p.cost[cost] <= budget]
        assert found.cost[cost] <= budget and found.recall == max(p.recall for p in within)
        assert found.cost[cost] == min(p.cost[cost] for p in within if p.recall == found.recall)


def test_coordinate_search_within_a_budget_keeps_it_and_beats_single_exits():
    b = bench(exits=(1, 2, 3, 4), n=60)
    for budget in (0.31, 0.6, 0.9):  # 0.3 is the cost of the first exit with the router
        found = best_within(b, budget, "counted")
        assert found.cost["counted"] <= budget
        for alone in range(4):
            (point,) = b.points([b.thresholds([0.0] * alone + [1.0] * (3 - alone))])
            assert point.cost["counted"] > budget or point.recall <= found.recall


def test_coordinate_search_keeps_the_bound_and_beats_single_exits():
    b = bench(exits=(1, 2, 3, 4), n=60)
    for drop in (0.0, 3.0, 100.0):
        found = cheapest(b, drop, "measured")
        assert found.recall >= b.full.recall - drop - 1e-9 and found.cost["measured"] <= b.full.cost["measured"]
        for alone in range(4):
            (point,) = b.points([b.thresholds([0.0] * alone + [1.0] * (3 - alone))])
            if point.recall >= b.full.recall - drop - 1e-9:
                assert found.cost["measured"] <= point.cost["measured"] + 1e-12
    assert found.share[1] == 1.0


def test_full_depth_is_chosen_if_nothing_else_meets_the_bound():
    b = bench()
    worst = {1: b.by_exit[3][::-1].copy(), 2: b.by_exit[3][::-1].copy(), 3: b.by_exit[3]}
    b = Bench(worst, b.texts, b.caption_image, b.scores, b.costs)
    assert cheapest(b, 0.0, "counted").recall >= b.full.recall


def test_the_frontier_holds_the_pareto_optimal_points():
    points = sweep(bench())
    best = frontier(points, "measured")
    for point in points:
        assert any(b.cost["measured"] <= point.cost["measured"] and b.recall >= point.recall for b in best)
    assert all(a.cost["measured"] < b.cost["measured"] and a.recall < b.recall for a, b in zip(best, best[1:]))

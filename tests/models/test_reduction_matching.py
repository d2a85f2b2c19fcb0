"""The matchings of ToMe, PiToMe and CrossGET, and dropping: the published cases, and their definitions token by token.

The cases of tests/fixtures/reduction were computed with the official codes (CrossGET, ToMe, HiRED), sorting stably.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax.models.reduction.dropping import class_attention, drop
from icar_jax.models.reduction.matching import complete_graph, pitome, tome
from icar_jax.models.reduction.merging import merge
from icar_jax.models.reduction.tokens import Tokens
from tests.support.places import FIXTURES

CASES = FIXTURES / "reduction"


@functools.partial(jax.jit, static_argnums=5)
def guided(keys, values, sizes, guide, protected, count):
    matching, importance = complete_graph(keys, guide, count, protected)
    return matching, importance, *merge(values, sizes, matching, count, importance)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def unguided(method, x, sizes, count, protected):
    matching = method(x, count, protected)
    return matching, *merge(x, sizes, matching, count)


@pytest.fixture(scope="module")
def crossget():
    return np.load(CASES / "crossget_case.npz")


def protected_first_and_last(n, *more):
    place = np.arange(n)[None]
    return (place == 0) | (place == n - 1) | np.any([place == np.array(m)[:, None] for m in more], axis=0)


# --- the published cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["vision", "vision_again", "shared_destination", "text"])
def test_crossget_matches_and_merges_as_the_official_code(crossget, group):
    case = {name.rpartition("/")[2]: crossget[name] for name in crossget if name.startswith(f"{group}/")}
    x, n = jnp.asarray(case["x"]), case["x"].shape[1]
    ends = case["ids"].argmax(1) if "ids" in case else np.full(len(x), n - 1)
    guide, count = jnp.asarray(case["q"])[jnp.arange(len(x)), ends], case["sources"].shape[1]
    match = jax.jit(complete_graph, static_argnums=2)
    matching, importance = match(case["k"], guide, count, protected_first_and_last(n, ends))
    for image, (source, target) in enumerate(zip(*map(np.asarray, matching[:2]))):
        pairs = dict(zip(case["sources"][image].tolist(), case["destinations"][image].tolist()))
        assert {i: int(target[i]) for i in np.flatnonzero(source)} == pairs
    if "importance" in case:
        np.testing.assert_allclose(importance, case["importance"], atol=1e-6)
    sizes = jnp.asarray(case.get("size_in", np.ones((*x.shape[:2], 1), np.float32)))[..., 0]
    values, total = jax.jit(merge, static_argnums=3)(x, sizes, matching, count, importance)
    np.testing.assert_allclose(values, case["out"], atol=1e-6)
    if "size_out" in case:
        np.testing.assert_array_equal(total, case["size_out"][..., 0])
    assert "size_out" in case or total[0, 1] == 6  # shared_destination


def test_tome_matches_and_merges_as_the_official_code():
    case = np.load(CASES / "tome_case.npz")
    x = jnp.asarray(case["x"])
    _, values, sizes = unguided(tome, x, jnp.ones(x.shape[:2]), 2, 1)
    np.testing.assert_allclose(values, case["tome_values"], atol=1e-6)
    np.testing.assert_array_equal(sizes, case["tome_sizes"])


# --- properties of a merge ---------------------------------------------------------------------------------------------------


def by_hand(keys, values, sizes, guide, count, protected):
    """CrossGET for one image, token by token, in float64."""
    keys, guide = keys.astype(np.float64), guide.astype(np.float64)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    importance = keys @ (guide / np.linalg.norm(guide))
    similar = keys @ keys.T
    free = [i for i in range(len(keys)) if not protected[i]]
    nearest = {i: max(similar[i, j] for j in free if j != i) for i in free}
    order = sorted(free, key=lambda i: (-round(nearest[i], 12), i))
    priority = {}
    for n, i in enumerate(order[:-1]):
        priority[i] = importance[i] - max(similar[i, j] for j in order[n + 1 :])
    sources = sorted(sorted(priority, key=lambda i: (priority[i], i))[:count])
    kept = [i for i in range(len(keys)) if i not in sources]
    sums = {j: (values[j].astype(np.float64) * sizes[j], 1.0, sizes[j]) for j in kept}
    for i in sources:
        j = max((j for j in kept if not protected[j]), key=lambda j: (similar[i, j], -j))
        w = 2 / (1 + np.exp(importance[j] - importance[i]))
        total, own, size = sums[j]
        sums[j] = (total + w * sizes[i] * values[i], own + (1 - w), size + sizes[i])
    out = []
    for j in kept:
        total, own, size = sums[j]
        out.append((total + (own - 1) * values[j].astype(np.float64) * sizes[j]) / size)
    return np.stack(out), np.array([sums[j][2] for j in kept])


@pytest.mark.parametrize("n,count", [(6, 0), (6, 2), (9, 3), (14, 4)])
def test_crossget_is_its_definition_token_by_token(n, count):
    rng = np.random.default_rng(n)
    keys, values = (rng.standard_normal((12, n, 5)).astype(np.float32) for _ in range(2))
    guide, sizes = rng.standard_normal((12, 5)).astype(np.float32), rng.integers(1, 4, (12, n)).astype(np.float32)
    protected = protected_first_and_last(n)
    _, importance, out, total = guided(keys, values, sizes, guide, protected, count)
    for image in range(12):
        expected, size = by_hand(keys[image], values[image], sizes[image], guide[image], count, protected[0])
        np.testing.assert_allclose(out[image], expected, atol=2e-5)
        np.testing.assert_array_equal(total[image], size)
    np.testing.assert_array_equal(out[:, [0, -1]], values[:, [0, -1]])  # protected: same value, same size, same place
    np.testing.assert_allclose(total.sum(1), sizes.sum(1))
    if not count:
        np.testing.assert_array_equal(out, values)
    assert np.all(np.abs(importance) <= 1 + 1e-6)


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("method", [tome, pitome])
def test_tome_and_pitome_take_weighted_means_and_keep_what_is_protected(method, protected):
    rng, n, count = np.random.default_rng(protected), 15, 4
    x, sizes = rng.standard_normal((3, n, 6)).astype(np.float32), rng.integers(1, 4, (3, n)).astype(np.float32)
    matching, out, total = unguided(method, x, sizes, count, protected)
    np.testing.assert_array_equal(out[:, :protected], x[:, :protected])
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    for image in range(3):
        source = np.flatnonzero(matching.source[image])
        target, order = np.asarray(matching.target[image]), np.asarray(matching.order[image])
        assert len(source) == count and min(source, default=protected) >= protected
        kept = np.setdiff1d(np.arange(n), source)
        assert sorted(order[kept]) == list(range(n - count)) and not set(target[source]) & set(source)
        similar = unit[image] @ unit[image].T
        if method is tome:
            others = [j for j in range(protected, n) if j % 2]
            seekers = [i for i in range(protected, n) if i % 2 == 0]
            best = sorted(seekers, key=lambda i: -max(similar[i, j] for j in others))[:count]
            assert sorted(best) == source.tolist()
        else:
            energy = np.where(similar > 0.5, similar - 0.5, np.expm1(similar - 0.5)).mean(1)
            ranked = sorted(range(protected, n), key=lambda i: -energy[i])[: 2 * count]
            assert sorted(ranked[::2]) == source.tolist()
            others = ranked[1::2]
        for i in source:
            assert target[i] == max(others, key=lambda j: similar[i, j])
        for j in kept:
            group = [j, *source[target[source] == j]]
            weights = sizes[image, group]
            np.testing.assert_allclose(out[image, order[j]], weights @ x[image, group] / weights.sum(), atol=1e-5)
            assert total[image, order[j]] == weights.sum()


def test_ties_go_to_the_lower_index():
    """Six equal tokens between two protected ones, and one that is like no other."""
    keys = np.tile(np.array([[1.0, 0, 0]], np.float32), (9, 1))
    keys[7], keys[0], keys[8] = (0, 1, 0), (0, 0, 1), (0, 0, 1)
    keys, guide = jnp.asarray(keys)[None], jnp.asarray([[1.0, 0, 0]])
    matching = guided(keys, keys, jnp.ones((1, 9)), guide, protected_first_and_last(9), 3)[0]
    assert np.flatnonzero(matching.source[0]).tolist() == [1, 2, 3] and matching.target[0, 1:4].tolist() == [4, 4, 4]
    equal = jnp.ones((1, 9, 3))
    of_tome, of_pitome = (unguided(method, equal, jnp.ones((1, 9)), 2, 1)[0] for method in (tome, pitome))
    assert np.flatnonzero(of_tome.source[0]).tolist() == [2, 4] and of_tome.target[0, 2] == 1
    assert np.flatnonzero(of_pitome.source[0]).tolist() == [1, 3]


def test_permuted_patches_give_the_permuted_result():
    """Where the order within mutual nearest neighbours, which always tie, is kept."""
    rng = np.random.default_rng(5)
    keys, values = (rng.standard_normal((1, 12, 6)).astype(np.float32) for _ in range(2))
    unit = keys[0, 1:-1] / np.linalg.norm(keys[0, 1:-1], axis=1, keepdims=True)
    nearest = (unit @ unit.T - 2 * np.eye(10)).argmax(1)
    mutual = [(i, j) for i, j in enumerate(nearest) if nearest[j] == i and i < j]
    place = None
    while place is None or any(place[i] > place[j] for i, j in mutual):
        order = rng.permutation(10)
        place = np.argsort(order)
    assert mutual and list(order) != list(range(10))
    guide = rng.standard_normal((1, 6)).astype(np.float32)

    def rows(order):
        out = guided(keys[:, order], values[:, order], np.ones((1, 12), np.float32), guide, protected_first_and_last(12), 4)[2]
        return np.asarray(sorted(out[0].tolist()))

    np.testing.assert_allclose(rows(np.concatenate([[0], 1 + order, [11]])), rows(np.arange(12)), atol=1e-6)


def test_equal_importance_is_the_mean_and_derivatives_are_those_of_the_weighted_sum():
    rng = np.random.default_rng(6)
    keys, x = (jnp.asarray(rng.standard_normal((2, 10, 6)), jnp.float32) for _ in range(2))
    sizes = jnp.asarray(rng.integers(1, 4, (2, 10)), jnp.float32)
    matching, importance = complete_graph(keys, keys[:, 0], 3, protected_first_and_last(10))
    plain, weighted = (merge(x, sizes, matching, 3, given)[0] for given in (None, jnp.zeros_like(importance)))
    np.testing.assert_allclose(weighted, plain, atol=1e-6)
    run = jax.jit(lambda x: merge(x, sizes, matching, 3, importance)[0])
    tangent, g = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (x.shape, (2, 7, 6)))
    moved = jax.jvp(run, (x,), (tangent,))[1]
    np.testing.assert_allclose(moved, run(tangent), atol=1e-6)  # it is linear
    (back,) = jax.vjp(run, x)[1](g)
    np.testing.assert_allclose(jnp.vdot(back, tangent), jnp.vdot(g, moved), rtol=1e-5)


def test_drop_keeps_the_patches_that_the_class_token_reads_most():
    rng = np.random.default_rng(7)
    q, k, x = (rng.standard_normal((2, 9, 8)).astype(np.float32) for _ in range(3))
    scores = class_attention(jnp.asarray(q), jnp.asarray(k), 2)
    by_head = lambda a: a.reshape(2, 9, 2, 4).astype(np.float64)
    logits = np.einsum("bhd,bnhd->bhn", by_head(q)[:, 0], by_head(k)) / 2
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(scores, weights.sum(1), atol=1e-5)
    left = drop(Tokens(jnp.asarray(x), jnp.ones((2, 9)), scores), 5, 1)
    for image in range(2):
        best = sorted(sorted(range(1, 9), key=lambda i: -scores[image, i])[:3])
        np.testing.assert_array_equal(left.values[image], x[image][[0, *best]])
    assert left.sizes.shape == (2, 4) and left.scores is None

"""Data order: a permutation in every epoch, computed from the position only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.data.loader.order import example_at, examples_at, substitute_position


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 2**30))
def test_every_epoch_visits_every_example_once(size, seed, epoch):
    epochs, indices = examples_at(np.arange(size) + epoch * size, size, seed)
    assert (epochs == epoch).all()
    assert (np.sort(indices) == np.arange(size)).all()


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 4096, 65537])
def test_permutation_around_powers_of_four(size):
    assert (np.sort(examples_at(np.arange(size), size, 3)[1]) == np.arange(size)).all()


def test_epochs_and_seeds_differ():
    size = 500
    first, second = np.split(examples_at(np.arange(2 * size), size, 0)[1], 2)
    other = examples_at(np.arange(size), size, 1)[1]
    assert (first != second).mean() > 0.95 and (first != other).mean() > 0.95


def test_order_is_shuffled():
    size = 20_000
    indices = examples_at(np.arange(size), size, 0)[1]
    assert abs(np.corrcoef(indices, np.arange(size))[0, 1]) < 0.03
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.03


def test_all_orders_of_few_examples_are_equally_likely():
    orders = examples_at(np.arange(4 * 4800), 4, 7)[1].reshape(4800, 4)
    counts = np.unique(orders, axis=0, return_counts=True)[1]
    assert len(counts) == 24 and ((counts - 200) ** 2 / 200).sum() < 50  # chi-square, 23 degrees of freedom: p = 0.001


def test_pinned_values():
    """Checkpoints store positions, so these numbers must never change."""
    assert examples_at(np.arange(8), 10, 0)[1].tolist() == [3, 6, 7, 1, 5, 4, 8, 0]
    assert example_at(2**40, 10**12, 5) == (1, 350964007662)


def test_scalar_equals_vector():
    epochs, indices = examples_at(np.arange(40), 13, 2)
    assert [example_at(p, 13, 2) for p in range(40)] == list(zip(epochs.tolist(), indices.tolist()))


@pytest.mark.parametrize("position, size, seed", [(-1, 5, 0), (0, 0, 0), (0, 5, -1), (0, 5, 2**63)])
def test_wrong_arguments(position, size, seed):
    with pytest.raises(ValueError, match="must|needs"):
        example_at(position, size, seed)


@pytest.mark.parametrize("size, attempts", [(2, 1), (3, 2), (9, 8), (10, 8), (1000, 8)])
def test_substitutes_are_distinct_and_of_the_same_epoch(size, attempts):
    for position in (0, size - 1, 3 * size + 1):
        places = [substitute_position(position, a, attempts, size) for a in range(1, attempts + 1)]
        assert len({position, *places}) == attempts + 1
        assert {p // size for p in places} == {position // size}

"""Published classical measures of complexity: their order on pictures whose complexity is plain, and the count of regions."""

import numpy as np
import pytest

from icar_jax.evaluation.complexity import classical


def squares(count, side=64):
    """`count` x `count` coloured squares."""
    rng = np.random.default_rng(count)
    return np.kron(rng.integers(0, 255, (count, count, 3)), np.ones((side // count, side // count, 1))).astype(np.uint8)


@pytest.mark.parametrize("name", classical.MEASURES)
def test_more_squares_are_more_complex(name):
    few, many = (classical.MEASURES[name](squares(count)) for count in (2, 8))
    assert 0 <= few < many


@pytest.mark.parametrize("name", classical.MEASURES)
def test_a_uniform_picture_is_simplest(name):
    plain = classical.MEASURES[name](np.full((64, 64, 3), 90, np.uint8))
    assert np.isfinite(plain) and plain < classical.MEASURES[name](squares(2))


def test_regions_are_connected_areas_of_one_colour():
    image = np.zeros((60, 60, 3), np.uint8)
    image[5:25, 5:25] = image[35:55, 35:55] = 255  # two white squares on black
    assert classical.regions(image) == pytest.approx(np.sqrt(3))


def test_all_measures_in_order():
    found = classical.measured(np.stack([squares(2), squares(4)]))
    expected = [[function(squares(count)) for function in classical.MEASURES.values()] for count in (2, 4)]
    np.testing.assert_array_equal(found, expected)

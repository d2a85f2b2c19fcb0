"""Classical complexity measures on images with known values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.evaluation.complexity import baselines

quick = settings(max_examples=30, deadline=None)
S = baselines.SIZE
COLOURS = st.tuples(*[st.integers(0, 255)] * 3)


def flat(colour):
    return np.full((S, S, 3), colour, np.uint8)


def busy(blocks):
    """Returns grey images with noise, the same in each, in `blocks` of 16 blocks."""
    noise = np.random.default_rng(0).integers(0, 256, (S, S, 3), np.uint8)
    image, side = flat(128), S // 4
    for k in range(blocks):
        part = np.s_[k // 4 * side : (k // 4 + 1) * side, k % 4 * side : (k % 4 + 1) * side]
        image[part] = noise[part]
    return image


@quick
@given(COLOURS)
def test_a_flat_image_has_zero_complexity(colour):
    image = flat(colour)
    assert baselines.edge_density(image) == 0
    assert baselines.gradient_entropy(image) == 0
    assert baselines.jpeg_bytes(image) < baselines.jpeg_bytes(busy(1))


@quick
@given(st.integers(0, 15))
def test_measures_grow_with_the_number_of_edges(blocks):
    few, many = busy(blocks), busy(blocks + 1)
    for measure in baselines.MEASURES.values():
        assert measure(many) > measure(few)


def test_values_by_hand():
    image = flat(0)
    image[:, S // 2 :] = 255  # one edge, detected in two pixel columns
    assert baselines.edge_density(image) == pytest.approx(2 / (S - 2))
    p = 2 / (S - 2)
    assert baselines.gradient_entropy(image) == pytest.approx(-(p * np.log2(p) + (1 - p) * np.log2(1 - p)))
    # A step below the threshold is not an edge; one above it is.
    for step, density in ((int(0.9 * baselines.EDGE * 255), 0), (int(np.ceil(1.1 * baselines.EDGE * 255)), p)):
        image = flat(100)
        image[:, S // 2 :] += np.uint8(step)
        assert baselines.edge_density(image) == pytest.approx(density)


@quick
@given(st.integers(0, 2**32 - 1))
def test_rotating_an_image_changes_no_edge(seed):
    image = np.random.default_rng(seed).integers(0, 256, (S, S, 3), np.uint8)
    for turned in (image[::-1], image.swapaxes(0, 1), np.rot90(image)):
        assert baselines.edge_density(turned) == baselines.edge_density(image)
        assert baselines.gradient_entropy(turned) == pytest.approx(baselines.gradient_entropy(image), abs=0.02)


def test_a_fit_recovers_a_line_and_stays_in_the_range_of_ratings():
    rng = np.random.default_rng(0)
    measures = rng.random((50, 3)) * [0.5, 1, 8]
    rated = 0.1 + 0.8 * measures[:, 1]
    fits = baselines.fit_baselines(measures, rated)
    assert set(fits) == {*baselines.MEASURES, baselines.COMBINED}
    for name in ("edge_density", baselines.COMBINED):
        assert fits[name](measures) == pytest.approx(rated)
    assert fits["edge_density"](np.array([[0, 5.0, 0], [0, -5.0, 0]])).tolist() == [1, 0]
    error = lambda name: np.mean((fits[name](measures) - rated) ** 2)
    assert error(baselines.COMBINED) <= error("edge_density") + 1e-12 < error("jpeg_bytes")


def test_a_fit_needs_images():
    with pytest.raises(ValueError, match="more than 3 images, found 3"):
        baselines.fit_baselines(np.zeros((3, 3)), np.zeros(3))


def test_all_measures_at_once():
    images = np.stack([flat(9), busy(3)])
    found = baselines.classical_measures(images)
    assert found.tolist() == [[f(image) for f in baselines.MEASURES.values()] for image in images]

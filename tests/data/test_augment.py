"""Each augmentation matches its field, is a function of the generator, and does nothing when disabled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icar_jax.config import DataConfig
from icar_jax.data.augment import Augment, from_config
from icar_jax.data.images import Preprocess

SIDE = 32
PREPROCESS = Preprocess(SIDE, "squash", "bilinear")
DRAWS = 60


def picture(width=48, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def draw(augment, seed=0, image=None):
    return augment.resize(image or picture(), PREPROCESS, np.random.default_rng((7, seed)))


ON = {
    "crop": Augment("crop"), "squashed_crop": Augment("squashed_crop"), "flip": Augment(flip=True),
    "rotate": Augment(rotate=10), "translate": Augment(translate=0.25), "brightness": Augment(brightness=0.5),
    "contrast": Augment(contrast=0.5), "saturation": Augment(saturation=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", ON)
def test_each_is_a_function_of_the_generator(name):
    pictures = [draw(ON[name], seed) for seed in range(8)]
    assert all((draw(ON[name], seed) == pixels).all() for seed, pixels in enumerate(pictures))
    assert len({pixels.tobytes() for pixels in pictures}) > 1
    assert all(p.shape == (SIDE, SIDE, 3) and p.dtype == np.uint8 for p in pictures)


def test_off_is_the_evaluation_resize_and_draws_nothing():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert (Augment().resize(picture(), PREPROCESS, rng) == PREPROCESS.resize(picture())).all()
    assert rng.bit_generator.state == before
    assert from_config(DataConfig(), True) == Augment(scale=(1.0, 1.0))


def test_rotation_by_a_known_angle(monkeypatch):
    """A dot right of the centre moves below it after a quarter turn clockwise."""
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[15:17, 26:28] = 255

    class Quarter:
        def uniform(self, low, high):
            return high if (low, high) == (-90, 90) else 0.0

    turned = Augment(rotate=90).resize(Image.fromarray(pixels), PREPROCESS, Quarter())
    assert (turned == np.rot90(pixels, -1)).all()


def test_rotation_stays_within_its_degrees():
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[14:18, 26:30] = 255  # 12 pixels right of the centre
    angles = []
    for seed in range(DRAWS):
        ys, xs = np.nonzero(draw(Augment(rotate=20), seed, Image.fromarray(pixels))[..., 0] > 127)
        angles.append(np.degrees(np.arctan2(ys.mean() - 15.5, xs.mean() - 15.5)))
    assert -22 < min(angles) < -12 and 12 < max(angles) < 22


def test_a_shift_stays_within_its_share_and_leaves_black():
    white = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    shifts = []
    for seed in range(DRAWS):
        pixels = draw(Augment(translate=0.25), seed, white)
        shifts.append([int((pixels.max(axis=(axis, 2)) == 0).sum()) for axis in (0, 1)])
    assert np.max(shifts, axis=0).tolist() == [8, 8] and np.min(shifts) == 0
    lefts = [bool((draw(Augment(translate=0.25), seed, white)[16, 0] == 0).all()) for seed in range(DRAWS)]
    assert 0.2 < np.mean(lefts) < 0.8, "shifts go either way"


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_stays_within_its_range(name):
    base = np.zeros((SIDE, SIDE, 3), np.uint8)
    base[:, : SIDE // 2], base[:, SIDE // 2 :] = (120, 60, 60), (60, 60, 120)
    image = Image.fromarray(base)

    def strength(pixels):
        pixels = pixels.astype(float)
        if name == "brightness":
            return pixels.mean()
        if name == "contrast":
            return pixels[:, 0, 0].mean() - pixels[:, -1, 0].mean()
        return (pixels.max(axis=2) - pixels.min(axis=2)).mean()

    factors = [strength(draw(Augment(**{name: 0.4}), seed, image)) / strength(base) for seed in range(DRAWS)]
    assert 0.57 < min(factors) < 0.8 and 1.2 < max(factors) < 1.43
    if name == "brightness":
        assert np.allclose(draw(Augment(brightness=0.4), 3, image) / np.maximum(base, 1), factors[3], atol=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 80), st.integers(20, 80), st.integers(0, 1000), st.floats(0.3, 1.0))
def test_a_squashed_crop_is_a_crop_of_the_squashed_image(width, height, seed, low):
    """On a smooth image, one and two resamplings agree up to rounding; the rectangle is drawn in the squashed image."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([x * 255 / width, y * 255 / height, 0 * x], -1).astype(np.uint8)
    once = draw(Augment("squashed_crop", scale=(low, 1.0)), seed, Image.fromarray(smooth))
    squashed = Image.fromarray(PREPROCESS.resize(Image.fromarray(smooth)))
    twice = draw(Augment("crop", scale=(low, 1.0)), seed, squashed)
    inner = slice(2, -2)
    assert np.abs(once[inner, inner].astype(int) - twice[inner, inner]).max() <= 26  # one pixel of the smallest image is 13


def test_the_field_of_each_in_the_configuration():
    data = DataConfig(crop_scale=0.8, flip=True, rotate=10, translate=0.1, brightness=0.2, contrast=0.3, saturation=0.1)
    assert from_config(data, True) == Augment("squashed_crop", (0.8, 1.0), (3 / 4, 4 / 3), True, 10, 0.1, 0.2, 0.3, 0.1)
    assert from_config(data, False).kind == "crop"


@pytest.mark.parametrize("wrong", [{"rotate": -1}, {"rotate": 200}, {"translate": 1.5}, {"contrast": -0.1}, {"saturation": 2}])
def test_values_out_of_range(wrong):
    with pytest.raises(ValueError, match=f"augment.{next(iter(wrong))}"):
        Augment(**wrong)

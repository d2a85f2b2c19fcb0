"""Decoding of all image kinds, and the resizes of published weights."""

import io

import numpy as np
import pytest
from PIL import Image

from icar_jax.data.augment import Augment, random_box
from icar_jax.data.images import ImageError, Preprocess, decode
from icar_jax.errors import ConfigError


def gradient(width, height):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x + y) % 256], -1).astype(np.uint8)


def file_bytes(image, **options):
    stream = io.BytesIO()
    image.save(stream, **options)
    return stream.getvalue()


def test_all_input_kinds_agree(tmp_path):
    pixels = gradient(20, 10)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    for given in (path, str(path), path.read_bytes(), pixels, Image.fromarray(pixels)):
        image = decode(given)
        assert image.mode == "RGB" and (np.asarray(image) == pixels).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb(mode):
    assert decode(Image.fromarray(gradient(8, 6)).convert(mode)).mode == "RGB"


def test_grey_arrays_and_16_bit_files():
    grey = gradient(8, 6)[..., 0]
    for given in (grey, grey[..., None]):
        assert (np.asarray(decode(given)) == grey[..., None]).all()
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert (np.asarray(decode(file_bytes(deep, format="PNG"))) == grey[..., None]).all()


def test_transparency_is_composited_on_white():
    pixels = np.dstack([gradient(8, 6), np.full((6, 8), 255, np.uint8)])
    pixels[0, 0] = (10, 20, 30, 0)
    image = np.asarray(decode(pixels))
    assert (image[0, 0] == 255).all() and (image[1:] == pixels[1:, :, :3]).all()
    palette = Image.new("P", (2, 2))
    assert (np.asarray(decode(file_bytes(palette, format="PNG", transparency=0))) == 255).all()


def test_exif_orientation_is_applied():
    image = Image.fromarray(gradient(20, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode(file_bytes(image, format="JPEG", exif=exif)).size == (10, 20)


def test_damaged_files_are_named(tmp_path):
    whole = file_bytes(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), format="JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"cut\.jpg.*truncated"):
        decode(path)
    path.write_bytes(b"no image at all")
    with pytest.raises(ImageError, match=r"cut\.jpg: not an image"):
        decode(path)
    path.write_bytes(b"")
    with pytest.raises(ImageError, match=r"cut\.jpg"):
        decode(path)
    with pytest.raises(FileNotFoundError, match="absent"):
        decode(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="photo 7"):
        decode(whole[:100], name="photo 7")


def test_decompression_bomb(monkeypatch):
    data = file_bytes(Image.new("L", (300, 300)), format="PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="MAX_IMAGE_PIXELS"):
        decode(data, name="bomb.png")


@pytest.mark.parametrize("array", [np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4, 3), np.uint8)])
def test_wrong_arrays(array):
    with pytest.raises(ImageError, match="expected a uint8 array"):
        decode(array)


def test_wrong_types_and_float_files():
    with pytest.raises(TypeError, match="int"):
        decode(3)
    with pytest.raises(ImageError, match="floating-point"):
        decode(Image.new("F", (2, 2)))


def clip_reference(image, size, resample):
    """Resize and CenterCrop as in torchvision."""
    w, h = image.size
    short, long = min(w, h), max(w, h)
    new_short, new_long = size, int(size * long / short)
    new_w, new_h = (new_short, new_long) if w <= h else (new_long, new_short)
    image = image.resize((new_w, new_h), resample)
    top, left = int(round((new_h - size) / 2.0)), int(round((new_w - size) / 2.0))
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("shape", [(64, 48), (48, 64), (33, 33), (101, 77), (20, 9), (224, 31)])
def test_crop_equals_torchvision(shape):
    image = Image.fromarray(gradient(*shape))
    out = Preprocess(32).resize(image)
    assert out.shape == (32, 32, 3) and out.dtype == np.uint8
    assert (out == clip_reference(image, 32, Image.Resampling.BICUBIC)).all()


def test_squash_is_antialiased():
    checks = np.zeros((256, 256, 3), np.uint8)
    checks[::2, ::2] = checks[1::2, 1::2] = 255
    for interpolation in ("bicubic", "bilinear"):
        out = Preprocess(16, "squash", interpolation).resize(Image.fromarray(checks))
        assert np.abs(out.astype(int) - 127).max() < 8


def test_extreme_strips_stay_cheap():
    assert Preprocess(64).resize(Image.new("RGB", (60_000, 1), (9, 9, 9))).shape == (64, 64, 3)


def test_preprocess_round_trip_and_checks():
    p = Preprocess(224, "squash", "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert Preprocess.from_dict(p.to_dict()) == p
    assert isinstance(p.to_dict()["mean"], list)
    with pytest.raises(ValueError, match=r"missing fields \['std'\], unknown fields \['sdt'\]"):
        Preprocess.from_dict({("sdt" if k == "std" else k): v for k, v in p.to_dict().items()})
    for wrong in (
        {"image_size": 0},
        {"resize_mode": "pad"},
        {"interpolation": "lanczos"},
        {"mean": (0.5,)},
        {"std": (0, 1, 1)},
    ):
        with pytest.raises(ValueError, match="preprocess"):
            Preprocess(**({"image_size": 8} | wrong))


def test_augment_is_deterministic_and_flip_is_separate():
    image, p = Image.fromarray(gradient(60, 40)), Preprocess(16, "squash")
    draw = lambda augment, seed: augment.resize(image, p, np.random.default_rng(seed))  # noqa: E731
    assert (draw(Augment(), 0) == p.resize(image)).all()
    assert (draw(Augment("crop"), 1) == draw(Augment("crop"), 1)).all()
    assert (draw(Augment("crop"), 1) != draw(Augment("crop"), 2)).any()
    flipped = [bool((draw(Augment(flip=True), s) == p.resize(image)[:, ::-1]).all()) for s in range(40)]
    assert 5 < sum(flipped) < 35
    rising = [np.diff(draw(Augment("crop"), s)[8, :, 0].astype(int)).min() >= 0 for s in range(20)]
    assert all(rising)  # cropping never mirrors
    for wrong in ({"kind": "cutmix"}, {"scale": (0, 1)}, {"ratio": (2, 1)}):
        with pytest.raises(ValueError, match="augment"):
            Augment(**wrong)


@pytest.mark.parametrize("size", [(100, 60), (1, 1), (500, 2), (2, 500)])
def test_random_boxes_lie_inside(size):
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = random_box(size, (0.3, 1.0), (3 / 4, 4 / 3), rng)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_at_the_size_that_is_needed(mode, orientation):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((1600, 1200), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    picture.convert(mode).save(stream, "JPEG", quality=95, exif=exif)
    whole = decode(stream.getvalue())
    assert sorted(whole.size) == [1200, 1600]
    for preprocess, shorter in ((Preprocess(64), 300), (Preprocess(64, "squash", "bilinear"), 300), (Preprocess(224), 1200)):
        some = decode(stream.getvalue(), at_least=preprocess.decoded_side)
        assert min(some.size) == shorter >= preprocess.decoded_side and (some.width < some.height) == (orientation == 6)
        apart = np.abs(preprocess.resize(some).astype(int) - preprocess.resize(whole))
        assert apart.max() <= 6 and apart.mean() < 1
    assert decode(stream.getvalue(), at_least=100).size != whole.size


def test_only_files_of_jpegs_are_decoded_smaller():
    picture = Image.new("RGB", (800, 600), "red")
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    for image in (stream.getvalue(), picture, np.asarray(picture)):
        assert decode(image, at_least=10).size == (800, 600)


def test_a_crop_may_resize_to_more_pixels_than_it_keeps():
    wide = Image.fromarray(gradient(120, 60))
    plain, larger = Preprocess(24), Preprocess(24, resize_to=40)
    whole = Preprocess(40).resize(Image.fromarray(gradient(60, 60)))
    assert (larger.resize(Image.fromarray(gradient(60, 60))) == whole[8:32, 8:32]).all()
    assert larger.resize(wide).shape == (24, 24, 3) and (larger.resize(wide) != plain.resize(wide)).any()
    assert (larger.decoded_side, plain.decoded_side) == (120, 72)
    assert Preprocess.from_dict(larger.to_dict()) == larger and larger.to_dict()["resize_to"] == 40
    # Descriptions without it stay what they were, and so do the identities made from them.
    assert "resize_to" not in plain.to_dict() and Preprocess(24, resize_to=24) == plain
    for wrong in ({"resize_to": 23}, {"resize_to": -1}, {"resize_to": 40, "resize_mode": "squash"}, {"resize_to": True}):
        with pytest.raises(ConfigError, match="preprocess.resize_to must be 0"):
            Preprocess(24, **wrong)

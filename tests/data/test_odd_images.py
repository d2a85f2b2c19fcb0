"""Odd and hostile image files: each is read right, or refused for the right reason, in little memory and time."""

import io
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from icar_jax.data import decoding
from icar_jax.data.image_structure import inspect_jpeg
from icar_jax.data.images import ImageError, decode
from icar_jax.files import limits
from icar_jax.files.formats import FORMATS, IMAGE_SUFFIXES
from tests.support import odd_images as odd
from tests.support.places import ROOT

WHITE = (255, 255, 255)


def pixels(data, **options):
    return np.asarray(decode(data, "file", **options))


# Formats


def test_every_format_of_the_list_is_read():
    image = odd.noise()
    for name in FORMATS:
        found = pixels(odd.saved(image, name, **({"lossless": True} if name == "WEBP" else {})))
        assert found.shape == (48, 64, 3)
        if name in ("PNG", "BMP", "TIFF", "WEBP"):
            assert (found == np.asarray(image)).all()
    assert {".avif", ".jfif", ".jpe"} <= IMAGE_SUFFIXES


@pytest.mark.parametrize("name", ["a.jpg", "a.eps"])
def test_postscript_starts_no_program(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(odd.EPS)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ImageError, match="not an image file of a format that is read here: JPEG, PNG"):
        decode(tmp_path / name)


# Orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
def test_orientations_equal_those_of_pillow(orientation, order):
    from PIL import ImageOps

    image = odd.noise(40, 24)
    exif = odd.exif_block([odd.turned(orientation, order)], order)
    for data in (odd.jpeg_with_exif(exif, image), odd.png_with_exif(exif, image)):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        assert (pixels(data) == np.asarray(expected.convert("RGB"))).all()


@pytest.mark.parametrize("tag", odd.ODD_TAGS)
@pytest.mark.parametrize("first", [True, False])
def test_other_tags_of_the_wrong_type_lose_no_photograph(tag, first):
    entries = [odd.ODD_TAGS[tag], odd.turned(6)]
    image = odd.noise(40, 24)
    exif = odd.exif_block(entries if first else entries[::-1])
    for make in (odd.jpeg_with_exif, odd.png_with_exif):
        assert (pixels(make(exif, image)) == np.rot90(pixels(make(b"Exif\0\0", image)), -1)).all()


@pytest.mark.parametrize("tag", odd.ODD_TAGS)
def test_nor_do_they_in_avif(tag):
    image = odd.noise(40, 24)
    plain = odd.saved(image, "AVIF", exif=odd.exif_block([(0x131, 2, 4, b"abc\0")]))
    before = struct.pack("<HHI4s", 0x131, 2, 4, b"abc\0")
    assert plain.count(before) == 1
    assert (pixels(plain.replace(before, struct.pack("<HHI4s", *odd.ODD_TAGS[tag]))) == pixels(plain)).all()


@pytest.mark.parametrize(
    "garbage", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", bytes(40), b"\xff" * 300]
)
def test_garbage_instead_of_exif(garbage):
    image = odd.noise()
    assert (pixels(odd.png_with_exif(garbage, image)) == np.asarray(image)).all()
    assert pixels(odd.jpeg_with_exif(b"Exif\0\0" + garbage, image)).shape == (48, 64, 3)


def test_a_tiff_is_turned_once_and_its_odd_tags_do_not_matter():
    for compression in (None, "tiff_adobe_deflate"):
        from PIL.TiffImagePlugin import ImageFileDirectory_v2

        tags = ImageFileDirectory_v2()
        tags[0x112], tags[0x131] = 6, "me"
        image = odd.noise(40, 24)
        data = odd.saved(image, "TIFF", tiffinfo=tags, compression=compression)
        assert (pixels(data) == np.rot90(np.asarray(image), -1)).all()


def test_orientation_of_xmp_where_there_is_no_exif():
    image = odd.noise(40, 24)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert decode(odd.saved(image, "JPEG", xmp=xmp)).size == (24, 40)


# Transparency and depth


def colours(dtype):
    """Three pixels whose high bytes are equal, so that only all bits tell them apart, and black."""
    values = [[0x1234, 0x5678, 0x9ABC], [0x1235, 0x5678, 0x9ABC], [0x1200, 0x5600, 0x9A00], [0, 0, 0]]
    return (np.array([values], np.uint16) >> (0 if dtype == np.uint16 else 8)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_transparent_colour_of_rgb_lies_on_white(dtype):
    image = colours(dtype)
    clear = image[0, 0]
    data = odd.png(image, 2, odd.png_chunk(b"tRNS", clear.astype(">u2").tobytes()))
    found, shown = pixels(data)[0], (image >> 8 if dtype == np.uint16 else image).astype(np.uint8)[0]
    expected = [WHITE if (image[0, i] == clear).all() else tuple(shown[i]) for i in range(4)]
    assert [tuple(each) for each in found.tolist()] == [tuple(map(int, each)) for each in expected]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_transparent_value_of_grey_lies_on_white(dtype):
    image = colours(dtype)[..., :1]
    data = odd.png(image, 0, odd.png_chunk(b"tRNS", image[0, 0].astype(">u2").tobytes()))
    high = 0x12
    expected = [255, high, high, 0] if dtype == np.uint16 else [255, 255, 255, 0]
    assert pixels(data)[0, :, 0].tolist() == expected


def test_transparency_in_bands_equals_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (50, 7, 4), np.uint8))
    expected = pixels(odd.saved(image, "PNG"))
    white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    assert (expected == np.asarray(white)).all()
    monkeypatch.setattr("icar_jax.data.image_pixels._BAND_PIXELS", 30)
    assert (pixels(odd.saved(image, "PNG")) == expected).all()


def test_a_reduced_image_is_the_mean_of_squares_after_transparency(monkeypatch):
    monkeypatch.setattr(limits, "REDUCED_FROM_PIXELS", 100)
    monkeypatch.setattr("icar_jax.data.image_pixels._BAND_PIXELS", 200)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (61, 47, 4), np.uint8))
    whole = pixels(odd.saved(image, "PNG")).astype(float)
    found = pixels(odd.saved(image, "PNG"), at_least=11)
    assert found.shape == (16, 12, 3)
    for y in range(16):
        for x in range(12):
            mean = whole[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean(axis=(0, 1))
            assert np.abs(found[y, x] - mean).max() <= 1


RAMP = np.tile(np.arange(0, 4096, 16, dtype=np.uint16), (2, 1))


@pytest.mark.parametrize("data, expected", [
    (odd.tiff(RAMP * 16, 16), RAMP >> 4), (odd.tiff(RAMP, 12), RAMP >> 4), (odd.tiff(RAMP, 16, maximum=4095), RAMP >> 4),
    (odd.tiff(RAMP, 16), RAMP >> 8), (odd.tiff(RAMP * 16, 16, white_is_zero=True), 255 - (RAMP >> 4)),
])  # fmt: skip
def test_grey_of_12_and_16_bits_and_white_is_zero(data, expected):
    assert (pixels(data) == expected[..., None]).all()


def test_integers_without_a_range():
    small = np.arange(256, dtype=np.int32).reshape(16, 16)
    assert (pixels(odd.saved(Image.fromarray(small), "TIFF"))[..., 1] == small).all()
    for values in (small + 45, small - 1, small * 256):
        with pytest.raises(ImageError, match="file: 32-bit integers from .* have no defined range"):
            decode(odd.saved(Image.fromarray(values.astype(np.int32)), "TIFF"), "file")


# Bounds


@pytest.mark.parametrize("options", [
    {}, {"progressive": True}, {"subsampling": 0}, {"quality": 5}, {"restart_marker_blocks": 3},
    {"optimize": True, "quality": 1},
])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (17, 33), (300, 200)])
def test_no_whole_jpeg_counts_as_truncated(options, mode, size):
    for image in (Image.new(mode, size), odd.noise(*size).convert(mode)):
        assert pixels(odd.saved(image, "JPEG", **options)).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", [(500, 500), (16, 60_000), (13_000, 13_000)])
def test_a_jpeg_that_claims_more_pixels_than_it_has_is_truncated(progressive, size):
    data = odd.claiming(odd.saved(odd.noise(16, 16), "JPEG", progressive=progressive, quality=30), *size)
    with pytest.raises(ImageError, match=f"file: .*truncated: {size[0]} x {size[1]} pixels take at least"):
        decode(data, "file")


def test_scans_parts_and_shared_tags_are_bounded(monkeypatch):
    assert pixels(odd.many_scans(64, 50)).shape == (64, 64, 3)
    monkeypatch.setattr(limits, "IMAGE_PARTS", 1000)
    parts = [odd.png_chunk(b"teSt", b"")] * 1001
    black = np.zeros((4, 4, 3), np.uint8)
    gif = odd.saved(Image.new("P", (4, 4)), "GIF", comment=b"x")
    at = gif.index(b"!\xfe")
    for data, why in (
        (odd.many_scans(64, 200), "more than 100 scans"),
        (odd.png(black, 2, *parts), "more than 1,000 chunks"),
        (odd.tiff_sharing(200, 10_000), "tags claim more bytes"),
        (gif[:at] + b"!\xfe\1x\0" * 1001 + gif[at:], "1,000 blocks"),
        (b"\xff\xd8" + b"\xff\xfe\0\2" * 1001 + odd.saved(odd.noise(), "JPEG")[2:], "more than 1,000 segments"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=f"file: .*{why}"):
            decode(data, "file")
    assert pixels(gif).shape == (4, 4, 3) and pixels(odd.png(black, 2, *parts[:900])).shape == (4, 4, 3)


def test_exif_that_claims_gigabytes_takes_none():
    sharing = odd.exif_block([(40000 + i, 1, 60_000, b"\x08\0\0\0") for i in range(5000)] + [odd.turned(6)])
    found = inspect_jpeg(odd.jpeg_with_exif(sharing, odd.noise(40, 24)))
    assert len(found.bad_exif) == 1
    assert decode(odd.jpeg_with_exif(sharing, odd.noise(40, 24))).size == (24, 40)


def test_memory_is_bounded_before_pixels_are_decoded(monkeypatch):
    monkeypatch.setattr(limits, "DECODED_BYTES", 1_000_000)
    with pytest.raises(ImageError, match="file: decoding takes 1,440,000 bytes, which exceed the limit of 1,000,000 bytes"):
        decode(odd.flat_png(600, 600, 8, 2)[:300], "file", max_pixels=10**6)  # cut off: decoding would say so
    assert pixels(odd.flat_png(400, 400, 8, 2)).shape == (400, 400, 3)


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(limits, "LARGE_BYTES", 1000)
    at_once, most, real = [0], [0], decoding.to_rgb

    def counted(*args):
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        at_once[0] -= 1
        return real(*args)

    monkeypatch.setattr(decoding, "to_rgb", counted)
    data = odd.flat_png(64, 64, 8, 6)
    threads = [threading.Thread(target=decode, args=(data,)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most[0] == 1


@pytest.mark.check
def test_peak_memory_and_time_of_large_and_hostile_files():
    done = subprocess.run([sys.executable, "benchmarks/image_files.py"], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n| ") > 15


def test_heic_is_read_where_its_reader_is_installed():
    heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 30, 60))
    heif.register_heif_opener()
    data = odd.saved(image, "HEIF", quality=95, exif=odd.exif_block([odd.turned(6)]))
    found = pixels(data)
    assert found.shape == (64, 48, 3) and np.abs(found.astype(int) - (200, 30, 60)).max() < 8
    assert ".heic" in IMAGE_SUFFIXES

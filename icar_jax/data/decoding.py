"""Decoding of image files with Pillow, within bounds of bytes, pixels, parts and memory."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
import threading
import warnings
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile

from icar_jax.config import not_local
from icar_jax.data.image_pixels import NoRange, bytes_of_mode, is_transparent, low_bytes, number, to_rgb
from icar_jax.data.image_structure import (
    ORIENTATION,
    Irregular,
    check_gif,
    check_png,
    check_tiff,
    inspect_jpeg,
    orientation_of,
    without,
    without_directories,
)
from icar_jax.errors import DataError
from icar_jax.files import limits
from icar_jax.files.formats import FORMATS, HEIF_READER, READS_HEIF
from icar_jax.files.opening import open_regular

ImageLike = str | os.PathLike | bytes | np.ndarray | Image.Image

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# Bytes that decoders hold for each pixel beside Pillow's own, measured with benchmarks/image_files.py.
_DECODER_BYTES = {"WEBP": 12, "AVIF": 10, "HEIF": 10}
_TIFF_BITS, _TIFF_ROWS = 258, 278

# Pillow warns from half of its limit on; the limits here take its place.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_one_at_a_time = threading.Lock()


def _unlocked_after_fork() -> None:
    global _one_at_a_time
    # Pillow warns from half of its limit on; the limits here take its place.


warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_one_at_a_time = threading.Lock()


os.register_at_fork(after_in_child=_unlocked_after_fork)


class ImageError(DataError):
    """An image that cannot be decoded; the message starts with its name."""


class TooManyPixels(ImageError):
    """An image with more pixels than are decoded."""


def decode(
    image: ImageLike, name: str | None = None, at_least: int = 0, max_pixels: int = limits.IMAGE_PIXELS
) -> Image.Image:  # fmt: skip
    """Decodes any supported image to an RGB `PIL.Image`.

    Accepts a path, the bytes of an image file, a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or a
    `PIL.Image`. Applies EXIF orientation, composites transparent pixels on white, scales 16-bit greyscale to 8 bits
    (`icar_jax.data.image_pixels` has the rules), and uses the first frame of an animation. Files are raster formats
    (`icar_jax.files.formats`) within the bounds of `icar_jax.files.limits`; decoding one takes at most DECODED_BYTES of memory
    beyond the bytes of the file.

    Args:
        name: used in error messages; defaults to the path.
        at_least: a large JPEG may be decoded at a half, a quarter or an eighth of its size, and any image above
            REDUCED_FROM_PIXELS may be averaged over squares, with no side below this many pixels; 0 keeps every pixel.
        max_pixels: bound of width x height, at most IMAGE_PIXELS; checked before pixels are decoded.

    Raises:
        FileNotFoundError: no such file.
        ImageError: unreadable, truncated, too large or of an unsupported kind.
        TypeError: not one of the types above.
    """
    if isinstance(image, np.ndarray):
        return _finish(_from_array(image, name or "array"), name or "array", at_least)
    if isinstance(image, Image.Image):
        name = name or getattr(image, "filename", "") or "PIL image"
        try:
            image.load()
        except MemoryError:
            raise
        except Exception as error:  # a file that the caller opened
            raise _image_error(name, error) from error
        return _finish(image, name, at_least)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _decode_file(io.BytesIO(image), name or "image bytes", at_least, max_pixels)
    if not isinstance(image, (str, os.PathLike)):
        expected = "a path, bytes, a uint8 array or a PIL image"
        raise TypeError(f"{name or 'image'}: expected {expected}, got {type(image).__name__}")
    name = name or os.fspath(image)
    if (why := not_local(image)) is not None:
        raise ImageError(f"{name}: {why}; download the image first")
    try:
        with open_regular(image, limits.IMAGE_BYTES) as file:
            return _decode_file(file, name, at_least, max_pixels)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such image file") from None
    except OSError as error:
        raise ImageError(f"{name}: cannot be read: {error.strerror or error}") from error


@functools.cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here: FORMATS as far as Pillow has them, and HEIF with pillow-heif."""
    for name in FORMATS:  # not Image.init(), which imports forty plugins
        importlib.import_module(f"PIL.{'WebP' if name == 'WEBP' else name.capitalize()}ImagePlugin")
    if READS_HEIF:
        importlib.import_module(HEIF_READER).register_heif_opener()
    return tuple(name for name in (*FORMATS, "HEIF") if name in Image.OPEN)


def _decode_file(file: BinaryIO, name: str, at_least: int, max_pixels: int) -> Image.Image:
    # Pillow's plugins raise many exception types on damaged files (SyntaxError, struct.error, KeyError, ...).
    try:
        file, extra, exif = _checked(file)
        with _open(file) as opened:
            opened.info |= {"exif": exif} if exif else {}
            if opened.width * opened.height > max_pixels:
                raise TooManyPixels(
                    f"{name}: too many pixels: {opened.width} x {opened.height} exceed the limit of {max_pixels:,} pixels"
                )
            if at_least:
                opened.draft(None, (at_least, at_least))  # only JPEG has smaller sizes
            low = low_bytes(opened, file)
            needed = _needed(opened, at_least, extra) * (1 if low is None else 2)
            if needed > limits.DECODED_BYTES:
                most = f"exceed the limit of {limits.DECODED_BYTES:,} bytes for one image"
                raise ImageError(f"{name}: decoding takes {needed:,} bytes, which {most}; save it smaller or in another format")
            with _one_at_a_time if needed > limits.LARGE_BYTES else contextlib.nullcontext():
                if opened.format == "TIFF":
                    orientation = _tiff_orientation(opened)
                opened.load()
                if opened.format != "TIFF":
                    orientation = _orientation(opened)
                if low is not None:
                    low.load()
                return _finish(opened, name, at_least, low, orientation)
    except (MemoryError, ImageError):
        raise
    except Irregular as error:
        raise ImageError(f"{name}: cannot decode image: {error}") from None
    except Image.DecompressionBombError as error:
        limit = f"the limit of {max_pixels:,} pixels or that of Pillow, PIL.Image.MAX_IMAGE_PIXELS"
        raise TooManyPixels(f"{name}: too many pixels: they exceed {limit} ({error})") from None
    except Exception as error:
        raise _image_error(name, error) from error


def _checked(file: BinaryIO) -> tuple[BinaryIO, int, bytes]:
    """(the file to give to Pillow, bytes that its decoder needs beyond the pixels, EXIF that is withheld from it).

    Raises Irregular.
    """
    file.seek(0)
    head, extra, exif = file.read(8), 0, b""
    if head[:2] == b"\xff\xd8":
        file.seek(0)
        data = file.read()
        found = inspect_jpeg(data)
        extra = found.coefficient_bytes
        if found.bad_exif:
            file, exif = io.BytesIO(without(data, found.bad_exif)), found.exif
    elif head == b"\x89PNG\r\n\x1a\n":
        check_png(file)
    elif head[:4] == b"GIF8":
        check_gif(file)
    elif head[:2] in (b"II", b"MM"):
        check_tiff(file)
    file.seek(0)
    return file, extra, exif


def _open(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        return Image.open(file, formats=formats())
    except (Image.UnidentifiedImageError, Image.DecompressionBombError):
        raise
    except Exception:
        file.seek(4)
        if file.read(4) != b"ftyp":
            raise
        # The reader of AVIF looks at every tag of the EXIF block; its pixels and orientation lie elsewhere.
        file.seek(0)
        return Image.open(io.BytesIO(without_directories(file.read())), formats=formats())


def _needed(opened: ImageFile.ImageFile, at_least: int, extra: int) -> int:
    """Bytes of memory for decoding: those of Pillow's pixels, of its decoder, and of the result if it is another image."""
    pixels = opened.width * opened.height
    own = bytes_of_mode(opened.mode)
    as_it_is = opened.mode == "RGB" and not is_transparent(opened) and _orientation(opened) == 1
    other = 0 if as_it_is or _reduction(opened.size, at_least) > 1 else 4
    extra += _strip_bytes(opened) if opened.format == "TIFF" else 0
    return pixels * (own + other + _DECODER_BYTES.get(opened.format or "", 0)) + extra


def _strip_bytes(opened: Any) -> int:
    """Bytes of a decompressed strip of a TIFF, which libtiff holds."""
    rows = number(opened.tag_v2.get(_TIFF_ROWS), opened.height)
    bits = opened.tag_v2.get(_TIFF_BITS, (1,))
    return min(rows, opened.height) * opened.width * sum(bits) // 8 if opened.tile and opened.tile[0][0] == "libtiff" else 0


def _reduction(size: tuple[int, int], at_least: int) -> int:
    large = at_least and size[0] * size[1] > limits.REDUCED_FROM_PIXELS
    return max(1, min(size) // at_least) if large else 1


def _finish(
    image: Image.Image, name: str, at_least: int, low: Image.Image | None = None, orientation: int | None = None
) -> Image.Image:
    """RGB, reduced and turned upright; `orientation` None is that of the image's EXIF."""
    orientation = _orientation(image) if orientation is None else orientation
    try:
        image = to_rgb(image, low, _reduction(image.size, at_least))
    except NoRange as error:
        raise ImageError(f"{name}: {error}") from None
    except ValueError as error:
        raise ImageError(f"{name}: images of mode {image.mode} cannot be converted to RGB; save it as RGB") from error
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, from 1 to 8; that of its XMP without one. Other tags are not looked at."""
    exif = image.info.get("exif")
    if not isinstance(image, ImageFile.ImageFile) and "exif" not in image.info:
        exif = image.getexif().tobytes() if image.getexif() else None  # set by the caller
    if isinstance(exif, bytes) and (found := orientation_of(exif)) != 1:
        return found
    if isinstance(raw := image.info.get("Raw profile type exif"), str):  # of PNG by ImageMagick: two lines, then hex
        with contextlib.suppress(ValueError):
            return orientation_of(bytes.fromhex("".join(raw.split("\n")[3:])))
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or b""
    text = xmp if isinstance(xmp, bytes) else str(xmp).encode("utf-8", "replace")
    match = re.search(rb'tiff:Orientation(?:="|>)([1-8])', text[: limits.XMP_BYTES])
    return int(match[1]) if match else 1


def _tiff_orientation(opened: Any) -> int:
    """Orientation of a TIFF that is not loaded. Empties its tags, by which Pillow would turn all pixels into a second copy."""
    try:
        found = opened.tag_v2.get(ORIENTATION)
    except Exception:  # of the wrong type
        found = None
    with contextlib.suppress(Exception):
        exif = opened.getexif()
        for tag in list(exif):
            del exif[tag]
    return found if found in _TURNS else 1


def _image_error(name: str, error: Exception) -> ImageError:
    if isinstance(error, Image.UnidentifiedImageError):
        return ImageError(f"{name}: not an image file of a format that is read here: {', '.join(formats())}")
    return ImageError(f"{name}: cannot decode image: {error or type(error).__name__}")


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    good_shape = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not good_shape or 0 in array.shape:
        raise ImageError(
            f"{name}: expected a uint8 array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] with pixels in 0..255,"
            f" got {array.dtype} {list(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array))

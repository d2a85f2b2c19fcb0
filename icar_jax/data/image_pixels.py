"""Pixels of any kind become 8-bit RGB, band by band, so that no second copy of a large image is needed.

Rules: transparent pixels lie on white, also where one colour is transparent (tRNS of PNG). 16-bit grey spans 0..65535, or what
the file declares (12-bit TIFF, MaxSampleValue), and WhiteIsZero is inverted. 32-bit integers are taken as they are up to 255;
other values, and floating point, have no defined range and are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile

from icar_jax.errors import DataError

_BAND_PIXELS = 1 << 22
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_MAXIMUM = 258, 262, 281
_DEEP_RGB = "RGB;16B"  # Pillow keeps the high bytes of 16-bit RGB


class NoRange(DataError):
    """Pixels without a defined range; the message says which and what to do."""


def bytes_of_mode(mode: str) -> int:
    """Bytes that Pillow takes for a pixel."""
    return 1 if mode in ("1", "L", "P") else 2 if mode.startswith("I;16") else 4


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has transparent pixels or a transparent colour."""
    if image.mode == "RGB":
        value = image.info.get("transparency")
        return isinstance(value, tuple) and len(value) == 3
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def low_bytes(image: ImageFile.ImageFile, file: BinaryIO) -> Image.Image | None:
    """The low bytes of a 16-bit RGB PNG that declares a transparent colour, as an RGB image that is not loaded yet; else None.

    Only all 16 bits tell the transparent colour from its neighbours.
    """
    if image.format != "PNG" or not is_transparent(image) or not image.tile or image.tile[0].args != _DEEP_RGB:
        return None
    file.seek(0)
    low = Image.open(file, formats=("PNG",))
    low.tile = [low.tile[0]._replace(args="RGB;16L")]  # the same bytes read in the other order
    return low


def to_rgb(image: Image.Image, low: Image.Image | None = None, reduce: int = 1) -> Image.Image:
    """RGB image of a loaded image; `reduce` > 1 averages squares of that side, after transparency.

    Args:
        low: of `low_bytes`.

    Raises NoRange, and ValueError for a mode that Pillow cannot convert.
    """
    convert = _converter(image, low)
    if convert is None and reduce == 1:
        return image
    width, height = image.size
    rows = max(1, _BAND_PIXELS // max(1, width) // reduce) * reduce
    out = Image.new("RGB", (-(-width // reduce), -(-height // reduce)))
    for top in range(0, height, rows):
        box = (0, top, width, min(height, top + rows))
        band = image.crop(box)
        band = band if convert is None else convert(band, box)
        out.paste(band if reduce == 1 else band.reduce(reduce), (0, top // reduce))
    return out


def _converter(image: Image.Image, low: Image.Image | None) -> Callable[[Image.Image, tuple], Image.Image] | None:
    """Converts a band (its box is the second argument); None for pixels that are RGB already."""
    if image.mode == "F":
        raise NoRange("floating-point pixels have no defined range; save it with 8 bits")
    if image.mode.startswith("I;16"):
        return _grey16(image)
    if image.mode.startswith("I"):
        low_value, high_value = image.getextrema()
        if low_value < 0 or high_value > 255:
            raise NoRange(f"32-bit integers from {low_value} to {high_value} have no defined range; save it with 8 or 16 bits")
        return lambda band, box: Image.fromarray(np.asarray(band).astype(np.uint8)).convert("RGB")
    if low is not None:
        colour = image.info["transparency"]
        return lambda band, box: _without_colour(band, low.crop(box), colour)
    if is_transparent(image):
        return lambda band, box: _on_white(band)
    return None if image.mode == "RGB" else lambda band, box: band.convert("RGB")


def _on_white(band: Image.Image) -> Image.Image:
    band = band.convert("RGBA")
    white = Image.new("RGBA", band.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, band).convert("RGB")


def _without_colour(high: Image.Image, low: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    pixels = np.array(high)
    deep = pixels.astype(np.uint16) << 8 | np.asarray(low)
    pixels[(deep == np.array(colour, np.uint16)).all(-1)] = 255
    return Image.fromarray(pixels)


def _grey16(image: Any) -> Callable[[Image.Image, tuple], Image.Image]:
    bits, inverted, clear = 16, False, image.info.get("transparency")
    if image.format == "TIFF":
        tags = image.tag_v2
        bits = number(tags.get(_TIFF_BITS), 16)
        most = number(tags.get(_TIFF_MAXIMUM), 0)
        bits = most.bit_length() if bits == 16 and most + 1 in (1 << 10, 1 << 12, 1 << 14) else bits
        inverted = tags.get(_TIFF_PHOTOMETRIC) == 0

    def grey(band: Image.Image, box: tuple) -> Image.Image:
        deep = np.asarray(band, np.uint16)
        pixels = np.minimum(deep >> max(0, bits - 8), 255).astype(np.uint8)
        pixels = 255 - pixels if inverted else pixels
        if isinstance(clear, int):
            pixels = np.where(deep == clear, np.uint8(255), pixels)
        return Image.fromarray(pixels).convert("RGB")

    return grey


def number(value: object, otherwise: int) -> int:
    """A TIFF tag as one integer, or `otherwise`."""
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else otherwise

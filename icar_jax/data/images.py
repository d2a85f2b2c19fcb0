"""Preprocessing of images, resized with Pillow. Pixels stay uint8; normalisation runs on the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from PIL import Image

from icar_jax.data.decoding import ImageError, ImageLike, TooManyPixels, decode
from icar_jax.errors import ConfigError

__all__ = ["ImageError", "ImageLike", "Preprocess", "TooManyPixels", "check_choice", "decode"]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF_MEAN = HALF_STD = (0.5, 0.5, 0.5)

RESIZES = ("squash", "crop")
INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
# An image reduced by less than this factor after a reduced decoding looks as if all its pixels had been read (Pillow's
# documentation of `reducing_gap` calls 3 almost indistinguishable).
_GAP = 3
# Beyond this aspect ratio the long side is cropped before resizing: a 1 x 60000 strip would need gigabytes.
_MAX_ASPECT = 50
_LARGEST = 1 << 14  # pixels of a side that a model sees


@dataclass(frozen=True)
class Preprocess:
    """Preprocessing that a model expects; stored with its weights.

    Attributes:
        image_size: side S of the square input, in pixels.
        resize_mode: 'squash' resizes to S x S regardless of aspect ratio; 'crop' resizes the shortest side to S, or to
            `resize_to`, and crops the centre, with torchvision's rounding.
        interpolation: 'bicubic' or 'bilinear', both antialiased (Pillow).
        mean, std: per RGB channel, for pixels scaled to [0, 1]; applied on the device as (x / 255 - mean) / std.
        resize_to: shortest side before the crop, in pixels, at least S; 0 is S, and S becomes 0. Only with 'crop'.
    """

    image_size: int
    resize_mode: str = "crop"
    interpolation: str = "bicubic"
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    resize_to: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) or isinstance(self.image_size, bool) or not 1 <= self.image_size <= _LARGEST:
            raise ConfigError(
                f"preprocess.image_size must be a positive integer of at most {_LARGEST} (pixels), got {self.image_size!r:.80}"
            )
        check_choice("preprocess.resize_mode", self.resize_mode, RESIZES)
        check_choice("preprocess.interpolation", self.interpolation, tuple(INTERPOLATIONS))
        whole = type(self.resize_to) is int
        wrong = whole and self.resize_to and (self.resize_mode != "crop" or not self.image_size <= self.resize_to <= _LARGEST)
        if not whole or wrong:
            raise ConfigError(
                f"preprocess.resize_to must be 0 or, with resize_mode 'crop', at least image_size={self.image_size} pixels, "
                f"got {self.resize_to!r:.80} with {self.resize_mode!r}"
            )
        if self.resize_to == self.image_size:
            object.__setattr__(self, "resize_to", 0)
        for field in ("mean", "std"):
            value = getattr(self, field)
            try:
                value = tuple(float(v) for v in value)
            except (TypeError, ValueError, OverflowError):
                value = ()
            if len(value) != 3 or not np.isfinite(value).all() or (field == "std" and min(value) <= 0):
                need = "three positive numbers" if field == "std" else "three numbers"
                raise ConfigError(f"preprocess.{field} must be {need} (R, G, B), got {getattr(self, field)!r:.200}")
            object.__setattr__(self, field, value)

    @property
    def decoded_side(self) -> int:
        """Pixels that the shorter side of a decoded image needs; see `decode`."""
        return _GAP * self.shortest_side

    @property
    def shortest_side(self) -> int:
        """Shortest side of an image after resizing and before the crop, in pixels."""
        return self.resize_to or self.image_size

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resizes an RGB image to uint8 [S, S, 3]."""
        size, resample = self.image_size, INTERPOLATIONS[self.interpolation]
        if self.resize_mode == "squash":
            return np.array(image.resize((size, size), resample))
        image = _limit_aspect(image)
        (width, height), short = image.size, self.shortest_side
        if width <= height:
            new_width, new_height = short, int(short * height / width)
        else:
            new_width, new_height = int(short * width / height), short
        image = image.resize((new_width, new_height), resample)
        left, top = round((new_width - size) / 2), round((new_height - size) / 2)
        return np.array(image.crop((left, top, left + size, top + size)))

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict; `from_dict` restores it exactly. `resize_to` is left out if it is 0."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return values if self.resize_to else {k: v for k, v in values.items() if k != "resize_to"}

    @classmethod
    def from_dict(cls, values: Any, where: str = "preprocess") -> Preprocess:
        """Inverse of `to_dict`; every field but `resize_to` must be present.

        Raises ConfigError naming `where` and the missing and unknown fields, or the field with an impossible value.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where}: expected an object, found {values!r:.80}")
        known = {f.name for f in fields(cls)}
        expected = known - {"resize_to"}
        missing, unknown = sorted(expected - set(values)), sorted(set(values) - known)
        if missing or unknown:
            raise ConfigError(
                f"{where}: missing fields {missing}, unknown fields {str(unknown):.200}; expected {sorted(expected)}"
            )
        try:
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where.removesuffix('preprocess')}{error}") from error


def check_choice(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{field} must be one of {', '.join(choices)}, got {value!r:.80}")


def _limit_aspect(image: Image.Image) -> Image.Image:
    width, height = image.size
    keep_w, keep_h = min(width, _MAX_ASPECT * height), min(height, _MAX_ASPECT * width)
    if (keep_w, keep_h) == (width, height):
        return image
    left, top = (width - keep_w) // 2, (height - keep_h) // 2
    return image.crop((left, top, left + keep_w, top + keep_h))

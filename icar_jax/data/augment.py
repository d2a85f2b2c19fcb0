"""Random augmentation of training images with Pillow, using the given random generator.

Applied in this order, each as in torchvision: crop (RandomResizedCrop), horizontal flip, affine (RandomAffine, bilinear, black
outside the image), then brightness, contrast and saturation (ColorJitter, but always in this order).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from icar_jax.config import DataConfig
from icar_jax.data.images import INTERPOLATIONS, Preprocess, check_choice
from icar_jax.errors import ConfigError

AUGMENTS = ("none", "crop", "squashed_crop")
_JITTER = {"brightness": ImageEnhance.Brightness, "contrast": ImageEnhance.Contrast, "saturation": ImageEnhance.Color}


@dataclass(frozen=True)
class Augment:
    """Training augmentation. Disabled transforms draw no random numbers.

    Attributes:
        kind: 'none' uses the evaluation resize; 'crop' resizes a random rectangle of the image to S x S; 'squashed_crop' crops
            from the image squashed to S x S, for models that are evaluated on squashed images (one resampling).
        scale: range of the rectangle's fraction of the image area.
        ratio: range of its aspect ratio (width / height), drawn log-uniformly.
        flip: mirror half of the images. Off by default, because it invalidates captions with left and right.
        rotate: largest rotation about the centre, in degrees, in either direction.
        translate: largest shift as a fraction of the side, horizontally and vertically.
        brightness, contrast, saturation: each factor is drawn from [1 - value, 1 + value].
    """

    kind: str = "none"
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    rotate: float = 0.0
    translate: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        check_choice("augment.kind", self.kind, AUGMENTS)
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ConfigError(f"augment.scale must be (low, high) with 0 < low <= high <= 1, got {self.scale}")
        low, high = self.ratio
        if not 0 < low <= high:
            raise ConfigError(f"augment.ratio must be (low, high) with 0 < low <= high, got {self.ratio}")
        if not 0 <= self.rotate <= 180:
            raise ConfigError(f"augment.rotate must lie in [0, 180] (degrees), got {self.rotate}")
        for name in ("translate", *_JITTER):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment.{name} must lie in [0, 1], got {getattr(self, name)}")

    @property
    def random(self) -> bool:
        """Whether anything is drawn at random."""
        jitter = self.brightness or self.contrast or self.saturation
        return self.kind != "none" or self.flip or bool(self.rotate or self.translate or jitter)

    def resize(self, image: Image.Image, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
        """Augments and resizes an RGB image to uint8 [S, S, 3]."""
        pixels = self._cropped(image, preprocess, rng)
        if self.flip and rng.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        if not (self.rotate or self.translate or self.brightness or self.contrast or self.saturation):
            return pixels
        picture = Image.fromarray(pixels)
        if self.rotate or self.translate:
            picture = _moved(picture, self.rotate, self.translate, rng)
        for name, enhance in _JITTER.items():
            if (most := getattr(self, name)) > 0:
                picture = enhance(picture).enhance(rng.uniform(1 - most, 1 + most))
        return np.array(picture)

    def _cropped(self, image: Image.Image, preprocess: Preprocess, rng: np.random.Generator) -> np.ndarray:
        if self.kind == "none":
            return preprocess.resize(image)
        side = preprocess.image_size
        if self.kind == "crop":
            box = random_box(image.size, self.scale, self.ratio, rng)
        else:
            across, down = image.size[0] / side, image.size[1] / side
            left, top, right, bottom = random_box((side, side), self.scale, self.ratio, rng)
            box = (left * across, top * down, right * across, bottom * down)
        return np.array(image.resize((side, side), INTERPOLATIONS[preprocess.interpolation], box=box))


def from_config(data: DataConfig, whole_images: bool) -> Augment:
    """Returns the augmentation of `config.data`; whole_images: the model is evaluated on squashed, uncropped images."""
    kind = "none" if data.crop_scale == 1 else "squashed_crop" if whole_images else "crop"
    return Augment(
        kind,
        scale=(data.crop_scale, 1.0),
        flip=data.flip,
        rotate=data.rotate,
        translate=data.translate,
        brightness=data.brightness,
        contrast=data.contrast,
        saturation=data.saturation,
    )


def _moved(picture: Image.Image, rotate: float, translate: float, rng: np.random.Generator) -> Image.Image:
    """Rotates an image about its centre, then shifts it by whole pixels."""
    side = picture.size[0]
    angle = math.radians(rng.uniform(-rotate, rotate))
    across, down = (round(float(rng.uniform(-1, 1)) * translate * side) for _ in range(2))
    # Pillow takes the inverse transform: undo the shift, then undo the rotation about the centre.
    cos, sin, centre = math.cos(angle), math.sin(angle), side / 2
    x, y = -centre - across, -centre - down
    inverse = (cos, sin, cos * x + sin * y + centre, -sin, cos, -sin * x + cos * y + centre)
    return picture.transform(picture.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)


def random_box(
    image_size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random rectangle, as in Inception training (Szegedy et al., 2015).

    After ten rectangles that do not fit, returns the largest centred one within the ratio range.
    """
    width, height = image_size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = np.exp(rng.uniform(*np.log(ratio)))
        box_w, box_h = round(float(np.sqrt(area * aspect))), round(float(np.sqrt(area / aspect)))
        if 0 < box_w <= width and 0 < box_h <= height:
            left, top = int(rng.integers(width - box_w + 1)), int(rng.integers(height - box_h + 1))
            return left, top, left + box_w, top + box_h
    box_w = min(width, max(1, round(height * ratio[1])))
    box_h = min(height, max(1, round(width / ratio[0])))
    left, top = (width - box_w) // 2, (height - box_h) // 2
    return left, top, left + box_w, top + box_h

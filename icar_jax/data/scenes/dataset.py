"""Random-access source of scenes; each scene is a pure function of (seed, split, index)."""

from __future__ import annotations

from functools import partial

import numpy as np
from PIL import Image

from icar_jax.data.records import Record, Source
from icar_jax.data.scenes.captions import describe
from icar_jax.data.scenes.draw import draw_scene
from icar_jax.data.scenes.grammar import Scene
from icar_jax.data.scenes.sample import sample_scene, twin_of
from icar_jax.errors import DataError

# Split -> number in the random key. The numbers define the data set; never change them.
SPLITS = {"train": 0, "calibration": 1, "val": 2, "test": 3, "relations": 4, "heldout": 5}
_SEEN_PAIRS_ONLY = ("train", "calibration", "relations")
MIN_IMAGE_SIZE, MAX_IMAGE_SIZE = 32, 512


class Scenes(Source):
    """Scenes of one split.

    ``train`` and ``calibration`` never contain a (colour, shape) pair of HELDOUT_PAIRS. ``val`` and ``test`` use the same
    distribution but contain these pairs at their natural rate; every scene of ``heldout`` contains at least one. In
    ``relations``, scenes 2k and 2k + 1 are twins: equal except that two items swap places, so that only a relation in
    the caption distinguishes them.

    Args:
        split: one of SPLITS.
        size: number of scenes; a longer source starts with the scenes of a shorter one.
        seed: non-negative; each seed defines a different data set.
        image_size: side of the images in pixels, 32 to 512.
        heldout: False excludes the held-out pairs from ``val`` or ``test`` too; None uses the split's own rule.

    Raises:
        ValueError: unknown split, size, seed or image size out of range, an odd size for ``relations``, or
            ``heldout`` contradicts the split's rule.
    """

    def __init__(self, split: str, size: int, *, seed: int = 0, image_size: int = 64, heldout: bool | None = None) -> None:
        if split not in SPLITS:
            raise DataError(f"unknown split {split!r} of scenes; expected one of {', '.join(SPLITS)}")
        if size < 1 or (split == "relations" and size % 2):
            wanted = "an even number of at least 2 (twins come in pairs)" if split == "relations" else "at least 1"
            raise DataError(f"scenes/{split}: size must be {wanted}, got {size}")
        if seed < 0:
            raise DataError(f"scenes/{split}: seed must not be negative, got {seed}")
        if not MIN_IMAGE_SIZE <= image_size <= MAX_IMAGE_SIZE:
            raise DataError(f"scenes/{split}: image_size must be {MIN_IMAGE_SIZE} to {MAX_IMAGE_SIZE} pixels, got {image_size}")
        if heldout and split in _SEEN_PAIRS_ONLY:
            raise DataError(f"scenes/{split} never contains the held-out pairs; heldout=True needs val, test or heldout")
        if heldout is False and split == "heldout":
            raise DataError("scenes/heldout consists of held-out pairs; heldout=False needs another split")
        self.name = f"scenes/{split}"
        self.split, self.size, self.seed, self.image_size = split, size, seed, image_size
        self._exclude_heldout = split in _SEEN_PAIRS_ONLY or heldout is False

    def __len__(self) -> int:
        return self.size

    def scene(self, i: int) -> Scene:
        """Returns scene i as data, without rendering it. Raises IndexError outside [0, len)."""
        if not 0 <= i < self.size:
            raise IndexError(f"{self.name}: index {i} out of range for {self.size} scenes")
        i = int(i)
        key = (self.seed, SPLITS[self.split], i // 2 if self.split == "relations" else i)
        scene = sample_scene(
            np.random.Generator(np.random.Philox(np.random.SeedSequence((*key, 0)))),
            (*key, 1),
            exclude_heldout=self._exclude_heldout,
            force_heldout=self.split == "heldout",
            force_relation=self.split == "relations",
        )
        return twin_of(scene) if self.split == "relations" and i % 2 else scene

    def __getitem__(self, i: int) -> Record:
        scene = self.scene(i)
        return Record(
            name=f"{self.name}/{i:06d}",
            image=partial(_image, scene, self.image_size),
            captions=describe(scene),
            complexity=scene.complexity,
            labels=scene.labels,
        )


def _image(scene: Scene, size: int) -> Image.Image:
    return Image.fromarray(draw_scene(scene, size))

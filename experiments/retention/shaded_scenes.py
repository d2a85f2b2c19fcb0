"""Photograph-textured scenes: the dataset `shaded` of experiments/retention/study.py.

A few thousand captioned photographs are too few for a small tower to outperform a shallower one. Here scenes are drawn on
backgrounds whose brightness comes from photographs; the captions are those of the scenes, on which the towers were pretrained.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from icar_jax.config import ConfigError
from icar_jax.data.records import Record, calibration_split, record_names
from icar_jax.data.scenes import Scenes
from icar_jax.data.scenes.captions import describe
from icar_jax.data.scenes.draw import draw_scene
from icar_jax.data.sources.folders import CaptionFolder

FILE = "dataset_shaded.json"
TIMES = {"train": 10, "test": 4, "val": 4}  # largest number of scenes per photograph
DARKEST, BRIGHTEST = 0.4, 1.4  # background brightness factor at a photograph's black and white
_VERSION = 2  # version of the rendering


def write_scenes(photos: Path, folder: Path, size: int, queries: int, distractors: int) -> None:
    """Writes the images to `folder` in Karpathy's layout, unless they exist; no photograph is used in two splits.

    Args:
        photos: a folder of captioned photographs with splits `train` and `val`.
        size: side of the images in pixels.
        queries: number of images of split `val`, from photographs of `val` and, if these are too few, of `train`.
        distractors: number of images of split `test`, from photographs of `train`; the rest is `train`.

    Raises:
        ConfigError: too few photographs, or `folder` holds images made from others.
        OSError: the folder cannot be written.
    """
    known, val_photos = CaptionFolder(str(photos), "train"), CaptionFolder(str(photos), "val")
    names = record_names(known) + record_names(val_photos)
    made_of = {"version": _VERSION, "photographs": _digest(names), "size": size, "queries": queries, "distractors": distractors}
    if (folder / FILE).is_file():
        found = json.loads((folder / FILE).read_text(encoding="utf-8")).get("made_of")
        if found != made_of:
            raise ConfigError(
                f"{folder} holds images made from {found}, but --photos={photos} would give {made_of}; use another --out, or "
                "delete that folder and all runs of `shaded`"
            )
        return
    test, val = -(-distractors // TIMES["test"]), -(-queries // TIMES["val"])
    more = max(0, val - len(val_photos))
    if len(known) <= test + more:
        raise ConfigError(
            f"--photos={photos}: {len(known)} photographs in `train` and {len(val_photos)} in `val` are too few: {val} are "
            f"needed for queries, {test} for distractors, and the rest for training"
        )
    rest, held = calibration_split(record_names(known), seed=0, size=test + more)
    order = np.random.default_rng(0).permutation(held).tolist()
    parts = {
        "train": [known[i] for i in rest.tolist()],
        "test": [known[i] for i in order[more:]],
        "val": [val_photos[i] for i in range(min(val, len(val_photos)))] + [known[i] for i in order[:more]],
    }
    counts = {"train": len(rest) * TIMES["train"], "test": distractors, "val": queries}
    part = folder.with_name(f".{folder.name}.{os.getpid()}")  # another process may be drawing too
    (part / "images").mkdir(parents=True)
    try:
        images = []
        for split, records in parts.items():
            images += _draw_split(records, split, counts[split], part / "images", size)
        (part / FILE).write_text(json.dumps({"dataset": "shaded", "made_of": made_of, "images": images}), encoding="utf-8")
        if not (folder / FILE).is_file():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def brightness_map(photo: Image.Image, size: int) -> np.ndarray:
    """Returns float32 [size, size]: the photograph's brightness as a factor around 1."""
    grey = ImageOps.autocontrast(photo.convert("L").resize((size, size), Image.Resampling.BICUBIC), cutoff=1)
    return DARKEST + (BRIGHTEST - DARKEST) * np.asarray(grey, np.float32) / 255


def _draw_split(records: Sequence[Record], split: str, count: int, folder: Path, size: int) -> list[dict]:
    """Draws the images of one split into `folder` and returns their entries of the dataset file."""
    scenes, found = Scenes(split, count, image_size=size), {}
    with tqdm(total=count, desc=f"photograph-textured scenes, {split}", unit="image") as bar:
        for first, record in enumerate(records):
            light = brightness_map(record.image(), size)  # once per photograph: decoding is slower than drawing
            for i in range(first, count, len(records)):
                name, scene = f"{split}-{i:06d}.png", scenes.scene(i)
                Image.fromarray(draw_scene(scene, size, light)).save(folder / name)
                found[i] = {"filename": name, "split": split, "sentences": [{"raw": text} for text in describe(scene)]}
                bar.update()
    return [found[i] for i in range(count)]


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]

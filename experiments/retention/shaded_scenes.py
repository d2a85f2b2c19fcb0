"""Scenes whose backgrounds have the light and shade of photographs: `shaded` of experiments/retention/study.py.

A few thousand captioned photographs are too few for a small tower to be better than a shallower one. Here photographs are
what scenes have to be made out in: the captions are those of the scene, which towers pretrained on scenes know.
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
from icar_jax.data.sources.folders import open_folder

FILE = "dataset_shaded.json"
TIMES = {"train": 10, "test": 4, "val": 4}  # how often a photograph comes at most
DARKEST, BRIGHTEST = 0.4, 1.4  # light of a photograph's blacks and whites
_VERSION = 2  # of the way of drawing


def write(photos: Path, folder: Path, size: int, queries: int, distractors: int) -> None:
    """Makes the pictures in `folder` where they are not there, in Karpathy's layout: no photograph is in two splits.

    Args:
        photos: a folder of captioned photographs with splits `train` and `val`.
        size: side of the pictures in pixels.
        queries: pictures of split `val`, of photographs of `val` and, where these are too few, of `train`.
        distractors: pictures of split `test`, of photographs of `train`; all others are `train`.

    Raises:
        ConfigError: too few photographs, or `folder` holds pictures of others.
        OSError: the folder cannot be written.
    """
    known, asked = open_folder(str(photos), "train"), open_folder(str(photos), "val")
    names = record_names(known) + record_names(asked)
    made_of = {"version": _VERSION, "photographs": _digest(names), "size": size, "queries": queries, "distractors": distractors}
    if (folder / FILE).is_file():
        found = json.loads((folder / FILE).read_text(encoding="utf-8")).get("made_of")
        if found != made_of:
            raise ConfigError(
                f"{folder} holds pictures made of {found}, and --photos={photos} would give {made_of}; use another --out, or "
                "delete that folder and all runs of `shaded`"
            )
        return
    test, val = -(-distractors // TIMES["test"]), -(-queries // TIMES["val"])
    more = max(0, val - len(asked))
    if len(known) <= test + more:
        raise ConfigError(
            f"--photos={photos}: {len(known)} photographs in `train` and {len(asked)} in `val` are too few to shade scenes by: "
            f"{val} make what is asked for, {test} more the distractors, and the others are learnt from"
        )
    rest, held = calibration_split(record_names(known), seed=0, size=test + more)
    order = np.random.default_rng(0).permutation(held).tolist()
    parts = {
        "train": [known[i] for i in rest.tolist()],
        "test": [known[i] for i in order[more:]],
        "val": [asked[i] for i in range(min(val, len(asked)))] + [known[i] for i in order[:more]],
    }
    counts = {"train": len(rest) * TIMES["train"], "test": distractors, "val": queries}
    part = folder.with_name(f".{folder.name}.{os.getpid()}")  # another process may be drawing too
    (part / "images").mkdir(parents=True)
    try:
        images = []
        for split, records in parts.items():
            images += _drawn(records, split, counts[split], part / "images", size)
        (part / FILE).write_text(json.dumps({"dataset": "shaded", "made_of": made_of, "images": images}), encoding="utf-8")
        if not (folder / FILE).is_file():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def light_of(photo: Image.Image, size: int) -> np.ndarray:
    """The photograph's light and shade: [size, size] float32, around 1."""
    grey = ImageOps.autocontrast(photo.convert("L").resize((size, size), Image.Resampling.BICUBIC), cutoff=1)
    return DARKEST + (BRIGHTEST - DARKEST) * np.asarray(grey, np.float32) / 255


def _drawn(records: Sequence[Record], split: str, count: int, folder: Path, size: int) -> list[dict]:
    """What the dataset file says of the pictures of one split, which are written to `folder`."""
    scenes, found = Scenes(split, count, image_size=size), {}
    with tqdm(total=count, desc=f"scenes in the light of photographs, {split}", unit="image") as bar:
        for first, record in enumerate(records):
            light = light_of(record.image(), size)  # decoding it takes longer than drawing
            for i in range(first, count, len(records)):
                name, scene = f"{split}-{i:06d}.png", scenes.scene(i)
                Image.fromarray(draw_scene(scene, size, light)).save(folder / name)
                found[i] = {"filename": name, "split": split, "sentences": [{"raw": text} for text in describe(scene)]}
                bar.update()
    return [found[i] for i in range(count)]


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]

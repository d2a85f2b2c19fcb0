"""Tinted photographs with the objects of scenes drawn on them, which the captions name: `objects` of benchmarks/retention.py.

A few thousand captioned photographs are too few for a small tower to be better than a shallower one. Here a photograph, in
shades of one colour, is what the objects have to be told from; what is asked for, the objects, how they lie and the colour,
is what towers pretrained on scenes know, and needs depth.
"""

from __future__ import annotations

import dataclasses
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
from icar_jax.data.folders import open_folder
from icar_jax.data.records import Record
from icar_jax.data.scenes import Scene, Scenes
from icar_jax.data.scenes.captions import describe_items
from icar_jax.data.scenes.draw import draw_scene
from icar_jax.data.splits import calibration_split, record_names

FILE = "dataset_objects.json"
TIMES = {"train": 6, "test": 4, "val": 1}  # how often a photograph comes
_VERSION = 1  # of the way of drawing


def write(photos: Path, folder: Path, size: int, queries: int, distractors: int) -> None:
    """Makes the pictures in `folder` where they are not there, in Karpathy's layout: no photograph is in two splits.

    Args:
        photos: a folder of captioned photographs with splits `train` and `val`.
        size: side of the pictures in pixels.
        queries: pictures of split `val`: of all photographs of `val`, and as many of `train` as are missing.
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
                "delete that folder and all runs of `objects`"
            )
        return
    test, more = -(-distractors // TIMES["test"]), max(0, queries - len(asked))
    if len(known) <= test + more:
        raise ConfigError(
            f"--photos={photos}: {len(known)} photographs in `train` and {len(asked)} in `val` are too few to draw objects on: "
            f"{queries} are asked for, {test} more make the distractors, and the others are learnt from"
        )
    rest, held = calibration_split(record_names(known), seed=0, size=test + more)
    order = np.random.default_rng(0).permutation(held).tolist()
    parts = {
        "train": [known[i] for i in rest.tolist()],
        "test": [known[i] for i in order[more:]],
        "val": [asked[i] for i in range(min(queries, len(asked)))] + [known[i] for i in order[:more]],
    }
    part = folder.with_name(f".{folder.name}.{os.getpid()}")  # another process may be drawing too
    (part / "images").mkdir(parents=True)
    try:
        images = [each for split, records in parts.items() for each in _drawn(records, split, part / "images", size)]
        (part / FILE).write_text(json.dumps({"dataset": "objects", "made_of": made_of, "images": images}), encoding="utf-8")
        if not (folder / FILE).is_file():
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def tinted(photo: Image.Image, scene: Scene, size: int) -> np.ndarray:
    """The photograph as [size, size, 3] uint8, in shades of the colour of the scene's background."""
    grey = ImageOps.autocontrast(photo.convert("L").resize((size, size), Image.Resampling.BICUBIC), cutoff=1)
    share = np.asarray(grey, np.float32)[..., None] / 255
    base = np.asarray(scene.background.rgb[0], np.float32)
    dark, light = 0.4 * base, 0.6 * base + 0.4
    return (255 * np.clip(dark + share * (light - dark), 0, 1)).astype(np.uint8)


def captions(scene: Scene) -> tuple[str, str]:
    """The items and the colour of what is behind them, in two wordings."""
    first, second = describe_items(scene)
    colour = scene.background.colours[0]
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{first} on {article} {colour} background.", f"{second} against {colour}."


def _drawn(records: Sequence[Record], split: str, folder: Path, size: int) -> list[dict]:
    """What the dataset file says of the pictures of one split, which are written to `folder`; no two have the same caption."""
    count = len(records) * TIMES[split]
    scenes, found, said, k = Scenes(split, 3 * count, image_size=size), [], set(), 0
    with tqdm(total=count, desc=f"draw objects on photographs, {split}", unit="image") as bar:
        while len(found) < count:
            scene = dataclasses.replace(scenes.scene(k), confetti=())
            texts, k = captions(scene), k + 1
            if split != "train" and not said.isdisjoint(texts):
                continue
            said.update(texts)
            name = f"{split}-{len(found):06d}.png"
            ground = tinted(records[len(found) % len(records)].image(), scene, size)
            Image.fromarray(draw_scene(scene, size, ground)).save(folder / name)
            found.append({"filename": name, "split": split, "sentences": [{"raw": text} for text in texts]})
            bar.update()
    return found


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]

"""Photographs with the objects of scenes drawn on them, which the captions name: `objects` of benchmarks/retention.py.

A few thousand captioned photographs are too few for a small tower to be better than a shallower one. What a photograph shows
stays what makes a picture hard; what is asked for, the objects and how they lie, needs depth and has no end of examples.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from icar_jax.data.folders import open_folder
from icar_jax.data.records import Source
from icar_jax.data.scenes import Scenes
from icar_jax.data.scenes.captions import describe_items
from icar_jax.data.scenes.draw import draw_scene
from icar_jax.data.scenes.grammar import Nuisance
from icar_jax.data.splits import calibration_split, record_names

FILE = "dataset_objects.json"
TIMES = {"train": 7, "test": 4, "val": 2}  # how often a photograph comes
HELD = 1000  # photographs of `train` that are kept for distractors: split `test`
# A photograph has its own light, noise and blur.
_STILL = Nuisance(noise=0, blur=0, contrast=1, brightness=0, hue=0, saturation=1, illumination=0, light_angle=0, warmth=0)


def write(photos: Path, folder: Path, size: int, held: int = HELD) -> None:
    """Makes the pictures in `folder` where they are not there, in Karpathy's layout: no photograph is in two splits.

    photos: a folder of captioned photographs with splits `train` and `val`. size: side in pixels. held: photographs of `train`
    that become `test`. Raises OSError, ValueError.
    """
    if (folder / FILE).is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)  # half of it, of a run that was stopped
    (folder / "images").mkdir(parents=True)
    known = open_folder(str(photos), "train")
    train, test = calibration_split(record_names(known), seed=0, size=held)
    asked = open_folder(str(photos), "val")
    images = []
    for split, source, chosen in (("train", known, train), ("test", known, test), ("val", asked, np.arange(len(asked)))):
        images += _drawn(source, chosen.tolist(), split, folder / "images", size)
    part = folder / f".{FILE}"
    part.write_text(json.dumps({"dataset": "objects", "images": images}), encoding="utf-8")
    part.replace(folder / FILE)  # where it is, the folder is whole


def _drawn(source: Source, chosen: list[int], split: str, folder: Path, size: int) -> list[dict]:
    """What the dataset file says of the pictures of one split, which are written to `folder`."""
    times, found = TIMES[split], []
    scenes = Scenes(split, len(chosen) * times, image_size=size)
    with tqdm(total=len(scenes), desc=f"draw objects on photographs, {split}", unit="image") as bar:
        for turn in range(times):
            for place, i in enumerate(chosen):
                record = source[i]
                scene = dataclasses.replace(scenes.scene(turn * len(chosen) + place), confetti=(), nuisance=_STILL)
                ground = np.asarray(record.image().convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
                name = f"{Path(record.name).stem}-{turn}.png"
                Image.fromarray(draw_scene(scene, size, ground)).save(folder / name)
                sentences = [{"raw": f"{text}."} for text in describe_items(scene)]
                found.append({"filename": name, "split": split, "sentences": sentences})
                bar.update()
    return found


"""Tiny folders of rated images, in every layout that is read."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def images(folder: Path, count: int, side: int = 16) -> list[str]:
    """JPEG files '0 a.jpg' ... whose brightness rises with their number; returns the names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{i} a.jpg" for i in range(count)]
    for i, name in enumerate(names):
        pixels = np.full((side, side + 4, 3), round(255 * i / max(1, count - 1)), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return names


def ic9600(root: Path, train: int = 40, test: int = 10) -> Path:
    """IC9600's layout: images/, train.txt, test.txt; the score is the number's share of all."""
    names = images(root / "images", train + test)
    lines = [f"{name}  {i / (train + test - 1):.6f}" for i, name in enumerate(names)]
    chosen = np.random.default_rng(0).permutation(train + test)
    for split, part in (("train", chosen[:train]), ("test", chosen[train:])):
        (root / f"{split}.txt").write_text("".join(lines[i] + "\n" for i in part))
    return root


def annotations(root: Path, count: int = 60, undecided: int = 4) -> Path:
    """A folder of images with labels.json: the brighter half is complex; returns the folder."""
    names = images(root, count)
    labels = {name: -1 if i < undecided else int(i >= count // 2) for i, name in enumerate(names)}
    (root / "labels.json").write_text(json.dumps(labels))
    return root

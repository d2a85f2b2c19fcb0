"""Writes activation maps of complexity models: one PNG per image, with the image next to its map."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from icar_jax import workdir
from icar_jax.config import ConfigError
from icar_jax.data.images import ImageError
from icar_jax.inference.explain import Explainer, Explanation, over_picture

INDEX = "maps.csv"
_DPI, _LONGEST = 110, 560  # _LONGEST: pixels of the image's longer side
_PALETTE = "RdBu_r"  # diverging and colour-blind safe
_BATCH = 8
_NAME_BYTES = 200  # of 255, for a number, the suffix and the name of the temporary file


def require_folder(folder: str | os.PathLike, overwrite: bool) -> Path:
    """Returns the output folder. Raises ConfigError for a file, and for a folder that is not empty unless `overwrite`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--explain {folder} is a file; pass a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ConfigError(f"--explain {folder} is not empty; choose another folder, or pass --overwrite to write into it")
    return folder


def write_explanations(
    explainer: Explainer,
    files: Sequence[str],
    scores: np.ndarray,
    folder: str | os.PathLike,
    *,
    limit: int = 50,
    npy: bool = False,
) -> int:
    """Writes maps of the `limit` most complex of N files as FOLDER/<name>.png, lists them in FOLDER/maps.csv, and returns the
    number of images written.

    Images are sorted by descending score; ties keep the order of `files`. Files of equal name in several folders become
    name-2.png and so on; names beyond 200 bytes are shortened. With `npy`, FOLDER/<name>.npy holds the map: float32 [h, w] over
    the square seen by the model. Files that can no longer be read are skipped. Each file is written atomically.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")[:limit]
    rows: list[tuple[str, float, str]] = []
    taken: set[str] = set()
    for start in tqdm(range(0, len(order), _BATCH), desc="explain", unit="batch"):
        names = [files[i] for i in order[start : start + _BATCH]]
        for file, explained in _readable(explainer, names):
            name = _free_name(Path(file).stem, taken)
            stream = io.BytesIO()
            draw(explained, explainer, Path(file).name, stream)
            workdir.write_bytes(folder / f"{name}.png", stream.getvalue())
            if npy:
                stream = io.BytesIO()
                np.save(stream, explained.map)
                workdir.write_bytes(folder / f"{name}.npy", stream.getvalue())
            rows.append((file, explained.score, f"{name}.png"))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "score", "picture"))
    writer.writerows((file, f"{score:.6f}", picture) for file, score, picture in rows)
    workdir.write_text(folder / INDEX, text.getvalue())
    return len(rows)


def _readable(explainer: Explainer, files: list[str]) -> list[tuple[str, Explanation]]:
    try:
        return list(zip(files, explainer.explain(files), strict=True))
    except (OSError, ImageError):  # a file changed since it was scored
        return [pair for file in files for pair in _readable(explainer, [file])] if len(files) > 1 else []


def _free_name(stem: str, taken: set[str]) -> str:
    """A name that is not taken, shortened so that suffixes fit into a file name."""
    stem = _shortened(stem)
    name, number = stem, 1
    while name.casefold() in taken:  # some file systems are case-insensitive
        number += 1
        name = f"{stem}-{number}"
    taken.add(name.casefold())
    return name


def _shortened(stem: str) -> str:
    raw = os.fsencode(stem)
    return stem if len(raw) <= _NAME_BYTES else raw[:_NAME_BYTES].decode("utf-8", "ignore") + "~"


def draw(explained: Explanation, explainer: Explainer, name: str, stream: io.BytesIO) -> None:
    """Writes a PNG with the image, and the image in grey under its map: red raised the score, blue lowered it.

    Colours are scaled to the largest value of each map, so they are not comparable between images.
    """
    found = over_picture(explained, explainer.preprocess)
    picture = explained.picture
    scale = min(_LONGEST / max(picture.size), 4.0)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    found = np.asarray(Image.fromarray(found).resize(size, Image.Resampling.BILINEAR))
    width, height = size[0] / _DPI, size[1] / _DPI
    gap, bar, top = 0.15, 0.95, 0.55  # inches
    total = max(2 * width + 3 * gap + bar, 4.0), height + top + gap  # room for the name above a narrow image
    figure = Figure(figsize=total, dpi=_DPI)
    FigureCanvasAgg(figure)
    largest = float(np.abs(explained.map).max()) or 1.0
    left = figure.add_axes((gap / total[0], gap / total[1], width / total[0], height / total[1]))
    right = figure.add_axes(((2 * gap + width) / total[0], gap / total[1], width / total[0], height / total[1]))
    left.imshow(picture, aspect="auto")
    grey = np.asarray(picture.convert("L"), np.float32) / 255
    right.imshow(0.35 + 0.6 * grey, cmap="gray", vmin=0, vmax=1, aspect="auto")
    # Full opacity from half of the largest value, since faint colours are hard to see on the image.
    strength = np.clip(2 * np.abs(found) / largest, 0, 1) * 0.75
    right.imshow(found, cmap=_PALETTE, vmin=-largest, vmax=largest, alpha=strength, aspect="auto")
    for axes in (left, right):
        axes.set_axis_off()
    place = ((3 * gap + 2 * width) / total[0], (gap + 0.06 * height) / total[1], 0.14 / total[0], 0.88 * height / total[1])
    colours = figure.colorbar(ScalarMappable(Normalize(-largest, largest), _PALETTE), cax=figure.add_axes(place))
    colours.ax.tick_params(labelsize=7)
    colours.ax.locator_params(nbins=5)
    room = int(11.5 * total[0]) - 20  # characters
    shown = name if len(name) <= room else f"{name[: room // 2]}…{name[-(room // 2) :]}"
    note = "red raised the score, blue lowered it (log odds)"
    for text, place, points in ((f"{shown}: complexity {explained.score:.3f}", 0.33, 10), (note, 0.74, 8)):
        figure.text(gap / total[0], 1 - place * top / total[1], text, fontsize=points, va="center", parse_math=False)
    figure.savefig(stream, format="png", metadata={"Software": None})

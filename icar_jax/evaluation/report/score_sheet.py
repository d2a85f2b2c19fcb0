"""Contact sheet of scored images, simple to complex, below a histogram of their scores."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from icar_jax import workdir
from icar_jax.data.images import ImageError, decode
from icar_jax.evaluation.report import figures
from icar_jax.inference.router import assign

COLUMNS = 10
_BOX, _CAPTION, _GAP, _MARGIN = (150, 124), 40, 10, 24  # pixels
_DECODED = 3 * max(_BOX)  # pixels a side that a thumbnail is made from, if the image is large
_HISTOGRAM_INCHES = 3.1
_INK, _FAINT, _PAPER = "#222222", "#777777", "white"


def spread(scores: np.ndarray, n: int) -> np.ndarray:
    """Returns indices [min(n, N)] at evenly spaced ranks of scores [N], in ascending order, including both extremes."""
    order = np.argsort(scores, kind="stable")
    return order[np.rint(np.linspace(0, len(order) - 1, min(n, len(order)))).astype(int)]


def score_sheet(
    files: Sequence[str],
    scores: np.ndarray,
    path: str | os.PathLike,
    *,
    model: str,
    exits: Sequence[int] = (),
    thresholds: Sequence[float] = (),
    thumbnails: int = 60,
) -> None:
    """Writes a PNG with a histogram of all scores and their thresholds, and thumbnails in order of score.

    Args:
        files: N image files; unreadable files are shown as empty frames.
        scores: [N], finite.
        model: name of the model in the title.
        exits, thresholds: those of a bundle; or one threshold without exits, for a classifier.
        thumbnails: largest number of thumbnails; with more images, evenly spaced ranks are shown.

    Raises ValueError without images, and if `thumbnails` is not positive.
    """
    if not len(files) or len(files) != len(scores) or thumbnails < 1:
        raise ValueError(
            f"a sheet needs one score per image and at least one thumbnail, found {len(files)} images, {len(scores)} scores "
            f"and thumbnails={thumbnails}"
        )
    scores = np.asarray(scores, np.float32)
    shown = spread(scores, thumbnails)
    depths = assign(scores, exits, thresholds) if exits else None
    columns = min(COLUMNS, max(5, len(shown)))
    cell = _BOX[0] + _GAP, _BOX[1] + _CAPTION
    width = 2 * _MARGIN + columns * cell[0] - _GAP
    title = f"Complexity of {len(files):,} images, scored by {model}"
    chart = _histogram(scores, thresholds, exits, title, width)
    top = chart.height + 46
    sheet = Image.new("RGB", (width, top + -(-len(shown) // columns) * cell[1] + _MARGIN), _PAPER)
    sheet.paste(chart, (0, 8))
    pen = ImageDraw.Draw(sheet)
    what = "all images" if len(shown) == len(files) else f"{len(shown)} images at evenly spaced ranks"
    note = f"{what}, simplest first; below each: score" + (" and executed blocks" if exits else "")
    pen.text((width / 2, top - 20), note, fill=_FAINT, font=ImageFont.load_default(size=16), anchor="mm")
    for place, index in enumerate(shown):
        left, upper = _MARGIN + place % columns * cell[0], top + place // columns * cell[1]
        picture = _thumbnail(files[index])
        corner = left + (_BOX[0] - picture.width) // 2, upper + _BOX[1] - picture.height
        sheet.paste(picture, corner)
        caption = f"{scores[index]:.3f}" + (f"  ·  {depths[index]} blocks" if depths is not None else "")
        middle = left + _BOX[0] / 2, upper + _BOX[1] + 13
        pen.text(middle, caption, fill=_INK, font=ImageFont.load_default(size=15), anchor="mm")
    stream = io.BytesIO()
    sheet.save(stream, format="png")
    workdir.write_bytes(path, stream.getvalue())


def _histogram(scores: np.ndarray, thresholds: Sequence[float], exits: Sequence[int], title: str, width: int) -> Image.Image:
    stream = io.BytesIO()
    size = (width / figures.DPI, _HISTOGRAM_INCHES)
    parts = exits or ("simple", "complex")[: len(thresholds) + 1]
    figures.complexity_histogram(scores, thresholds, stream, exits=parts, title=title, size_inches=size)
    return Image.open(stream).convert("RGB")


def _thumbnail(file: str) -> Image.Image:
    """Returns the image resized to fit _BOX, keeping the aspect ratio, or an empty frame if it cannot be read."""
    try:
        return ImageOps.contain(decode(file, at_least=_DECODED), _BOX, Image.Resampling.LANCZOS)
    except (OSError, ImageError):
        frame = Image.new("RGB", _BOX, "#eeeeee")
        middle = (_BOX[0] / 2, _BOX[1] / 2)
        ImageDraw.Draw(frame).text(middle, "unreadable", fill=_FAINT, font=ImageFont.load_default(size=15), anchor="mm")
        return frame

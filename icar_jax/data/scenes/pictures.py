"""Writes the images of a source as files: a contact sheet with captions, or a folder for training and search."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from icar_jax.data.records import Source
from icar_jax.errors import DataError

_COLUMNS, _TILE, _LINE, _LINES, _GAP = 5, 192, 12, 15, 8


def contact_sheet(source: Source, n: int, path: str | os.PathLike[str]) -> None:
    """Writes a PNG with the first ``n`` images of ``source``, enlarged, with complexity and captions.

    Raises:
        ValueError: ``n`` is not between 1 and ``len(source)``.
    """
    _require(source, n)
    font = ImageFont.load_default(size=10)
    width, height = _TILE + _GAP, _TILE + _LINES * _LINE + _GAP
    sheet = Image.new("RGB", (_COLUMNS * width, -(-n // _COLUMNS) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for k in range(n):
        record = source[k]
        x, y = k % _COLUMNS * width, k // _COLUMNS * height
        sheet.paste(record.image().resize((_TILE, _TILE), Image.Resampling.NEAREST), (x, y))
        lines = [f"{record.name}  complexity {record.complexity:.2f}"]
        for caption in record.captions:
            lines += textwrap.wrap(caption, 38, initial_indent="- ", subsequent_indent="  ")
        for row, line in enumerate(lines[:_LINES]):
            pen.text((x + 2, y + _TILE + row * _LINE), line, fill="black", font=font)
    sheet.save(path)


def picture_folder(source: Source, n: int, folder: str | os.PathLike[str]) -> None:
    """Writes the first ``n`` images of ``source`` to ``folder``/images as PNG, and then ``folder``/captions.jsonl.

    Each line has `file`, `caption` (all captions) and `complexity`: the layout that training, evaluation and
    `icar index --captions` read. Repeating the call gives the same files.

    Raises:
        ValueError: ``n`` is not between 1 and ``len(source)``, or ``folder`` holds other files.
    """
    _require(source, n)
    folder = Path(folder)
    images, captions = folder / "images", folder / "captions.jsonl"
    records = [source[k] for k in range(n)]
    names = [f"{k:0{len(str(n - 1))}}.png" for k in range(n)]
    if folder.is_dir():
        own = {images, captions, *(images / name for name in names)}
        other = next((p for p in sorted(folder.rglob("*")) if p not in own), None)
        if other is not None:
            raise DataError(f"{folder} holds {other.relative_to(folder)}, which is not one of these images; use a new folder")
    images.mkdir(parents=True, exist_ok=True)
    for name, record in zip(names, records, strict=True):
        record.image().save(images / name)
    lines = [
        json.dumps({"file": name, "caption": list(record.captions), "complexity": record.complexity})
        for name, record in zip(names, records, strict=True)
    ]
    captions.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _require(source: Source, n: int) -> None:
    if not 1 <= n <= len(source):
        raise DataError(f"expected between 1 and {len(source)} images of {source.name}, got {n}")

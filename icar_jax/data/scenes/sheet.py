"""A contact sheet: pictures of a source with their captions, to check them by eye."""

from __future__ import annotations

import os
import textwrap

from PIL import Image, ImageDraw, ImageFont

from icar_jax.data.records import Source

_COLUMNS, _TILE, _LINE, _LINES, _GAP = 5, 192, 12, 15, 8


def contact_sheet(source: Source, n: int, path: str | os.PathLike[str]) -> None:
    """Writes the first ``n`` pictures of ``source``, enlarged, with complexity and captions as a PNG.

    Raises:
        ValueError: ``n`` is not between 1 and ``len(source)``.
    """
    if not 1 <= n <= len(source):
        raise ValueError(f"a contact sheet of {source.name} takes 1 to {len(source)} pictures, got {n}")
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

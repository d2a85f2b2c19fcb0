"""Builds a report as one self-contained HTML page: no scripts or other files, light and dark themes, any screen width.

The template is page.html.j2. It escapes all values, such as captions, paths, notes and names of runs.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2

from icar_jax.evaluation.metrics.bootstrap import Interval
from icar_jax.evaluation.records.retrieval import GalleryCounts


@dataclass(frozen=True)
class Picture:
    """A figure. light, dark: SVG; alt: alternative text; note: caption."""

    title: str
    alt: str
    note: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class RankDrop:
    """An image whose rank got worse at an early exit.

    thumbnail: JPEG, or None if the image can no longer be read. query: the caption used as query, or the image's first caption
    if the image was the query (`by_image`). before, after: rank at full depth and in the run. exit: executed blocks.
    """

    name: str
    thumbnail: bytes | None
    query: str
    before: int
    after: int
    exit: int
    score: float | None
    by_image: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a table. about: explains the name. cells: text, intervals (None: undefined), or shares by exit."""

    name: str
    about: str
    cells: Sequence[str | Interval | None | Mapping[int, float]]


@dataclass(frozen=True)
class Table:
    """A table. caption: label for screen readers; head: one heading per column, with line breaks, also for the names."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Row]


@dataclass(frozen=True)
class Page:
    """What the page shows. cards: (label, value, explanation); more: (summary, tables) that open on a click."""

    title: str
    gallery: GalleryCounts
    cards: Sequence[tuple[str, str, str]]
    findings: Sequence[str]
    runs: Table
    more: Sequence[tuple[str, Sequence[Table]]]
    pictures: Sequence[Picture]
    stages: Table
    stage_notes: Sequence[str]
    rank_drops: Sequence[RankDrop]

    def render(self) -> str:
        """Returns the complete document."""
        return _templates().get_template("page.html.j2").render(vars(self))


def _templates() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("icar_jax.evaluation.report", ""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    found.filters["data_url"] = _data_url
    return found


def _data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"

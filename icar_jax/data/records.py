"""The one shape every image-text source hands over: a record per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
        name: file name or an address such as ``scenes/train/000123``; unique in its source.
        image: decodes the picture when called and returns an RGB ``PIL.Image``;
            raises on a file that cannot be read.
        captions: all captions of the image; empty only where a source holds ratings.
        complexity: known or measured complexity in [0, 1]; ``nan`` where unknown.
        labels: category labels, possibly empty.
    """

    name: str
    image: Callable[[], Image.Image]
    captions: tuple[str, ...]
    complexity: float = float("nan")
    labels: tuple[str, ...] = ()


@runtime_checkable
class Source(Protocol):
    """A random-access collection of records; ``len`` counts images, not captions."""

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Record: ...

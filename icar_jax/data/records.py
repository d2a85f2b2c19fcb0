"""Interface of data sources (one record per image), subsets, and splits by the hash of record names."""

from __future__ import annotations

import abc
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from icar_jax.errors import DataError, require_list

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Record:
    """One image with its captions.

    Attributes:
        name: file name or a path such as ``scenes/train/000123``; unique in its source.
        image: callable that decodes the image and returns an RGB ``PIL.Image``; raises for unreadable files.
        captions: all captions of the image; empty only in sources of ratings.
        complexity: known or measured complexity in [0, 1]; ``nan`` if unknown.
        labels: category labels, possibly empty.
    """

    name: str
    image: Callable[[], Image.Image]
    captions: tuple[str, ...]
    complexity: float = float("nan")
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_list(f"the captions of {self.name}", self.captions)
        require_list(f"the labels of {self.name}", self.labels)


class Source(abc.ABC):
    """Abstract base of all data sources: a random-access collection of records.

    A subclass sets `name` and defines `__len__` and `__getitem__`. The other attributes hold what is known without reading
    records; None means unknown.

    Attributes:
        name: unique among the sources of a run, such as 'scenes/train'.
        names: names of all records; if None, `record_names` reads the records.
        scores: float32 [n], complexity ratings in [0, 1].
        shards: the shards that hold the records, which are then named by shard and number.
        paths: file paths of the shards.
    """

    name: str
    names: list[str] | None = None
    scores: np.ndarray | None = None
    shards: Any | None = None  # data.sources.shards.Shards, which lies above
    paths: tuple[str, ...] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images, not captions."""

    @abc.abstractmethod
    def __getitem__(self, i: int) -> Record:
        """Returns record i, in [0, len)."""

    def urls(self) -> list[str | None] | None:
        """Returns the URL of every record, or None if the source has no URLs. Reads the source."""
        return None

    def files(self) -> list[str] | None:
        """Returns the path of every image file, or None if the images do not lie in files of their own."""
        return None

    def overlaps(self, other: Source) -> bool:
        """Whether another split of the same kind of source shares records, where the names of splits do not tell."""
        return False

    def fingerprint(self) -> dict[str, Any]:
        """Returns an identifier of this set of images and ratings: their number, and hashes of names and ratings."""
        names = self.names if self.names is not None else [self.name]  # scenes depend only on the split and the index
        found = {"images": len(self), "names_sha256": hashlib.sha256("\n".join(names).encode()).hexdigest()}
        if self.scores is not None:
            found["ratings_sha256"] = hashlib.sha256(np.asarray(self.scores, np.float32).tobytes()).hexdigest()
        return found


def name_hash(name: str, seed: int) -> int:
    """Returns a 64-bit hash of (seed, name), the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big")


def record_names(source: Source) -> list[str]:
    """Returns the names of all records; reads the records only if the source does not list its names."""
    return list(source.names) if source.names is not None else [source[i].name for i in range(len(source))]


def calibration_split(names: Sequence[str], *, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits records into training and calibration parts; calibration takes the `size` lowest hashes.

    Adding files replaces at most some of the calibration records; all other records stay in their part.

    Args:
        names: unique record names.
        size: number of calibration records, in [1, len(names)).

    Returns:
        (train, calibration): sorted, disjoint int64 indices that together cover every record; neither is empty.
    """
    if len(set(names)) != len(names):
        double = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"record names must be unique to split them; {double!r} occurs more than once")
    if not 0 < size < len(names):
        raise DataError(f"a calibration size must lie in [1, {len(names) - 1}] for {len(names)} records, got {size}")
    hashes = [name_hash(name, seed) for name in names]
    chosen = sorted(range(len(names)), key=lambda i: (hashes[i], names[i]))[:size]
    calibration = np.array(sorted(chosen), np.int64)
    return np.setdiff1d(np.arange(len(names), dtype=np.int64), calibration), calibration


class Subset(Source):
    """A source with the records of another source at the given indices."""

    def __init__(self, source: Source, indices: Sequence[int], name: str):
        self.name = name
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        if self.indices.ndim != 1 or not self.indices.size:
            raise ValueError(f"subset {name!r} of {source.name!r}: expected a non-empty list of indices")
        low, high = self.indices.min(), self.indices.max()
        if low < 0 or high >= len(source):
            raise ValueError(f"subset {name!r}: indices run from {low} to {high}, {source.name!r} has {len(source)} records")

    @property
    def names(self) -> list[str]:
        """Names of the records; read one by one if the source does not list them."""
        known = self.source.names
        return [known[i] if known is not None else self.source[i].name for i in self.indices.tolist()]

    @property
    def scores(self) -> np.ndarray | None:
        """Scores of the source at the indices, or None."""
        return None if self.source.scores is None else self.source.scores[self.indices]

    def urls(self) -> list[str | None] | None:
        urls = self.source.urls()
        return None if urls is None else [urls[i] for i in self.indices.tolist()]

    def files(self) -> list[str] | None:
        files = self.source.files()
        return None if files is None else [files[i] for i in self.indices.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        return self.source[int(self.indices[i])]

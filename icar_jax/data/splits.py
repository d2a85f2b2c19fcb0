"""Splitting a source by the hash of each record's name, so that adding files moves no other file."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from icar_jax.data.records import Record, Source


def name_hash(name: str, seed: int) -> int:
    """64 pseudo-random bits of (seed, name), the same on every machine and Python version."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "big")


def record_names(source: Source) -> list[str]:
    """Names of all records; uses `source.names` where the source has it, which avoids making every record."""
    names = getattr(source, "names", None)
    return list(names) if names is not None else [source[i].name for i in range(len(source))]


def calibration_split(names: Sequence[str], *, seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a calibration part out of the training records: those of the `size` lowest hashes.

    Adding files replaces at most some of the chosen ones and moves no other.

    Args:
        names: unique record names.
        size: number of calibration records, in [1, len(names)).

    Returns:
        (train, calibration): sorted, disjoint int64 indices that together cover every record; neither is empty.
    """
    if len(set(names)) != len(names):
        double = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"record names must be unique to be split, {double!r} occurs more than once")
    if not 0 < size < len(names):
        raise ValueError(f"a calibration size must lie in [1, {len(names) - 1}] for {len(names)} records, got {size}")
    hashes = [name_hash(name, seed) for name in names]
    chosen = sorted(range(len(names)), key=lambda i: (hashes[i], names[i]))[:size]
    calibration = np.array(sorted(chosen), np.int64)
    return np.setdiff1d(np.arange(len(names), dtype=np.int64), calibration), calibration


class Subset:
    """The records of a source at the given indices, as a source of its own."""

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
        """Names of the records; made one by one where the source does not list them."""
        known = getattr(self.source, "names", None)
        return [known[i] if known is not None else self.source[i].name for i in self.indices.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        return self.source[int(self.indices[i])]

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


def calibration_split(
    names: Sequence[str], *, seed: int, size: int | None = None, fraction: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a calibration part out of the training records.

    Adding files moves none of the others with `fraction`, and at most replaces some of the chosen ones with `size`.

    Args:
        names: unique record names.
        size: the exact number, in [1, len(names)): the records of the lowest hashes.
        fraction: the expected share, in (0, 1): each record is decided by its own name alone. Give one of the two.

    Returns:
        (train, calibration): sorted, disjoint int64 indices that together cover every record; neither is empty.
    """
    if (size is None) == (fraction is None):
        raise ValueError(f"calibration_split needs either size or fraction, got size={size} and fraction={fraction}")
    if len(set(names)) != len(names):
        double = next(name for name, count in Counter(names).items() if count > 1)
        raise ValueError(f"record names must be unique to be split, {double!r} occurs more than once")
    hashes = [name_hash(name, seed) for name in names]
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ValueError(f"a calibration fraction must lie between 0 and 1, got {fraction}")
        chosen = [i for i, value in enumerate(hashes) if value < fraction * 2**64]
    else:
        if not 0 < size < len(names):
            raise ValueError(
                f"a calibration size must lie in [1, {len(names) - 1}] for {len(names)} records, got {size}"
            )
        chosen = sorted(range(len(names)), key=lambda i: (hashes[i], names[i]))[:size]
    if not 0 < len(chosen) < len(names):
        raise ValueError(
            f"a calibration fraction of {fraction} takes {len(chosen)} of {len(names)} records and leaves one part empty;"
            " give a size instead"
        )
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
            raise ValueError(
                f"subset {name!r}: indices run from {low} to {high}, {source.name!r} has {len(source)} records"
            )

    @property
    def names(self) -> list[str]:
        """Names of the records; made one by one where the source does not list them."""
        known = getattr(self.source, "names", None)
        return [known[i] if known is not None else self.source[i].name for i in self.indices.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> Record:
        return self.source[int(self.indices[i])]

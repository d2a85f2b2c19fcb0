"""Ratings of images, {name: score in [0, 1]}, with all unusable lines listed and counted."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from absl import logging

from icar_jax.data.ratings.files import Line, RatingsError, read_lines

__all__ = ["Fault", "Ratings", "RatingsError", "read_ratings"]

MALFORMED, OUTSIDE, LABEL = "malformed line", "score outside [0, 1]", "wrong label"
DUPLICATE, MISSING = "duplicate", "missing image"
UNDECIDED = -1  # label of images on which annotators disagreed
_SHOWN, _WARNED = 20, 5


@dataclass(frozen=True)
class Fault:
    """The reason why a line was skipped."""

    kind: str
    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class Ratings:
    """Ratings read from a file.

    Attributes:
        where: the file.
        key: kind of the names: 'file' or 'url'.
        scores: name -> score in [0, 1], in the file's order; labels are 0.0 and 1.0.
        labels: whether the values are labels (0, 1 or -1) instead of scores.
        undecided: number of labels -1, which are skipped.
        lines: number of lines, unusable ones included.
        faults: the unusable lines.
        categories: name -> its entry in the column `category`; empty without the column.
    """

    where: Path
    key: str
    scores: dict[str, float]
    labels: bool
    undecided: int
    lines: int
    faults: tuple[Fault, ...]
    categories: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults by kind."""
        return dict(Counter(fault.kind for fault in self.faults))

    def check(self, bad_share: float) -> Ratings:
        """Warns of faults and returns self. Raises RatingsError if they exceed `bad_share` of the lines, or nothing is left."""
        if self.faults and len(self.faults) > bad_share * self.lines:
            raise RatingsError(
                f"{self.where}: {len(self.faults)} of {self.lines} lines cannot be used ({_listed(self.counts)}), which is "
                f"{len(self.faults) / self.lines:.1%} and more than config.data.bad_share={bad_share} allows:\n"
                f"{self._first(_SHOWN)}\nCorrect the file, or raise config.data.bad_share to skip such lines"
            )
        if not self.scores:
            raise RatingsError(f"{self.where}: contains no ratings{self._undecided()}")
        if self.faults:
            _warn(
                f"{self.where}: {len(self.faults)} of {self.lines} lines are skipped ({_listed(self.counts)}):\n"
                f"{self._first(_WARNED)}"
            )
        return self

    def summary(self) -> str:
        """Returns a one-line summary."""
        kind = "labels" if self.labels else "scores"
        skipped = f"; skipped: {_listed(self.counts)}" if self.faults else ""
        return f"{self.where}: {len(self.scores)} {kind} of {self.lines} lines{self._undecided()}{skipped}"

    def _undecided(self) -> str:
        return f"; {self.undecided} undecided (label {UNDECIDED}) dropped" if self.undecided else ""

    def _first(self, shown: int) -> str:
        more = [f"  and {len(self.faults) - shown} more"] if len(self.faults) > shown else []
        return "\n".join([*(f"  {fault}" for fault in self.faults[:shown]), *more])


def read_ratings(
    path: str | os.PathLike, known: Callable[[str], str | None] = lambda name: name, missing: str = "no such image"
) -> Ratings:
    """Reads ratings from `.txt` (IC9600), `.json`, `.csv` or `.parquet`; see `data.ratings.files` for the layouts.

    A JSON file holds labels if at least half of its numbers are -1, 0 or 1; then every value must be one of these. For
    duplicate names the first line counts.

    Args:
        known: maps a name to the name of an image, or None if there is no such image. Not used for URLs, since an image that
            was not downloaded is not a fault of the file.
        missing: the reason reported for None.

    Raises:
        FileNotFoundError, OSError, RatingsError: the file cannot be read. Invalid lines are in `faults`; see `check`.
    """
    path = Path(path).expanduser()
    key, lines = read_lines(path)
    labels = path.suffix.lower() == ".json" and _are_labels(lines)
    scores: dict[str, float] = {}
    categories: dict[str, str] = {}
    seen: dict[str, str] = {}
    faults: list[Fault] = []
    undecided = 0
    for line in lines:
        if fault := _wrong_value(line, labels):
            faults.append(fault)
            continue
        dropped = labels and line.value == UNDECIDED
        name = line.name if key == "url" else known(line.name)
        if name is None and not dropped:
            faults.append(Fault(MISSING, line.place, f"{line.name}: {missing}"))
            continue
        name = line.name if name is None else name
        if name in seen:
            faults.append(Fault(DUPLICATE, line.place, f"{name} was already rated at {seen[name]}, which is used"))
            continue
        seen[name] = line.place
        if dropped:
            undecided += 1
        else:
            scores[name] = line.value
            if line.category:
                categories[name] = line.category
    return Ratings(path, key, scores, labels, undecided, len(lines), tuple(faults), categories)


def _are_labels(lines: list[Line]) -> bool:
    numbers = [line.value for line in lines if not line.fault]
    return 2 * sum(value in (UNDECIDED, 0, 1) for value in numbers) >= max(1, len(numbers))


def _wrong_value(line: Line, labels: bool) -> Fault | None:
    if line.fault:
        return Fault(MALFORMED, line.place, line.fault)
    if labels and line.value not in (UNDECIDED, 0, 1):
        return Fault(LABEL, line.place, f"{line.name}: expected the label 0, 1 or {UNDECIDED}, found {line.value:g}")
    if not labels and (math.isnan(line.value) or not 0 <= line.value <= 1):
        return Fault(OUTSIDE, line.place, f"{line.name}: score {line.value:g} is not in [0, 1]")
    return None


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


@functools.cache
def _warn(text: str) -> None:
    """Logs each warning once per process, since the same file is read for training, validation and splits."""
    logging.warning("%s", text)

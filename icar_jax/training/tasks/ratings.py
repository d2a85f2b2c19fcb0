"""What a complexity run says of its images before it starts: their splits, and how their ratings are spread."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icar_jax import workdir as files
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.ratings.balance import balance
from icar_jax.data.records import Source

LOOKED_AT = 2000  # scenes whose complexity is counted: to draw up all of them would take minutes


@dataclass(frozen=True)
class RatingsSummary:
    """`lines` are for people, `splits` is WORKDIR/splits.json, `class_counts` are (simple, complex) training images.

    `content` tells the images of all splits and their ratings apart, wherever they lie.
    """

    lines: tuple[str, ...]
    splits: dict[str, Any]
    class_counts: tuple[int, int]
    content: str

    def write(self, workdir: Path) -> None:
        """Writes WORKDIR/splits.json. Raises OSError."""
        files.write_text(workdir / files.SPLITS, json.dumps(self.splits, indent=1, ensure_ascii=False) + "\n")


def look_at(config: ExperimentConfig, source: Source) -> RatingsSummary:
    """Counts the ratings of the training images. Raises ConfigError where a classifier has images of one class only."""
    c = config.complexity
    found = balance(configured.scores(source, LOOKED_AT), c.head, c.threshold, len(source))
    if c.head == "classification" and 0 in found.classes:
        raise ConfigError(
            f"config.complexity.head='classification', but of {sum(found.counts)} training images {found.classes[0]} are "
            f"simple and {found.classes[1]} complex: both classes are needed; see config.complexity.threshold={c.threshold}"
        )
    rated = configured.rated(config.data)
    if rated is None:
        how = "scenes: drawn from (split, index); no two splits share a scene"
        splits: dict[str, Any] = {"how": how, "counts": {config.data.train_split: len(source)}, "notes": []}
        content: dict[str, Any] = {}
    else:
        names = dict(zip(rated.source.names, rated.split_of, strict=True))
        splits = {"how": rated.how, "counts": rated.counts, "notes": list(rated.notes), "splits": names}
        content = {split: configured.fingerprint(rated.split(split)) for split in sorted(rated.counts)}
    splits = {"training_ratings": found.to_dict(), **splits}
    lines = [*splits["notes"], f"Splits: {_counts(splits['counts'])} ({splits['how']})", *found.lines(c.class_weights)]
    return RatingsSummary(tuple(lines), splits, found.classes, json.dumps(content, sort_keys=True))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in sorted(counts.items()))

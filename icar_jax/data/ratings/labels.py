"""Category labels from a file, joined with images by URL or name, never by a running number.

Running numbers shift for all later images when a download fails; URLs and names do not.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from icar_jax.config import ConfigError
from icar_jax.files import json_file, limits
from icar_jax.files.opening import read_regular

Labels = tuple[str, ...]


def read_labels(path: str | os.PathLike) -> dict[str, Labels]:
    """Reads URL or name -> labels from JSON: {"000001.jpg": ["cat", "dog"]}, or {"000001.jpg": {"categories": ["cat"]}}.

    Raises ConfigError if the file is missing or has another structure, naming the entry.
    """
    try:
        data = read_regular(Path(path).expanduser(), limits.JSON_BYTES)
    except OSError as error:
        raise ConfigError(f"label file {path} cannot be read: {error.strerror or error}") from error
    table = json_file.parse(data, f"label file {path}", ConfigError)
    if not isinstance(table, dict):
        raise ConfigError(f'label file {path}: expected {{"name or URL": ["label", ...]}}, found a {type(table).__name__}')
    return {key: labels_of(value, f"label file {path}, entry {key!r}") for key, value in table.items()}


def merge_labels(
    names: Sequence[str], urls: Sequence[str | None] | None, table: Mapping[str, Labels], where: str
) -> tuple[list[Labels], str]:
    """Joins labels with images; returns (labels of each image, () for none; a sentence on how many matched).

    An image is looked up by its URL, its name, and the last component of its name ('val/000001.jpg' by '000001.jpg').

    Raises ConfigError if no entry matches, or if an entry matches the last component of several names.
    """
    last = [name.rpartition("/")[2] for name in names]
    shared = Counter(last)
    found: list[Labels] = []
    used: set[str] = set()
    for i, name in enumerate(names):
        keys = (urls[i] if urls is not None else None, name, last[i])
        key = next((key for key in keys if key in table), None)
        if key is not None and key == last[i] != name and shared[key] > 1:
            raise ConfigError(f"{where}: the entry {key!r} matches {shared[key]} images, such as {name!r}; use full names")
        found.append(table[key] if key is not None else ())
        used.add(key)
    matched = sum(map(bool, found))
    if not used - {None}:
        numbers = (
            " Running numbers cannot be used: they shift when a download fails. `icar labels` joins them with the file that "
            "they were released with."
            if _numbers(table)
            else ""
        )
        raise ConfigError(
            f"{where}: none of its {len(table)} entries (first: {next(iter(table), None)!r}) is the URL or name of any of the "
            f"{len(names)} images (first: {names[0]!r}{f', {urls[0]}' if urls is not None else ''}).{numbers}"
        )
    left = len(table) - len(used - {None})
    return found, f"{where}: {matched} of {len(names)} images have labels; {left} entries match no image"


def labels_of(value: Any, where: str) -> Labels:
    """The labels in an entry: a list, or an object with the list `categories`. Raises ConfigError."""
    listed = value.get("categories") if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(label, (str, int)) for label in listed):
        raise ConfigError(f'{where}: expected a list of labels, or {{"categories": [...]}}, found {value!r:.80}')
    return tuple(str(label) for label in listed)


def _numbers(table: Mapping[str, Labels]) -> bool:
    return all(key.rpartition("_")[2].isdigit() for key in table)

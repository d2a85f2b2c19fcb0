"""Finds the files of sharded sources: folders, globs and brace ranges, without shards of no bytes."""

from __future__ import annotations

import functools
import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import logging

from icar_jax.config import ConfigError, require_local
from icar_jax.data.sources.shards import ShardError, attempt

_NAMES_SHOWN = 5


def find_shards(root: str, split: str, suffix: str, bad_share: float = 0.0) -> tuple[list[str], list[str]]:
    """Returns (paths, labels) of the shards in a folder, glob or brace range such as {00000..00123}.tar, in order.

    Shards of 0 bytes, as interrupted downloads leave them, are named and skipped.

    split: a subfolder, several joined by '+', or '.' for the folder itself; in patterns it is inserted before the file name.
    Raises ConfigError naming config.data.root if no shards, or not all shards of a brace range, exist, and ShardError if more
    than `bad_share` of them are empty.
    """
    where = f"config.data.root={root!r}"
    require_local("config.data.root", root)
    root = os.path.expanduser(root)
    found: list[str] = []
    for part in split.split("+"):
        if os.path.isdir(root):
            folder = os.path.join(root, part)
            if not os.path.isdir(folder):
                raise ConfigError(
                    f"{where} has no subfolder {part!r} for the split; it has {_some(_visible(root))}. The shards "
                    "of a split must be in a subfolder of that name; '.' uses those of the folder itself"
                )
            found += _matching(os.path.join(glob.escape(folder), "*" + suffix), folder, suffix, where)
            continue
        patterns = [os.path.join(os.path.dirname(p), part, os.path.basename(p)) for p in expand_braces(root)]
        missing = [p for p in patterns if not glob.has_magic(p) and not os.path.isfile(p)]
        if missing:
            raise ConfigError(
                f"{where}, split {split!r}: {len(missing)} of {len(patterns)} shards do not exist, first "
                f"{_some([os.path.normpath(p) for p in missing])}"
            )
        for pattern in patterns:
            found += _matching(pattern, pattern, suffix, where) if glob.has_magic(pattern) else [pattern]
    paths = [os.path.abspath(path) for path in found]
    if wrong := [p for p in paths if not p.endswith(suffix)]:
        raise ConfigError(f"{where}: {wrong[0]} is not a {suffix} file; {_compressed(wrong) or 'match only the shards'}")
    if len(set(paths)) != len(paths):
        raise ConfigError(f"{where}, split {split!r} names some shards twice; name each only once")
    common = os.path.commonpath([os.path.dirname(p) for p in paths])
    return _without_empty(paths, [Path(os.path.relpath(p, common)).as_posix() for p in paths], bad_share)


def _without_empty(paths: list[str], labels: list[str], bad_share: float) -> tuple[list[str], list[str]]:
    empty = [path for path in paths if not attempt(path, functools.partial(os.path.getsize, path))]
    if not empty:
        return paths, labels
    found = f"{len(empty)} of {len(paths)} shards are empty (0 bytes): {_some(empty)}"
    if len(empty) > bad_share * len(paths) or len(empty) == len(paths):
        raise ShardError(
            f"{found}; this is more than config.data.bad_share={bad_share:g} allows. Fetch or write them again, or raise "
            "config.data.bad_share to skip them"
        )
    logging.warning("%s; skipped", found)
    bad = set(empty)
    kept = [i for i, path in enumerate(paths) if path not in bad]
    return [paths[i] for i in kept], [labels[i] for i in kept]


def expand_braces(pattern: str) -> list[str]:
    """Expands {000..123} and {a,b} as a shell does; leading zeros set the width. Raises ConfigError for descending ranges."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    low, high, words = match.groups()
    if words is None:
        if int(high) < int(low):
            raise ConfigError(f"config.data.root={pattern!r}: {match[0]} counts down; write the smaller number first")
        width = len(low) if low.startswith("0") else 0
        choices: Sequence[str] = [f"{n:0{width}}" for n in range(int(low), int(high) + 1)]
    else:
        choices = words.split(",")
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def _matching(pattern: str, place: str, suffix: str, where: str) -> list[str]:
    found = [p for p in sorted(glob.glob(pattern)) if os.path.isfile(p)]
    if not found:
        there = _visible(place) if os.path.isdir(place) else []
        raise ConfigError(
            f"{where}: no {suffix} files at {place}; found {_some(there) or 'nothing'}. "
            f"{_compressed(there) or 'Pass the folder that contains the shards, a glob or a {000..123} range'}"
        )
    return found


def _visible(folder: str) -> list[str]:
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def _compressed(names: Iterable[str]) -> str:
    if any(name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")) for name in names):
        return "Compressed tars have no random access: decompress them first (gunzip *.tar.gz)"
    return ""


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more

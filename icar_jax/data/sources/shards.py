"""Shared code of the sharded sources: finding files, reading with bounded retries, and splitting without name lists.

`reading` records what each thread is reading, so that a stalled run can report it. Retried reads are recorded, so that
their batch can report them.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import logging

from icar_jax.config import ConfigError, require_local
from icar_jax.data.images import ImageError
from icar_jax.data.records import Record, Source, Subset, name_hash
from icar_jax.data.sources.names import plain_text
from icar_jax.errors import IcarError

RETRIES = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_OPEN_FILES = 128  # processes are usually limited to 1024 open files
_NAMES_SHOWN = 5
_T = TypeVar("_T")


class ShardError(IcarError, RuntimeError):
    """A shard that is damaged or could not be read after all retries; the message starts with its path."""


class _Policy(threading.local):
    retries = RETRIES
    retried: list[tuple[str, str]] | None = None


_policy = _Policy()
_reading: dict[int, tuple[str, float]] = {}  # thread -> (what it is reading, start time)


@contextlib.contextmanager
def retrying(retries: int) -> Iterator[list[tuple[str, str]]]:
    """Sets this thread's number of retries per read; yields the growing list of retried reads as (shard, reason)."""
    before = _policy.retries, _policy.retried
    _policy.retries, _policy.retried = retries, []
    try:
        yield _policy.retried
    finally:
        _policy.retries, _policy.retried = before


def retries_now() -> int:
    """Returns the number of retries set for this thread."""
    return _policy.retries


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Records what this thread is reading, for `read_by`."""
    thread = threading.get_ident()
    before = _reading.get(thread)
    _reading[thread] = what, time.monotonic()
    try:
        yield
    finally:
        if before is None:
            del _reading[thread]
        else:
            _reading[thread] = before


def read_by(thread: int) -> str | None:
    """Returns what a thread is reading and for how long, or None."""
    now = _reading.get(thread)
    return f"{now[0]} (for {time.monotonic() - now[1]:.0f} s)" if now else None


def attempt(shard: str | Path, read: Callable[[], _T]) -> _T:
    """Returns `read()`, retrying after OSError with increasing pauses (0.5 s, 1 s, 2 s ..., at most 30 s).

    Raises ShardError with the shard, the reason and the number of tries after the last retry.
    """
    retries = _policy.retries
    with reading(f"shard {shard}"):
        for failed in range(retries + 1):
            try:
                return read()
            except OSError as error:
                reason = error.strerror or str(error) or type(error).__name__
                if failed == retries:
                    raise ShardError(
                        f"{shard}: cannot be read: {reason} ({failed + 1} tries, config.data.retries={retries}). Check the "
                        "file and its storage, then run the command again: it continues from the last checkpoint"
                    ) from error
            if _policy.retried is None:
                logging.warning("%s: %s; retrying", shard, reason)
            else:
                _policy.retried.append((str(shard), reason))
            time.sleep(min(FIRST_PAUSE_S * 2**failed, LONGEST_PAUSE_S))
    raise AssertionError("unreachable")


class OpenFiles:
    """Positioned reads from many files; keeps the last 128 open in each process. Thread-safe and picklable."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[str, list[int]] = OrderedDict()  # path -> [descriptor, reads in progress]

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, ()

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Reads exactly `length` bytes at `offset`. Raises OSError, also if the file is too short."""
        with self._lock:
            entry = self._open.get(path)
            if entry is None:
                entry = self._open[path] = [os.open(path, os.O_RDONLY), 0]
            self._open.move_to_end(path)
            entry[1] += 1
        parts, failed = [], True
        try:
            while length:
                part = os.pread(entry[0], length, offset)
                if not part:
                    raise OSError(errno.EIO, f"the file ends before byte {offset + length}")
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
            failed = False
        finally:
            self._release(path, entry, drop=failed)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _release(self, path: str, entry: list[int], drop: bool) -> None:
        with self._lock:
            entry[1] -= 1
            if drop and self._open.get(path) is entry:  # stale handles of network storage must be reopened
                del self._open[path]
            if not entry[1] and self._open.get(path) is not entry:
                os.close(entry[0])
            if (surplus := len(self._open) - _OPEN_FILES) > 0:
                for old in [p for p, e in self._open.items() if not e[1]][:surplus]:
                    os.close(self._open.pop(old)[0])

    def __del__(self) -> None:
        for descriptor, _ in self._open.values():
            os.close(descriptor)


@dataclass(frozen=True)
class Shards:
    """The shards of a source, in order; records are numbered consecutively across shards.

    Attributes:
        labels: name of each shard, unique and independent of the data's location.
        counts: records of each shard, int64 [n].
        sizes: file size of each shard in bytes, int64 [n].
    """

    labels: tuple[str, ...]
    counts: np.ndarray
    sizes: np.ndarray
    ends: np.ndarray = field(init=False, repr=False, compare=False)  # records up to and with each shard

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", np.cumsum(self.counts, dtype=np.int64))

    def __len__(self) -> int:
        """Number of records in all shards."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, i: int) -> tuple[int, int]:
        """Returns (shard, index within the shard) of record i. Raises IndexError."""
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        shard = int(np.searchsorted(self.ends, i, side="right"))
        return shard, int(i - (self.ends[shard] - self.counts[shard]))

    def sha256(self) -> str:
        """Returns a hash of the shards' labels, file sizes and record counts, in order."""
        rows = zip(self.labels, self.sizes.tolist(), self.counts.tolist(), strict=True)
        return hashlib.sha256("\n".join(f"{label} {size} {count}" for label, size, count in rows).encode()).hexdigest()


class Rest(Source):
    """A source without some of its records; stores the excluded indices, not the included ones."""

    def __init__(self, source: Source, left_out: np.ndarray, name: str):
        self.name, self.source = name, source
        self.left_out = np.unique(np.asarray(left_out, np.int64))
        self._kept_before = self.left_out - np.arange(len(self.left_out))

    def __len__(self) -> int:
        return len(self.source) - len(self.left_out)

    def __getitem__(self, i: int) -> Record:
        if not 0 <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        return self.source[int(i + np.searchsorted(self._kept_before, i, side="right"))]


def cut_calibration(source: Any, *, seed: int, size: int) -> tuple[Rest, Subset]:
    """Splits a source with `shards` into (training, calibration) parts.

    Calibration takes the `size` lowest of random numbers that depend on (seed, shard label, index within the shard). This
    needs no list of names: 8 bytes per record of one shard at a time. Adding shards replaces at most some of the calibration
    records; all other records stay in their part.
    """
    shards: Shards = source.shards
    best, numbers, start = np.zeros(0, np.uint64), np.zeros(0, np.int64), 0
    for label, count in zip(shards.labels, shards.counts.tolist(), strict=True):
        drawn = np.random.Philox(key=name_hash(label, seed)).random_raw(count)
        best = np.concatenate([best, drawn])
        numbers = np.concatenate([numbers, np.arange(start, start + count)])
        if len(best) > size:
            kept = np.sort(np.argpartition(best, size)[:size])
            best, numbers = best[kept], numbers[kept]
        start += count
    name = source.name
    return Rest(source, numbers, name), Subset(source, np.sort(numbers), f"{name}/calibration")


def find_shards(root: str, split: str, suffix: str) -> tuple[list[str], list[str]]:
    """Returns (paths, labels) of the shards in a folder, glob or brace range such as {00000..00123}.tar, in order.

    split: a subfolder, several joined by '+', or '.' for the folder itself; in patterns it is inserted before the file name.
    Raises ConfigError naming config.data.root if no shards, or not all shards of a brace range, exist.
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
    return paths, [Path(os.path.relpath(p, common)).as_posix() for p in paths]


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


def texts(value: Any) -> tuple[str, ...]:
    """Returns the non-empty captions in a value: text, bytes, or nested lists and arrays of them.

    Raises TypeError for any other value.
    """
    if value is None:
        return ()
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, str):
        return (plain_text(value.strip()),) if value.strip() else ()
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(text for item in value for text in texts(item))
    raise TypeError(f"expected a caption (text, or a list of texts), found {value!r:.80}")


def unusable(name: str, reason: str) -> None:
    """Raises ImageError; used as `image` of records without image or caption, so they are handled as unreadable images."""
    raise ImageError(f"{name}: {reason}")

"""Shared code of the sharded sources: reading with bounded retries, and splitting without name lists.

`reading` records what each thread is reading, so that a stalled run can report it. Retried reads are recorded, so that
their batch can report them.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import logging

from icar_jax.data.images import ImageError
from icar_jax.data.records import Record, Source, Subset, name_hash
from icar_jax.data.sources.names import plain_text
from icar_jax.errors import DataError, IcarError

RETRIES = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
_OPEN_FILES = 128  # processes are usually limited to 1024 open files
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


def texts(value: Any) -> tuple[str, ...]:
    """Returns the non-empty captions in a value: text, bytes, or nested lists and arrays of them.

    Raises TypeError for any other value, and DataError for bytes that are not UTF-8.
    """
    if value is None:
        return ()
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 (byte {error.start}: {value[error.start]:#04x})") from None
    if isinstance(value, str):
        return (plain_text(value.strip()),) if value.strip() else ()
    if isinstance(value, (list, tuple, np.ndarray)):
        return tuple(text for item in value for text in texts(item))
    raise TypeError(f"expected a caption (text, or a list of texts), found {value!r:.80}")


def texts_or_fault(value: Any, where: str) -> tuple[tuple[str, ...], str]:
    """(captions as `texts`, why there are none or ''); `where` is the member or column, for the reason."""
    try:
        found = texts(value)
    except DataError as error:
        return (), f"the text of {where} is {error}"
    return found, "" if found else f"no caption in {where}"


def unusable(name: str, reason: str) -> None:
    """Raises ImageError; used as `image` of records without image or caption, so they are handled as unreadable images."""
    raise ImageError(f"{name}: {reason}")

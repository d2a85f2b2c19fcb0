"""Index of the byte ranges of samples in tar shards: scanned once, header by header, and cached next to the shards."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax.data.sources.shards import ShardError, Shards, attempt, retries_now, retrying
from icar_jax.data.sources.tar import Member, TarDamage, members
from icar_jax.files import json_file

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff")  # of several in a sample, the first here counts
_MAGIC = b"icar_jax index 2\n"  # another set of IMAGES changes what an index holds
_THREADS = 8  # threads that scan shards; they mostly wait for storage
_MOST_BAD = 20  # bad shards after which scanning stops, to avoid retries on the rest
_SAVE_EVERY_S = 60.0


def split_name(name: str) -> tuple[str, str]:
    """Splits at the first dot of the file name: (key, lower-case extension), or ('', '') if either is empty."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def group(found: Iterator[Member]) -> tuple[list[tuple[int, int]], int]:
    """Groups members into samples: returns the byte range (start, end) of every usable sample, and the number skipped.

    Raises TarDamage if a sample's members are not contiguous, or a sample has two members with the same extension.
    """
    spans: list[tuple[int, int]] = []
    seen: set[str] = set()
    key, extensions, start, end, left_out = "", set(), 0, 0, 0

    def finish() -> int:
        if not key:
            return 0
        usable = not extensions.isdisjoint(IMAGES) and not extensions.isdisjoint(("txt", "json"))
        if usable:
            spans.append((start, end))
        return int(not usable)

    for member in found:
        this, extension = split_name(member.name)
        if not this:
            continue
        if this != key:
            left_out += finish()
            if this in seen:
                raise TarDamage(
                    f"the members of sample {this!r} are not contiguous, as WebDataset requires; write the tar again with "
                    "sorted names (tar --sort=name)"
                )
            seen.add(this)
            key, extensions, start = this, set(), member.start
        if extension in extensions:
            raise TarDamage(f"sample {this!r} has two members with the extension .{extension}")
        extensions.add(extension)
        end = member.data + member.size
    left_out += finish()
    return spans, left_out


def scan(path: str) -> tuple[np.ndarray, int]:
    """Scans a tar: returns the samples' byte ranges (start, end) as int64 [samples, 2], and the number of skipped samples."""
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        spans, left_out = group(members(windowed(stream.fileno()), size))
    return np.array(spans, np.int64).reshape(-1, 2), left_out


def windowed(descriptor: int, window: int = 8192) -> Callable[[int, int], bytes]:
    """Returns a buffered positioned read; small members and the next header usually lie in the same window."""
    buffer, begin = b"", 0

    def read(offset: int, length: int) -> bytes:
        nonlocal buffer, begin
        if not begin <= offset <= offset + length <= begin + len(buffer):
            buffer, begin = os.pread(descriptor, max(length, window), offset), offset
        return buffer[offset - begin : offset - begin + length]

    return read


class _Stat(NamedTuple):
    """Identifies the version of a shard that was scanned."""

    label: str
    size: int
    mtime_ns: int


class _Spans:
    """Byte ranges int64 [samples, 2], in memory or mapped from an index file; unpickling in a worker maps the file again."""

    def __init__(self, array: np.ndarray, file: Path | None = None, header: bytes = b""):
        self._array, self._file, self._header = array, file, header

    def __getitem__(self, i: int) -> np.ndarray:
        return self._array[i]

    def __reduce__(self) -> tuple[Any, ...]:
        if self._file is None:
            return _Spans, (np.asarray(self._array),)
        return _Spans.map, (self._file, self._header)

    @classmethod
    def map(cls, file: Path, header: bytes) -> _Spans:
        with open(file, "rb") as stream:
            found = stream.read(len(header))
        if found != header:
            raise ShardError(f"{file}: the shards of this index changed while in use; start again")
        size = (os.path.getsize(file) - len(header)) // 16
        array = np.memmap(file, np.int64, "r", len(header), (size, 2)) if size else np.zeros((0, 2), np.int64)
        return cls(array, file, header)


class Index(NamedTuple):
    """Byte ranges of all samples of a list of shards."""

    shards: Shards
    spans: _Spans
    left_out: int

    @classmethod
    def open(cls, paths: list[str], labels: list[str]) -> Index:
        """Reads the index next to the shards, scans new or changed shards, and updates the index.

        Raises ShardError if shards cannot be used.
        """
        folder = Path(os.path.commonpath([os.path.dirname(p) for p in paths]))
        file = folder / f".icar_index_{hashlib.sha256(chr(10).join(labels).encode()).hexdigest()[:12]}"
        stats = [_Stat(label, *attempt(path, functools.partial(_stat, path))) for path, label in zip(paths, labels)]
        known: dict[_Stat, tuple[np.ndarray, int]] = {}
        for old in sorted(folder.glob(".icar_index_*[0-9a-f]")):
            known |= _read_index(old)
        todo = [i for i, stat in enumerate(stats) if stat not in known]
        saved_at, bad = time.monotonic(), {}
        with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=len(todo), desc="index shards", disable=None) as bar:
            for begin in range(0, len(todo), 4 * _THREADS):
                part = todo[begin : begin + 4 * _THREADS]
                for i, result in zip(part, pool.map(functools.partial(_scan_one, retries_now()), [paths[i] for i in part])):
                    if isinstance(result, ShardError):
                        bad[i] = result
                    else:
                        known[stats[i]] = result
                bar.update(len(part))
                if len(bad) >= _MOST_BAD:
                    break
                if time.monotonic() - saved_at > _SAVE_EVERY_S:
                    _write_index(file, [(s, *known[s]) for s in stats if s in known])
                    saved_at = time.monotonic()
        if bad:
            listed = "\n".join(f"  {error}" for error in list(bad.values())[:5])
            raise ShardError(f"{paths[min(bad)]}: {len(bad)} of {len(paths)} shards cannot be used:\n{listed}")
        rows = [(s, *known[s]) for s in stats]
        header = _header(rows)
        written = _begins_with(file, header) or _write_index(file, rows)
        counts = np.array([len(spans) for _, spans, _ in rows], np.int64)
        shards = Shards(tuple(labels), counts, np.array([s.size for s in stats], np.int64))
        spans = _Spans.map(file, header) if written else _Spans(np.concatenate([spans for _, spans, _ in rows]))
        return cls(shards, spans, sum(left_out for *_, left_out in rows))


def _stat(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _scan_one(retries: int, path: str) -> tuple[np.ndarray, int] | ShardError:
    try:
        with retrying(retries):
            return attempt(path, functools.partial(scan, path))
    except ShardError as error:
        return error
    except TarDamage as error:
        return ShardError(f"{path}: {error}")


def _header(rows: list[tuple[_Stat, np.ndarray, int]]) -> bytes:
    """Returns the header: magic, length of the JSON, JSON with one row per shard, padded to a multiple of 16 bytes."""
    text = json.dumps([[*stat, len(spans), left_out] for stat, spans, left_out in rows]).encode()
    text += b" " * (-(len(_MAGIC) + 15 + len(text)) % 16)
    return _MAGIC + b"%14d\n" % len(text) + text


def _begins_with(file: Path, header: bytes) -> bool:
    try:
        with open(file, "rb") as stream:
            return stream.read(len(header)) == header
    except OSError:
        return False


def _read_index(file: Path) -> dict[_Stat, tuple[np.ndarray, int]]:
    """Returns the entries of an index file; empty if it cannot be read or has another version, so shards are rescanned."""
    try:
        with open(file, "rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                return {}
            length = int(stream.read(15))
            if not 0 <= length <= os.path.getsize(file):
                raise ValueError(f"a header of {length} bytes")
            rows = json_file.parse(stream.read(length), file)
            begin = stream.tell()
        spans = np.memmap(file, np.int64, "r", begin).reshape(-1, 2) if os.path.getsize(file) > begin else np.zeros((0, 2), int)
        if sum(row[3] for row in rows) != len(spans):
            return {}
    except (OSError, ValueError, IndexError, TypeError) as error:
        logging.warning("%s: not a readable index (%s); scanning the shards", file, error)
        return {}
    ends = np.cumsum([row[3] for row in rows])
    return {_Stat(*row[:3]): (spans[end - row[3] : end], row[4]) for row, end in zip(rows, ends, strict=True)}


def _write_index(file: Path, rows: list[tuple[_Stat, np.ndarray, int]]) -> bool:
    """Writes the index atomically; returns whether it could be written."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        with open(partial, "wb") as stream:
            stream.write(_header(rows))
            for _, spans, _ in rows:
                stream.write(np.ascontiguousarray(spans, np.int64))
        os.replace(partial, file)
    except OSError as error:
        logging.info("%s cannot be written (%s), so the shards are scanned at every start", file, error)
        partial.unlink(missing_ok=True)
        return False
    return True

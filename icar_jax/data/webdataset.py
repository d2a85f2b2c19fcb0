"""WebDataset shards, as img2dataset writes them: tars of 000123.jpg with 000123.txt and 000123.json beside it.

A shard is scanned once, header by header, for where each sample begins and ends. A sample's members lie together, so one
positioned read then fetches a picture with its captions, in any order. The places take 16 bytes a sample; they are kept in a
file `.icar_index_*` beside the shards where that folder can be written, and mapped, so that all worker processes share them.
"""

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

from icar_jax.data.images import decode
from icar_jax.data.records import Record
from icar_jax.data.shards import OpenFiles, ShardError, Shards, attempt, find_shards, retries_now, retrying, texts, unusable
from icar_jax.data.tar import Member, TarDamage, members

IMAGES = ("jpg", "jpeg", "png", "webp")
_MAGIC = b"icar_jax index 1\n"
_THREADS = 8  # that scan shards: mostly waiting for storage
_MOST_BAD = 20  # bad shards after which scanning stops: the rest would only cost retries
_SAVE_EVERY_S = 60.0


class WebDataset:
    """A folder, glob or brace range of uncompressed .tar shards; random access to their samples.

    Members whose names agree up to the first dot of the file name are one sample. It is used if it has an image (jpg, jpeg,
    png, webp) and a txt or json; others are left out, with a warning. The captions are the txt, or, where that is missing or
    empty, `caption` or `captions` (text, or a list) of the json. One without any is reported as an unreadable image is.

    Args:
        root, split: see `shards.find_shards`.
        captions: False reads none, and so misses none.

    Raises:
        ConfigError: no shards there.
        ShardError: shards that are damaged, compressed or unreadable, with names, reasons and their number.
    """

    def __init__(self, root: str, split: str = ".", captions: bool = True):
        self._with_captions = captions
        self._paths, labels = find_shards(root, split, ".tar")
        self.name = f"{Path(root).name}/{split}" if split != "." else Path(root).name
        self._files = OpenFiles()
        index = _Index.open(self._paths, labels)
        self.shards, self._spans = index.shards, index.spans
        if not len(self):
            raise ShardError(
                f"{self._paths[0]} and {len(self._paths) - 1} more: no sample with an image ({', '.join(IMAGES)}) and a txt or "
                f"json of the same name; {index.left_out} samples lack one of them"
            )
        if index.left_out:
            logging.warning("%s: %d samples without an image or without txt and json are left out", self.name, index.left_out)

    @property
    def paths(self) -> tuple[str, ...]:
        """Absolute paths of the shards."""
        return tuple(self._paths)

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Record:
        shard, _ = self.shards.locate(i)
        path = self._paths[shard]
        start, end = (int(v) for v in self._spans[i])
        span = attempt(path, lambda: self._files.read(path, start, end - start))
        return _record(span, self.shards.labels[shard], path, start, self._with_captions)

    def urls(self) -> list[str | None]:
        """The `url` in the json of every sample, None where there is none; reads the jsons, not the pictures.

        Raises ShardError.
        """
        count, read = len(self._paths), functools.partial(self._urls_of, retries_now())
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = tqdm(pool.map(read, range(count)), total=count, desc="read URLs", disable=None)
            return [url for part in parts for url in part]

    def _urls_of(self, retries: int, shard: int) -> list[str | None]:
        end = int(self.shards.ends[shard])
        spans = [self._spans[i] for i in range(end - int(self.shards.counts[shard]), end)]

        def read() -> list[str | None]:
            with open(self._paths[shard], "rb", buffering=0) as stream:
                window = _windowed(stream.fileno())
                return [_url(window, int(begin), int(stop)) for begin, stop in spans]

        try:
            with retrying(retries):
                return attempt(self._paths[shard], read)
        except TarDamage as error:
            raise ShardError(f"{self._paths[shard]}: {error}; it changed since it was indexed, or is damaged") from None


def _url(read: Callable[[int, int], bytes], begin: int, end: int) -> str | None:
    """The `url` in the json among a sample's members."""
    for member in members(lambda offset, length: read(begin + offset, length), end - begin, part=True):
        if _split_name(member.name)[1] == "json":
            try:
                url = json.loads(read(begin + member.data, member.size)).get("url")
            except (ValueError, AttributeError):
                return None
            return url if isinstance(url, str) else None
    return None


def _record(span: bytes, label: str, path: str, start: int, with_captions: bool) -> Record:
    """The record in the bytes of one sample's members."""
    found: dict[str, bytes] = {}
    key = ""
    try:
        for member in members(lambda offset, length: span[offset : offset + length], len(span), part=True):
            this, extension = _split_name(member.name)
            if this:  # hidden files may lie between
                key, found[extension] = this, span[member.data : member.data + member.size]
    except TarDamage as error:
        raise ShardError(f"{path}: {error}, {start} bytes into it; it changed since it was indexed, or is damaged") from None
    name = f"{label}/{key}"
    captions, reason = _captions(found) if with_captions else ((), "")
    if with_captions and not captions:
        return Record(name, functools.partial(unusable, name, reason), ())
    picture = next(found[e] for e in IMAGES if e in found)
    return Record(name, functools.partial(decode, picture, name), captions)


def _captions(found: dict[str, bytes]) -> tuple[tuple[str, ...], str]:
    """(captions, why there are none)."""
    if captions := texts(found.get("txt")):
        return captions, ""
    if "json" not in found:
        return (), "its txt is empty"
    try:
        described = json.loads(found["json"])
        captions = texts([described.get("caption"), described.get("captions")])
    except (ValueError, TypeError, AttributeError) as error:
        return (), f"no caption in its json: {error}"
    return captions, "" if captions else f"no caption in its txt or json (the json has {', '.join(described) or 'nothing'})"


def _split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case): what stands before and after the first dot of the file name; ('', '') if not both."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return (folder + slash + stem, extension.lower()) if stem and dot else ("", "")


def group(found: Iterator[Member]) -> tuple[list[tuple[int, int]], int]:
    """The (start, end) in bytes of every usable sample, and how many are left out.

    Raises TarDamage where a key comes again after another one, or a sample has two members of one extension.
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
        this, extension = _split_name(member.name)
        if not this:
            continue
        if this != key:
            left_out += finish()
            if this in seen:
                raise TarDamage(
                    f"the members of sample {this!r} are not next to each other, as WebDataset needs; write the tar again with "
                    "its names sorted (tar --sort=name)"
                )
            seen.add(this)
            key, extensions, start = this, set(), member.start
        if extension in extensions:
            raise TarDamage(f"sample {this!r} has two members .{extension}")
        extensions.add(extension)
        end = member.data + member.size
    left_out += finish()
    return spans, left_out


def scan(path: str) -> tuple[np.ndarray, int]:
    """Where the samples of a tar lie: int64 [samples, 2] of (start, end) in bytes, and how many samples are left out."""
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        spans, left_out = group(members(_windowed(stream.fileno()), size))
    return np.array(spans, np.int64).reshape(-1, 2), left_out


def _windowed(descriptor: int, window: int = 8192) -> Callable[[int, int], bytes]:
    """Positioned reads through a small window: after a picture come the small txt and json and the next header."""
    buffer, begin = b"", 0

    def read(offset: int, length: int) -> bytes:
        nonlocal buffer, begin
        if not begin <= offset <= offset + length <= begin + len(buffer):
            buffer, begin = os.pread(descriptor, max(length, window), offset), offset
        return buffer[offset - begin : offset - begin + length]

    return read


class _Stat(NamedTuple):
    """What tells whether a shard is still the one that was scanned."""

    label: str
    size: int
    mtime_ns: int


class _Spans:
    """int64 [samples, 2], in memory or mapped from an index file; a copy sent to a worker maps the file again."""

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
            raise ShardError(f"{file}: the shards beside it changed while they were in use; start again")
        size = (os.path.getsize(file) - len(header)) // 16
        array = np.memmap(file, np.int64, "r", len(header), (size, 2)) if size else np.zeros((0, 2), np.int64)
        return cls(array, file, header)


class _Index(NamedTuple):
    """Where every sample lies, for a list of shards."""

    shards: Shards
    spans: _Spans
    left_out: int

    @classmethod
    def open(cls, paths: list[str], labels: list[str]) -> _Index:
        """Reads the index beside the shards, scanning those it does not know or that changed, and keeps what is new."""
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
    """Magic, length of the JSON, JSON of one row a shard; a multiple of 16 bytes long."""
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
    """What an index file knows; nothing where it cannot be read or is of another version: the shards are scanned then."""
    try:
        with open(file, "rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                return {}
            rows = json.loads(stream.read(int(stream.read(15))))
            begin = stream.tell()
        spans = np.memmap(file, np.int64, "r", begin).reshape(-1, 2) if os.path.getsize(file) > begin else np.zeros((0, 2), int)
        if sum(row[3] for row in rows) != len(spans):
            return {}
    except (OSError, ValueError, IndexError) as error:
        logging.warning("%s: not readable as an index (%s); scanning the shards", file, error)
        return {}
    ends = np.cumsum([row[3] for row in rows])
    return {_Stat(*row[:3]): (spans[end - row[3] : end], row[4]) for row, end in zip(rows, ends, strict=True)}


def _write_index(file: Path, rows: list[tuple[_Stat, np.ndarray, int]]) -> bool:
    """Whether the index could be written; it appears whole or not at all."""
    partial = file.with_name(f"{file.name}.{uuid.uuid4().hex}.part")
    try:
        with open(partial, "wb") as stream:
            stream.write(_header(rows))
            for _, spans, _ in rows:
                stream.write(np.ascontiguousarray(spans, np.int64))
        os.replace(partial, file)
    except OSError as error:
        logging.info("%s cannot be written (%s): the shards are scanned at every start", file, error)
        partial.unlink(missing_ok=True)
        return False
    return True

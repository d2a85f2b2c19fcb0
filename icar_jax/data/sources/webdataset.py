"""Source for WebDataset shards as written by img2dataset: tars with 000123.jpg, 000123.txt and 000123.json.

Each shard is scanned once, header by header, for the byte range of each sample. A sample's members are contiguous, so one
positioned read fetches an image with its captions, in any order. The ranges take 16 bytes per sample. They are cached in a file
`.icar_index_*` next to the shards, if that folder is writable, and memory-mapped, so that all worker processes share them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from absl import logging
from tqdm import tqdm

from icar_jax.data.images import decode
from icar_jax.data.records import Record, Source
from icar_jax.data.sources.shard_paths import find_shards
from icar_jax.data.sources.shards import OpenFiles, ShardError, attempt, retries_now, retrying, texts, texts_or_fault, unusable
from icar_jax.data.sources.tar import TarDamage, members
from icar_jax.data.sources.tar_index import IMAGES, Index, split_name, windowed
from icar_jax.errors import DataError
from icar_jax.files import json_file

_RULE = (
    "WebDataset's rule: the name of a sample ends at the first dot of the file name, so 2024.05.jpg is the member 05.jpg of "
    "the sample 2024; write other dots as underscores"
)
_THREADS = 8  # threads that read URLs; they mostly wait for storage


class WebDataset(Source):
    """Random access to the samples of uncompressed .tar shards, given as a folder, glob or brace range.

    Members whose names agree up to the first dot of the file name form a sample, which is WebDataset's own rule. Samples with
    an image (a suffix of `tar_index.IMAGES`) and a txt or json are used; others are skipped with a warning. The captions are
    the txt or, if that is missing, empty or not UTF-8, `caption` or `captions` (text, or a list) of the json. A sample without
    captions is reported like an unreadable image.

    Args:
        root, split, bad_share: see `shard_paths.find_shards`.
        captions: whether to read captions; with False, samples without captions are valid.

    Raises:
        ConfigError: no shards found.
        ShardError: damaged, compressed or unreadable shards, with names, reasons and their number.
    """

    def __init__(self, root: str, split: str = ".", captions: bool = True, bad_share: float = 0.0):
        self._with_captions = captions
        self._paths, labels = find_shards(root, split, ".tar", bad_share)
        self.name = f"{Path(root).name}/{split}" if split != "." else Path(root).name
        self._files = OpenFiles()
        index = Index.open(self._paths, labels)
        self.shards, self._spans = index.shards, index.spans
        if not len(self):
            raise ShardError(
                f"{self._paths[0]} and {len(self._paths) - 1} more: no sample has an image ({', '.join(IMAGES)}) and a txt or "
                f"json of the same name; {index.left_out} samples lack one of them. {_RULE}"
            )
        if index.left_out:
            logging.warning(
                "%s: %d samples without an image or without txt and json are skipped. %s", self.name, index.left_out, _RULE
            )

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
        """Returns the `url` in the json of every sample, or None; reads the jsons but not the images. Raises ShardError."""
        count, read = len(self._paths), functools.partial(self._urls_of, retries_now())
        with ThreadPoolExecutor(_THREADS) as pool:
            parts = tqdm(pool.map(read, range(count)), total=count, desc="read URLs", disable=None)
            return [url for part in parts for url in part]

    def _urls_of(self, retries: int, shard: int) -> list[str | None]:
        end = int(self.shards.ends[shard])
        spans = [self._spans[i] for i in range(end - int(self.shards.counts[shard]), end)]

        def read() -> list[str | None]:
            with open(self._paths[shard], "rb", buffering=0) as stream:
                window = windowed(stream.fileno())
                return [_url(window, int(begin), int(stop)) for begin, stop in spans]

        try:
            with retrying(retries):
                return attempt(self._paths[shard], read)
        except TarDamage as error:
            raise ShardError(f"{self._paths[shard]}: {error}; the file changed since it was indexed, or is damaged") from None


def _url(read: Callable[[int, int], bytes], begin: int, end: int) -> str | None:
    """Returns the `url` in the json of a sample, or None."""
    for member in members(lambda offset, length: read(begin + offset, length), end - begin, part=True):
        if split_name(member.name)[1] == "json":
            try:
                url = json_file.require_object(json_file.parse(read(begin + member.data, member.size), member.name), "").get(
                    "url"
                )
            except DataError:
                return None
            return url if isinstance(url, str) else None
    return None


def _record(span: bytes, label: str, path: str, start: int, with_captions: bool) -> Record:
    """Builds the record from the bytes of one sample's members."""
    found: dict[str, bytes] = {}
    key = ""
    try:
        for member in members(lambda offset, length: span[offset : offset + length], len(span), part=True):
            this, extension = split_name(member.name)
            if this:  # hidden files may be in between
                key, found[extension] = this, span[member.data : member.data + member.size]
    except TarDamage as error:
        raise ShardError(f"{path}, byte {start}: {error}; the file changed since it was indexed, or is damaged") from None
    name = f"{label}/{key}"
    captions, reason = _captions(found) if with_captions else ((), "")
    if with_captions and not captions:
        return Record(name, functools.partial(unusable, name, reason), ())
    picture = next(found[e] for e in IMAGES if e in found)
    return Record(name, functools.partial(decode, picture, name), captions)


def _captions(found: dict[str, bytes]) -> tuple[tuple[str, ...], str]:
    """Returns (captions, reason if there are none)."""
    captions, fault = texts_or_fault(found.get("txt"), "its txt")
    if captions:
        return captions, ""
    if "json" not in found:
        return (), fault
    try:
        described = json_file.require_object(json_file.parse(found["json"], "not readable"), "not readable")
        captions = texts([described.get("caption"), described.get("captions")])
    except (ValueError, TypeError, AttributeError) as error:
        return (), f"no caption in its json: {error}"
    return captions, "" if captions else fault if fault.startswith(
        "the text"
    ) else f"no caption in its txt or json (the json has {', '.join(described) or 'nothing'})"

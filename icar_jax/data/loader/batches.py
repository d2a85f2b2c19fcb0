"""Batches for training and evaluation; each depends only on its position, not on workers or processes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from icar_jax.data.augment import Augment
from icar_jax.data.images import ImageError, Preprocess
from icar_jax.data.loader.bad_files import with_name
from icar_jax.data.loader.iterator import STALL_TIMEOUT_S, Batch, BatchIterator
from icar_jax.data.loader.kept import KeptOutputs
from icar_jax.data.loader.order import example_at, examples_at, substitute_position
from icar_jax.data.records import Record, Source
from icar_jax.data.sources.shards import RETRIES, reading, retrying
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.errors import ConfigError, DataError, IcarError

MAX_SUBSTITUTES = 8
# Errors that a source's `image()` raises for unreadable files; any other error is a bug.
_BAD_FILE = (OSError, ImageError)
_LAST_POSITION = 2**62


class UnreadableImages(IcarError, ValueError):
    """Too many images do not decode, so no substitute was found; a separate type survives pickling between processes."""


def train_batches(
    source: Source,
    preprocess: Preprocess,
    tokenizer: Tokenizer | None,
    context_length: int = 0,
    *,
    batch_size: int,
    seed: int,
    start_position: int = 0,
    augment: Augment = Augment(),
    with_complexity: bool = False,
    others: Mapping[str, Preprocess] | None = None,
    kept: KeptOutputs = KeptOutputs(),
    num_workers: int = 0,
    num_threads: int = 2,
    process_index: int = 0,
    process_count: int = 1,
    retries: int = RETRIES,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> BatchIterator:
    """Returns an endless iterator of training batches, a pure function of (source, seed, start_position).

    Step s covers the global positions from start_position + s * batch_size; this process takes its slice of
    b = batch_size / process_count. Captions and augmentations are drawn from (seed, position). A file that does not
    decode is replaced by another example of the epoch (`order.substitute_position`) and reported in `bad`.

    Args:
        tokenizer: None omits the tokens (training on images only).
        others: {key: preprocess} for additional versions of the images, with the same random augmentation.
        kept: outputs of frozen towers that replace images or captions: the batch then has `image_pooled` in place of `image`,
            `text_pooled` in place of `tokens`, as the rows are. Captions are drawn as without.
        batch_size: image-text pairs per step over all processes.
        num_workers: worker processes; 0 makes batches in this process.
        num_threads: prefetching threads per process; 0 makes batches on demand.
        retries: number of retries of a shard read before `shards.ShardError` stops the run.
        stall_timeout_s: seconds without a batch before `watch.StalledData` stops the run.

    Returns:
        An iterator of dicts, to be closed when done (`with`, or `.close()`):
        image uint8 [b, S, S, 3]; tokens int32 [b, L] and truncated bool [b] (with a tokenizer); one more entry like image
        per key of `others`; complexity float32 [b] (with_complexity); position, index int64 [b]; name object [b];
        bad object [n], (name, reason) of every failed decoding; retried object [m], (shard, reason) of every retried read.

    Raises ConfigError, DataError or ValueError for invalid arguments.
    """
    if len(source) < 1:
        raise DataError(f"source {source.name!r} has no images to train on")
    if batch_size < 1 or batch_size % process_count:
        raise ConfigError(f"batch_size must be a positive multiple of the {process_count} processes, got {batch_size}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must lie in [0, {process_count}), got {process_index}")
    if not 0 <= start_position < _LAST_POSITION:
        raise ValueError(f"start_position must lie in [0, 2**62), got {start_position}")
    if tokenizer is not None and context_length < 2:
        raise ValueError(f"context_length must be at least 2 with a tokenizer, got {context_length}")
    examples_at(np.zeros(0, np.int64), len(source), seed)  # checks the seed here, not in a worker
    make = _TrainBatch(
        source, preprocess, tokenizer, context_length, augment, with_complexity, seed,
        first=start_position + process_index * (batch_size // process_count),
        stride=batch_size, size=batch_size // process_count, retries=retries, others=dict(others or {}), kept=kept,
    )  # fmt: skip
    count = (_LAST_POSITION - start_position) // batch_size
    return BatchIterator(make, count, num_workers, num_threads, stall_timeout_s)


def eval_batches(
    source: Source,
    preprocess: Mapping[str, Preprocess],
    *,
    batch_size: int,
    num_workers: int = 0,
    num_threads: int = 2,
    retries: int = RETRIES,
    stall_timeout_s: float = STALL_TIMEOUT_S,
) -> BatchIterator:
    """Returns an iterator over a source, in order; each image is decoded once and resized for every preprocess.

    Batch k covers indices [k * batch_size, (k + 1) * batch_size). Files that do not decode are skipped and reported, so any
    batch may be shorter than batch_size, or empty.

    Returns:
        An iterator of dicts, to be closed when done:
        images {key: uint8 [n, S, S, 3]}; index int64 [n]; name object [n]; captions, labels object [n] (tuples of str);
        complexity float32 [n], nan if unknown; bad object [m] of (name, reason); retried as in `train_batches`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not preprocess:
        raise ValueError("eval_batches needs at least one preprocess")
    make = _EvalBatch(source, dict(preprocess), batch_size, retries)
    return BatchIterator(make, -(-len(source) // batch_size), num_workers, num_threads, stall_timeout_s)


@dataclass(frozen=True)
class _TrainBatch:
    """Makes the batch of one step; picklable."""

    source: Source
    preprocess: Preprocess
    tokenizer: Tokenizer | None
    context_length: int
    augment: Augment
    with_complexity: bool
    seed: int
    first: int
    stride: int
    size: int
    retries: int
    others: dict[str, Preprocess]
    kept: KeptOutputs = KeptOutputs()

    def where(self, step: int) -> str:
        first = self.first + step * self.stride
        return f"positions {first} to {first + self.size - 1} of source {self.source.name!r}"

    def __call__(self, step: int) -> Batch:
        with retrying(self.retries) as retried:
            return self._make(step) | {"retried": _objects(retried)}

    def _make(self, step: int) -> Batch:
        positions = self.first + step * self.stride + np.arange(self.size, dtype=np.int64)
        _, indices = examples_at(positions, len(self.source), self.seed)
        side, kept = self.preprocess.image_size, self.kept
        images = np.empty((self.size if kept.image is None else 0, side, side, 3), np.uint8)
        image_rows: list[int] = []
        text_rows: list[int] = []
        again = {key: np.empty((self.size, p.image_size, p.image_size, 3), np.uint8) for key, p in self.others.items()}
        records: list[Record] = []
        captions: list[str] = []
        bad: list[tuple[str, str]] = []
        for row, position in enumerate(positions.tolist()):
            indices[row], record, picture = self._readable(position, int(indices[row]), bad)
            rng = np.random.default_rng((self.seed, position))
            if self.tokenizer is not None:
                which = _draw_caption(record, rng, self.source.name)
                captions.append(record.captions[which])
                if kept.text is not None:
                    text_rows.append(kept.text.row(int(indices[row]), which))
            records.append(record)
            if kept.image is not None:
                view = int(rng.integers(kept.image.views)) if kept.image.views > 1 else 0
                image_rows.append(kept.image.row(int(indices[row]), view))
                continue
            for key, preprocess in self.others.items():
                again[key][row] = self.augment.resize(picture, preprocess, copy.deepcopy(rng))
            images[row] = self.augment.resize(picture, self.preprocess, rng)
        pixels = {"image": images, **again} if kept.image is None else {"image_pooled": kept.image.take(image_rows)}
        batch = {**pixels, "position": positions, "index": indices}
        batch |= {"name": _objects([r.name for r in records]), "bad": _objects(bad)}
        if kept.text is not None:
            batch["text_pooled"], batch["truncated"] = kept.text.take(text_rows), kept.text.truncated[text_rows]
        elif self.tokenizer is not None:
            batch["tokens"], batch["truncated"] = self.tokenizer.encode(captions, self.context_length)
        if self.with_complexity:
            batch["complexity"] = _known_complexity(records, self.source.name)
        return batch

    def _readable(self, position: int, index: int, bad: list[tuple[str, str]]) -> tuple[int, Record, Any]:
        """Returns (index, record, image) of the example at a position, or of its first substitute that decodes."""
        size = len(self.source)
        attempts = min(MAX_SUBSTITUTES, size - 1)
        tried: list[tuple[str, str]] = []
        for attempt in range(attempts + 1):
            if attempt:
                place = substitute_position(position, attempt, attempts, size)
                _, index = example_at(place, size, self.seed)
            record = self.source[index]
            try:
                picture = self._picture(record, index)
            except _BAD_FILE as error:
                tried.append((record.name, _reason(error)))
            else:
                bad.extend(tried)
                return index, record, picture
        listed = "\n".join("  " + with_name(*item) for item in tried)
        raise UnreadableImages(
            f"source {self.source.name!r}, position {position}: the example and its {attempts} substitutes cannot be"
            f" decoded. Most of the files seem unreadable; check the folder and its storage:\n{listed}"
        )

    def _picture(self, record: Record, index: int) -> Any:
        """The image, or None where its outputs are kept. Raises one of _BAD_FILE."""
        if self.kept.image is None:
            return _picture(record)
        if not self.kept.image.readable(index):
            raise ImageError(f"{record.name} could not be read when its outputs were computed")
        return None


@dataclass(frozen=True)
class _EvalBatch:
    """Makes batch k of one ordered pass; picklable."""

    source: Source
    preprocess: dict[str, Preprocess]
    size: int
    retries: int

    def where(self, step: int) -> str:
        last = min((step + 1) * self.size, len(self.source)) - 1
        return f"images {step * self.size} to {last} of source {self.source.name!r}"

    def __call__(self, step: int) -> Batch:
        with retrying(self.retries) as retried:
            return self._make(step) | {"retried": _objects(retried)}

    def _make(self, step: int) -> Batch:
        records: list[Record] = []
        indices: list[int] = []
        bad: list[tuple[str, str]] = []
        pixels: dict[str, list[np.ndarray]] = {key: [] for key in self.preprocess}
        for index in range(step * self.size, min((step + 1) * self.size, len(self.source))):
            record = self.source[index]
            try:
                picture = _picture(record)
            except _BAD_FILE as error:
                bad.append((record.name, _reason(error)))
                continue
            records.append(record)
            indices.append(index)
            for key, preprocess in self.preprocess.items():
                pixels[key].append(preprocess.resize(picture))
        sides = {key: p.image_size for key, p in self.preprocess.items()}
        return {
            "images": {k: np.array(v, np.uint8).reshape(-1, sides[k], sides[k], 3) for k, v in pixels.items()},
            "index": np.array(indices, np.int64),
            "name": _objects([r.name for r in records]),
            "captions": _objects([r.captions for r in records]),
            "labels": _objects([r.labels for r in records]),
            "complexity": np.array([r.complexity for r in records], np.float32),
            "bad": _objects(bad),
        }


def _picture(record: Record) -> Any:
    with reading(f"image {record.name}"):
        return record.image()


def _objects(values: list[Any]) -> np.ndarray:
    """Returns an object array [N]; `np.array` would turn tuples of equal length into two dimensions."""
    out = np.empty(len(values), object)
    for i, value in enumerate(values):
        out[i] = value
    return out


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _draw_caption(record: Record, rng: np.random.Generator, source_name: str) -> int:
    if not record.captions:
        raise DataError(f"source {source_name!r}: record {record.name} has no caption; sources must skip such files")
    return int(rng.integers(len(record.captions)))


def _known_complexity(records: list[Record], source_name: str) -> np.ndarray:
    values = np.array([r.complexity for r in records], np.float32)
    if not np.isfinite(values).all():
        unknown = [r.name for r, v in zip(records, values, strict=True) if not np.isfinite(v)]
        raise DataError(
            f"source {source_name!r}: no known complexity for {len(unknown)} records of a batch, first {unknown[0]};"
            " train the complexity model on a source with known complexity, such as scenes"
        )
    return values

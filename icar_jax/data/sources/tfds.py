"""Source for TensorFlow Datasets prepared as ArrayRecord, read through `tfds.data_source` without TensorFlow."""

from __future__ import annotations

import functools
import os
import threading
from pathlib import Path
from typing import Any, cast

import numpy as np

from icar_jax.config import ConfigError
from icar_jax.data.images import decode
from icar_jax.data.records import Record, Source
from icar_jax.data.sources.shards import Shards, attempt, texts_or_fault, unusable

_importing = threading.Lock()


class Tfds(Source):
    """A split of a prepared data set; nothing is downloaded.

    Args:
        dataset: name such as coco_captions, optionally with configuration or version ('coco_captions/2014').
        root: TFDS's data_dir, the folder that contains the data set's folder.
        split: a split, several joined by '+', or parts of them ('train[:90%]').
        image_column, caption_column: features; dots select nested ones ('captions.text').

    Raises:
        ConfigError: data set, split or feature not found; lists the available ones.
    """

    def __init__(self, dataset: str, root: str, split: str, image_column: str = "image", caption_column: str = "caption"):
        self._dataset, self._root, self._split = dataset, os.path.expanduser(root), split
        self._image, self._captions = image_column.split("."), caption_column.split(".")
        self.name = f"{dataset}/{split}"
        self._lock, self._opened = threading.Lock(), None
        builder = self._builder()
        for field, path in (("image_column", self._image), ("caption_column", self._captions)):
            _check_feature(builder.info.features, path, f"config.data.{field}={'.'.join(path)!r}", dataset)
        try:
            pieces = builder.info.splits[split].file_instructions
        except (ValueError, KeyError) as error:
            there = ", ".join(f"{name} ({found.num_examples})" for name, found in builder.info.splits.items())
            raise ConfigError(f"config.data.root={root!r}: {dataset} has no split {split!r}; it has {there}") from error
        self.pieces = [(piece.filename, piece.skip, piece.skip + piece.take) for piece in pieces]
        sizes = [attempt(path, functools.partial(os.path.getsize, path)) for path, _, _ in self.pieces]
        labels = tuple(Path(path).name + (f"[{begin}:]" if begin else "") for path, begin, _ in self.pieces)
        counts = np.array([end - begin for _, begin, end in self.pieces], np.int64)
        self.shards = Shards(labels, counts, np.array(sizes, np.int64))
        if not len(self):
            raise ConfigError(f"{dataset}: split {split!r} holds no examples")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_opened")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock, self._opened = threading.Lock(), None

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, i: int) -> Record:
        shard, number = self.shards.locate(i)
        path, begin, _ = self.pieces[shard]
        example = attempt(path, functools.partial(self._read, i))
        image, captions = _inner(example, self._image), _inner(example, self._captions)
        name = f"{Path(path).name}/{begin + number}"
        found, fault = texts_or_fault(captions, f"{'.'.join(self._captions)!r}")
        if fault:
            return Record(name, functools.partial(unusable, name, fault), ())
        return Record(name, functools.partial(decode, image, name), found)

    def overlaps(self, other: Source) -> bool:
        """Returns whether the two splits share examples; 'train[:50%]' and 'train[50%:]' do not."""
        return any(a == b and max(s, t) < min(e, f) for a, s, e in self.pieces for b, t, f in cast(Tfds, other).pieces)

    def _read(self, i: int) -> dict[str, Any]:
        with self._lock:
            source = self._opened = self._opened or self._open()
        try:
            return source[i]
        # errors that array_record raises for missing and damaged files
        except (RuntimeError, ValueError, IndexError) as error:
            with self._lock:
                self._opened = None  # its readers do not recover
            raise OSError(str(error)) from error

    def _open(self) -> Any:
        tfds = _tfds()

        decoders: Any = tfds.decode.SkipDecoding()
        for key in reversed(self._image):
            decoders = {key: decoders}
        return self._builder().as_data_source(self._split, decoders=decoders)

    def _builder(self) -> Any:
        folder = Path(self._root, self._dataset.split("/")[0].split(":")[0])
        # This check also stops TFDS from looking up missing data sets in its network bucket.
        prepared = sorted(path.parent.relative_to(self._root).as_posix() for path in folder.rglob("dataset_info.json"))
        where = f"config.data.dataset={self._dataset!r}, config.data.root={self._root!r}"
        if not prepared:
            there = sorted(p.name for p in Path(self._root).iterdir()) if os.path.isdir(self._root) else []
            raise ConfigError(
                f"{where}: no prepared data set at {folder} (the root contains {', '.join(there[:8]) or 'nothing'}). "
                f"Prepare it with: tfds build {self._dataset} --file_format=array_record --data_dir={self._root}"
            )
        tfds = _tfds()

        try:
            builder = tfds.builder(self._dataset, data_dir=self._root)
            format = builder.info.file_format.value if builder.info.file_format else "none"
        except Exception as error:
            first = str(error).split("\n")[0]
            raise ConfigError(f"{where}: cannot be opened: {first}; available: {', '.join(prepared)}") from error
        if format != "array_record":
            raise ConfigError(
                f"{where}: stored as {format}, which has no random access; prepare it again with "
                f"tfds build {self._dataset} --file_format=array_record"
            )
        return builder


def _tfds() -> Any:
    """Imports the package in one thread at a time, because its lazy modules can deadlock with Python's import lock."""
    with _importing:
        import tensorflow_datasets
    return tensorflow_datasets


def _check_feature(features: Any, path: list[str], where: str, dataset: str) -> None:
    """Raises ConfigError if a dotted name does not lead to a feature."""
    here = features
    for key in path:
        here = getattr(here, "feature", here)  # element feature of a sequence
        names = list(here.keys()) if hasattr(here, "keys") else []
        if key not in names:
            raise ConfigError(f"{where}: {dataset} has no such feature; expected one of {_names(features)}")
        here = here[key]


def _names(features: Any, prefix: str = "") -> str:
    names = []
    for key in sorted(features.keys()):
        inner = getattr(features[key], "feature", features[key])
        names.append(_names(inner, f"{prefix}{key}.") if hasattr(inner, "keys") else prefix + key)
    return ", ".join(names)


def _inner(value: Any, path: list[str]) -> Any:
    for key in path:
        value = [item[key] for item in value] if isinstance(value, list) else value[key]
    return value

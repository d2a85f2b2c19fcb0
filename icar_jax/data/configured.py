"""The sources that a configuration names: training, calibration and evaluation images never overlap.

Calibration images are cut from the training split, or are those of `val` where images have ratings; thresholds come from them
alone. `SOURCES` is the registry: a new source of files is a class in data/sources and one line there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from icar_jax.config import ConfigError, DataConfig, EvalConfig, ExperimentConfig
from icar_jax.data.ratings.sources import RatedSource, open_rated
from icar_jax.data.records import Source, Subset, calibration_split, record_names
from icar_jax.data.scenes import DrawnScenes, Scenes
from icar_jax.data.sources.caption_files import Columns
from icar_jax.data.sources.folders import CaptionFolder
from icar_jax.data.sources.parquet import Parquet
from icar_jax.data.sources.shards import Rest, cut_calibration, retrying
from icar_jax.data.sources.tfds import Tfds
from icar_jax.data.sources.webdataset import WebDataset

CALIBRATION_OF_RATED = "val"
SPLIT_SEED = 0  # fixed: another training seed must not move images between training and calibration


class Splits(Protocol):
    """How one kind of source gives the images of training, calibration and evaluation. All raise ConfigError or OSError."""

    calibration_name: str  # of the split that thresholds come from
    keeps_index: bool  # opening takes long the first time, and leaves an index beside the data

    def train(self, data: DataConfig) -> Source: ...

    def calibration(self, data: DataConfig) -> Source: ...

    def held_out(self, data: DataConfig, split: str, size: int, field: str) -> Source: ...


@dataclass(frozen=True)
class SceneSplits:
    """Drawn scenes: every split is a function of its name and an index."""

    calibration_name: str = "calibration"
    keeps_index: bool = False

    def train(self, data: DataConfig) -> Source:
        scenes = Scenes(data.train_split, data.scenes_size, image_size=data.scenes_pixels)
        return DrawnScenes(scenes, Path(data.scenes_kept)) if data.scenes_kept else scenes

    def calibration(self, data: DataConfig) -> Source:
        return Scenes("calibration", data.calibration_size, image_size=data.scenes_pixels)

    def held_out(self, data: DataConfig, split: str, size: int, field: str) -> Source:
        return Scenes(split, size, image_size=data.scenes_pixels)


@dataclass(frozen=True)
class RatedSplits:
    """Images with ratings, whose file names their splits."""

    calibration_name: str = CALIBRATION_OF_RATED
    keeps_index: bool = False

    def train(self, data: DataConfig) -> Source:
        if shared := {*data.train_split.split("+")} & {CALIBRATION_OF_RATED, "test"}:
            raise ConfigError(
                f"config.data.train_split={data.train_split!r} trains on {', '.join(sorted(shared))}, which thresholds and "
                "reports come from; use 'train'"
            )
        return open_rated(data).split(data.train_split)

    def calibration(self, data: DataConfig) -> Source:
        return open_rated(data).split(CALIBRATION_OF_RATED)

    def held_out(self, data: DataConfig, split: str, size: int, field: str) -> Source:
        return open_rated(data).split(split)


@dataclass(frozen=True)
class FileSplits:
    """Files with captions; calibration images are cut from the training split.

    open: (where, split, bad_share) -> the source; `where` has the fields root, json, images, image_column,
        caption_column and, of tfds, dataset.
    """

    open: Callable[[Any, Any, float], Source]
    keeps_index: bool = False
    splits_may_overlap: bool = False  # as slices of one split do; `source.overlaps(other)` tells
    calibration_name: str = "calibration"

    def train(self, data: DataConfig) -> Source:
        return _cut(data)[0]

    def calibration(self, data: DataConfig) -> Source:
        return _cut(data)[1]

    def held_out(self, data: DataConfig, split: str, size: int, field: str) -> Source:
        source = open_split(data, split)
        if self.splits_may_overlap and source.overlaps(open_split(data, data.train_split)):
            raise _not_held_out(field, split, f"examples of it are in {data.train_split!r}, which is used")
        return source


SOURCES: dict[str, Splits] = {
    "scenes": SceneSplits(),
    "ratings": RatedSplits(),
    "folder": FileSplits(
        lambda where, split, _: CaptionFolder(
            where.root, split, where.json, where.images, Columns(where.image_column, where.caption_column)
        )
    ),
    "webdataset": FileSplits(
        lambda where, split, bad_share: WebDataset(where.root, split, bad_share=bad_share), keeps_index=True
    ),
    "parquet": FileSplits(
        lambda where, split, bad_share: Parquet(
            where.root, split, where.image_column, where.caption_column, bad_share=bad_share
        )
    ),
    "tfds": FileSplits(
        lambda where, split, _: Tfds(where.dataset, where.root, split, where.image_column, where.caption_column),
        splits_may_overlap=True,
    ),
}


def train_source(data: DataConfig) -> Source:
    """The training images."""
    return _splits(data).train(data)


def calibration_source(data: DataConfig) -> Source:
    """The images that thresholds are chosen on: cut from the training split, or `val` of rated images."""
    return _splits(data).calibration(data)


def eval_source(data: DataConfig, eval_config: EvalConfig) -> Source:
    """The held-out gallery. Raises ConfigError where it shares a split with training or calibration."""
    return _held_out(data, eval_config.split, eval_config.size, _splits(data).calibration_name, "config.eval.split")


def validation_source(config: ExperimentConfig) -> Source:
    """The images evaluated during training: config.train.eval_split, or config.eval.split where that is empty.

    The best model may be chosen on the images that thresholds are chosen on, so of rated images `val` serves both. Raises
    ConfigError where it shares a split with training.
    """
    field = "config.train.eval_split" if config.train.eval_split else "config.eval.split"
    split = config.train.eval_split or config.eval.split
    return _held_out(config.data, split, config.eval.size, "" if is_rated(config.data) else "calibration", field)


def is_rated(data: DataConfig) -> bool:
    """Whether images get their complexity from a file of ratings."""
    return data.source == "ratings" or bool(data.ratings)


def rated(data: DataConfig) -> RatedSource | None:
    """All rated images with their splits; None where complexity comes from elsewhere."""
    return open_rated(data) if is_rated(data) else None


def scores(source: Source, most: int) -> np.ndarray:
    """float32 [n]: the known complexities, of at most `most` records evenly spread where they are not listed."""
    if isinstance(source, Subset) and source.scores is not None:
        return source.scores
    chosen = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64))
    return np.array([source[i].complexity for i in chosen.tolist()], np.float32)


def open_split(data: DataConfig, split: str) -> Source:
    """A whole split of the files that `data` names; shards that cannot be read are tried again `data.retries` times."""
    return open_files(data.source, data, split, data)


def open_files(kind: str, where: Any, split: str | None, data: DataConfig) -> Source:
    """A split of the files that `where` names, as `FileSplits.open` of this kind of source; `data` says how to meet faults."""
    with retrying(data.retries):
        files = SOURCES[kind]
        assert isinstance(files, FileSplits), f"{kind} is no source of files"
        return files.open(where, split, data.bad_share)


def keeps_index(data: DataConfig) -> bool:
    """Whether the first to open the data may take long, and leaves an index for the next ones."""
    return _splits(data).keeps_index


def loading(data: DataConfig) -> dict[str, Any]:
    """How batches are read, as keywords of `train_batches` and `eval_batches`."""
    return {
        "num_workers": data.workers,
        "num_threads": data.threads,
        "retries": data.retries,
        "stall_timeout_s": data.stall_timeout_s,
    }


def fingerprint(source: Source) -> dict[str, Any]:
    """Identifies the images a run was trained on: their number, and a hash of their names, in order, and of their ratings.

    Of shards, the names, bytes and records of each are hashed instead, and which records were cut out.
    """
    whole, cut = (source.source, source.left_out) if isinstance(source, Rest) else (source, None)
    if isinstance(source, Subset) and source.scores is not None:
        whole = source.source
    if whole.shards is not None:
        cut_out = hashlib.sha256(cut.tobytes()).hexdigest() if cut is not None else ""
        return {"images": len(source), "shards_sha256": hashlib.sha256((whole.shards.sha256() + cut_out).encode()).hexdigest()}
    return source.fingerprint()


def _splits(data: DataConfig) -> Splits:
    return SOURCES["ratings"] if is_rated(data) and data.source != "scenes" else SOURCES[data.source]


def _held_out(data: DataConfig, split: str, size: int, calibrated: str, field: str) -> Source:
    if shared := set(split.split("+")) & {*data.train_split.split("+"), calibrated}:
        raise _not_held_out(field, split, f"{', '.join(sorted(shared))} is used")
    return _splits(data).held_out(data, split, size, field)


def _not_held_out(field: str, split: str, why: str) -> ConfigError:
    return ConfigError(f"{field}={split!r} is not held out: {why} for training or calibration; choose another split")


def _cut(data: DataConfig) -> tuple[Source, Subset]:
    whole = open_split(data, data.train_split)
    if data.calibration_size >= len(whole):
        raise ConfigError(
            f"config.data.calibration_size={data.calibration_size} leaves nothing to train on: "
            f"split {data.train_split!r} of {data.root} holds {len(whole)} images; lower it"
        )
    if whole.shards is not None:
        return cut_calibration(whole, seed=SPLIT_SEED, size=data.calibration_size)
    train, calibration = calibration_split(record_names(whole), seed=SPLIT_SEED, size=data.calibration_size)
    return Subset(whole, train, whole.name), Subset(whole, calibration, f"{whole.name}/calibration")

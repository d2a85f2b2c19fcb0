"""The pictures a configuration asks for: training, calibration and evaluation never overlap.

Calibration images are cut from the training split, or are those of `val` where images have ratings; thresholds come from them
alone.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax.config import ConfigError, DataConfig, EvalConfig, ExperimentConfig
from icar_jax.data.ratings.sources import RatedSource, open_rated
from icar_jax.data.records import Source, Subset, calibration_split, record_names
from icar_jax.data.scenes import DrawnScenes, Scenes
from icar_jax.data.sources.folders import open_folder
from icar_jax.data.sources.parquet import Parquet
from icar_jax.data.sources.shards import Rest, Shards, cut_calibration, retrying
from icar_jax.data.sources.tfds import Tfds
from icar_jax.data.sources.webdataset import WebDataset

CALIBRATION_OF_RATED = "val"
SPLIT_SEED = 0  # fixed: another training seed must not move images between training and calibration


def train_source(data: DataConfig) -> Source:
    """What a model may learn from."""
    if data.source == "scenes":
        scenes = Scenes(data.train_split, data.scenes_size, image_size=data.scenes_pixels)
        return DrawnScenes(scenes, Path(data.scenes_kept)) if data.scenes_kept else scenes
    if is_rated(data):
        if shared := {*data.train_split.split("+")} & {CALIBRATION_OF_RATED, "test"}:
            raise ConfigError(
                f"config.data.train_split={data.train_split!r} trains on {', '.join(sorted(shared))}, which thresholds and "
                "reports come from; use 'train'"
            )
        return open_rated(data).split(data.train_split)
    return _cut(data)[0]


def calibration_source(data: DataConfig) -> Source:
    """What thresholds may be chosen on: images of the training split that training never sees; `val` of rated images."""
    if data.source == "scenes":
        return Scenes("calibration", data.calibration_size, image_size=data.scenes_pixels)
    if is_rated(data):
        return open_rated(data).split(CALIBRATION_OF_RATED)
    return _cut(data)[1]


def eval_source(data: DataConfig, eval_config: EvalConfig) -> Source:
    """The held-out gallery. Raises ConfigError where it shares a split with training or calibration."""
    calibrated = CALIBRATION_OF_RATED if is_rated(data) else "calibration"
    return _held_out(data, eval_config.split, eval_config.size, calibrated, "config.eval.split")


def validation_source(config: ExperimentConfig) -> Source:
    """What is evaluated while training: config.train.eval_split, or config.eval.split where that is empty.

    The best model may be chosen on what thresholds are chosen on, so of rated images `val` serves both. Raises ConfigError
    where it shares a split with training.
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
    if isinstance(source, Subset) and (listed := getattr(source.source, "scores", None)) is not None:
        return listed[source.indices]
    chosen = np.unique(np.linspace(0, len(source) - 1, min(most, len(source))).astype(np.int64))
    return np.array([source[i].complexity for i in chosen.tolist()], np.float32)


def _held_out(data: DataConfig, split: str, size: int, calibrated: str, field: str) -> Source:
    learnt = data.train_split
    if shared := set(split.split("+")) & {*learnt.split("+"), calibrated}:
        raise _not_held_out(field, split, f"{', '.join(sorted(shared))} is used")
    if data.source == "scenes":
        return Scenes(split, size, image_size=data.scenes_pixels)
    if is_rated(data):
        return open_rated(data).split(split)
    source = open_split(data, split)
    if isinstance(source, Tfds) and source.overlaps(open_split(data, learnt)):
        raise _not_held_out(field, split, f"examples of it are in {learnt!r}, which is used")
    return source


def open_split(data: DataConfig, split: str) -> Any:
    """A whole split of the files that `data` names; shards that cannot be read are tried again `data.retries` times."""
    with retrying(data.retries):
        if data.source == "webdataset":
            return WebDataset(data.root, split)
        if data.source == "parquet":
            return Parquet(data.root, split, data.image_column, data.caption_column)
        if data.source == "tfds":
            return Tfds(data.dataset, data.root, split, data.image_column, data.caption_column)
        return open_folder(data.root, split)


def keeps_index(data: DataConfig) -> bool:
    """Whether the first to open the data may take long and leaves beside it what the next ones need."""
    return data.source == "webdataset"


def loading(data: DataConfig) -> dict[str, Any]:
    """How batches are read, as keywords of `train_batches` and `eval_batches`."""
    return {
        "num_workers": data.workers,
        "num_threads": data.threads,
        "retries": data.retries,
        "stall_timeout_s": data.stall_timeout_s,
    }


def fingerprint(source: Source) -> dict[str, Any]:
    """What a run was trained on: the number of images and a hash of their names, in order.

    Of rated images the scores are hashed too. Of shards, the names, bytes and records of each are hashed instead, and which
    records were cut out.
    """
    whole, cut = (source.source, source.left_out) if isinstance(source, Rest) else (source, None)
    if isinstance(source, Subset) and hasattr(source.source, "scores"):
        whole = source.source
    if isinstance(shards := getattr(whole, "shards", None), Shards):
        cut_out = hashlib.sha256(cut.tobytes()).hexdigest() if cut is not None else ""
        return {"images": len(source), "shards_sha256": hashlib.sha256((shards.sha256() + cut_out).encode()).hexdigest()}
    names = getattr(source, "names", [source.name])  # scenes are a function of the split's name and the index
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    rating = {"ratings_sha256": hashlib.sha256(scores(source, 0).tobytes()).hexdigest()} if hasattr(whole, "scores") else {}
    return {"images": len(source), "names_sha256": digest, **rating}


def _not_held_out(field: str, split: str, why: str) -> ConfigError:
    return ConfigError(f"{field}={split!r} is not held out: {why} for training or calibration; choose another split")


def _cut(data: DataConfig) -> tuple[Source, Subset]:
    whole = open_split(data, data.train_split)
    if data.calibration_size >= len(whole):
        raise ConfigError(
            f"config.data.calibration_size={data.calibration_size} leaves nothing to train on: "
            f"split {data.train_split!r} of {data.root} holds {len(whole)} images; lower it"
        )
    if hasattr(whole, "shards"):
        return cut_calibration(whole, seed=SPLIT_SEED, size=data.calibration_size)
    train, calibration = calibration_split(record_names(whole), seed=SPLIT_SEED, size=data.calibration_size)
    return Subset(whole, train, whole.name), Subset(whole, calibration, f"{whole.name}/calibration")

"""The pictures a configuration asks for: training, calibration and evaluation never overlap.

Calibration images are cut from the training split; thresholds come from them alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data.folders import open_folder
from icar_jax.data.parquet import Parquet
from icar_jax.data.records import Source
from icar_jax.data.scenes import Scenes
from icar_jax.data.shards import Rest, Shards, cut_calibration, retrying
from icar_jax.data.splits import Subset, calibration_split, record_names
from icar_jax.data.tfds import Tfds
from icar_jax.data.webdataset import WebDataset

SPLIT_SEED = 0  # fixed: another training seed must not move images between training and calibration


def train_source(data: DataConfig) -> Source:
    """What a model may learn from."""
    if data.source == "scenes":
        return Scenes(data.train_split, data.scenes_size, image_size=data.scenes_pixels)
    return _cut(data)[0]


def calibration_source(data: DataConfig) -> Source:
    """What thresholds may be chosen on: images of the training split that training never sees."""
    if data.source == "scenes":
        return Scenes("calibration", data.calibration_size, image_size=data.scenes_pixels)
    return _cut(data)[1]


def eval_source(data: DataConfig, eval_config: EvalConfig) -> Source:
    """The held-out gallery. Raises ConfigError where it shares a split with training or calibration."""
    held_out, learnt = eval_config.split, data.train_split
    if shared := set(held_out.split("+")) & {*learnt.split("+"), "calibration"}:
        raise _not_held_out(held_out, f"{', '.join(sorted(shared))} is used")
    if data.source == "scenes":
        return Scenes(held_out, eval_config.size, image_size=data.scenes_pixels)
    source = open_split(data, held_out)
    if isinstance(source, Tfds) and source.overlaps(open_split(data, learnt)):
        raise _not_held_out(held_out, f"examples of it are in {learnt!r}, which is used")
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

    Of shards, the names, bytes and records of each are hashed instead, and which records were cut out.
    """
    whole, cut = (source.source, source.left_out) if isinstance(source, Rest) else (source, None)
    if isinstance(shards := getattr(whole, "shards", None), Shards):
        cut_out = hashlib.sha256(cut.tobytes()).hexdigest() if cut is not None else ""
        return {"images": len(source), "shards_sha256": hashlib.sha256((shards.sha256() + cut_out).encode()).hexdigest()}
    names = getattr(source, "names", [source.name])  # scenes are a function of the split's name and the index
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"images": len(source), "names_sha256": digest}


def _not_held_out(split: str, why: str) -> ConfigError:
    return ConfigError(f"config.eval.split={split!r} is not held out: {why} for training or calibration; choose another split")


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

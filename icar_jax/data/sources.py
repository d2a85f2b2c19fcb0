"""The pictures a configuration asks for: training, calibration and evaluation never overlap.

Calibration images are cut from the training split; thresholds come from them alone.
"""

from __future__ import annotations

import hashlib
from typing import Any

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data.folders import open_folder
from icar_jax.data.records import Source
from icar_jax.data.scenes import Scenes
from icar_jax.data.splits import Subset, calibration_split, record_names

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
    shared = set(eval_config.split.split("+")) & {*data.train_split.split("+"), "calibration"}
    if shared:
        raise ConfigError(
            f"config.eval.split={eval_config.split!r} is not held out: {', '.join(sorted(shared))} is used for training "
            "or calibration; choose another split"
        )
    if data.source == "scenes":
        return Scenes(eval_config.split, eval_config.size, image_size=data.scenes_pixels)
    return open_folder(data.root, eval_config.split)


def fingerprint(source: Source) -> dict[str, Any]:
    """What a run was trained on: the number of images and a hash of their names, in order."""
    names = getattr(source, "names", [source.name])  # scenes are a function of the split's name and the index
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    return {"images": len(source), "names_sha256": digest}


def _cut(data: DataConfig) -> tuple[Subset, Subset]:
    folder = open_folder(data.root, data.train_split)
    if data.calibration_size >= len(folder):
        raise ConfigError(
            f"config.data.calibration_size={data.calibration_size} leaves nothing to train on: "
            f"split {data.train_split!r} of {data.root} holds {len(folder)} images; lower it"
        )
    train, calibration = calibration_split(record_names(folder), seed=SPLIT_SEED, size=data.calibration_size)
    return Subset(folder, train, folder.name), Subset(folder, calibration, f"{folder.name}/calibration")

"""The pictures a configuration asks for: training, calibration and evaluation never overlap.

Calibration images are cut from the training split; thresholds come from them alone.
"""

from __future__ import annotations

from icar_jax.config import ConfigError, DataConfig, EvalConfig
from icar_jax.data.folders import CaptionFolder, KarpathyFolder
from icar_jax.data.records import Source
from icar_jax.data.scenes import Scenes
from icar_jax.data.splits import Subset, calibration_split, record_names

SPLIT_SEED = 0  # fixed: another training seed must not move images between training and calibration
_FOLDERS = {"karpathy": KarpathyFolder, "captions": CaptionFolder}


def train_source(data: DataConfig) -> Source:
    """What a model may learn from."""
    return Scenes(data.train_split, data.scenes_size) if data.source == "scenes" else _cut(data)[0]


def calibration_source(data: DataConfig) -> Source:
    """What thresholds may be chosen on: images of the training split that training never sees."""
    return Scenes("calibration", data.calibration_size) if data.source == "scenes" else _cut(data)[1]


def eval_source(data: DataConfig, eval_config: EvalConfig) -> Source:
    """The held-out gallery. Raises ConfigError where it names the training split."""
    if eval_config.split in (data.train_split, "calibration"):
        raise ConfigError(
            f"config.eval.split={eval_config.split!r} is not held out: it is used for training or calibration; "
            "choose another split"
        )
    if data.source == "scenes":
        return Scenes(eval_config.split, eval_config.size)
    return _FOLDERS[data.source](data.root, eval_config.split)


def _cut(data: DataConfig) -> tuple[Subset, Subset]:
    folder = _FOLDERS[data.source](data.root, data.train_split)
    if data.calibration_size >= len(folder):
        raise ConfigError(
            f"config.data.calibration_size={data.calibration_size} leaves nothing to train on: "
            f"split {data.train_split!r} of {data.root} holds {len(folder)} images; lower it"
        )
    train, calibration = calibration_split(record_names(folder), seed=SPLIT_SEED, size=data.calibration_size)
    return Subset(folder, train, f"{folder.name}/train"), Subset(folder, calibration, f"{folder.name}/calibration")

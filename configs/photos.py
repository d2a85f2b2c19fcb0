"""CLIP on a folder of photographs with captions, from scratch on two CPU cores.

    python train.py --config=configs/photos.py --config.data.root=PATH/TO/flickr8k --workdir=workdir/photos

The folder contains images (at the top level or in images/) and dataset*.json (Karpathy's layout), captions.csv or
captions.jsonl. The recipe of docs/recipe.md fine-tunes the trained CLIP to cost less (:cheaper) and trains a router that sends
easy photographs to an early exit (:router):

    python train.py --config=configs/photos.py:cheaper --config.data.root=PATH/TO/flickr8k --workdir=workdir/photos_light
    python train.py --config=configs/photos.py:router --config.data.root=PATH/TO/flickr8k --workdir=workdir/photos_light/router
    python evaluate.py --config=configs/photos.py:cheaper --config.data.root=PATH/TO/flickr8k --workdir=workdir/photos_light
"""

from icar_jax.config import (
    ClipConfig,
    ComplexityConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

ARGUMENTS = ("clip", "cheaper", "router")


def get_config(task: str = "clip") -> ExperimentConfig:
    data = {"source": "folder", "calibration_size": 500, "vocabulary": 4096}
    cropped = DataConfig(**data, resize="crop", crop_scale=0.5, flip=True)
    if task == "clip":
        return ExperimentConfig(
            task="clip",
            clip=ClipConfig(variant="vit_demo", exits=(3,), context_length=32, temperature="shared"),
            data=cropped,
            optim=OptimConfig(lr=1e-3, exit_lr=1e-3, weight_decay=0.2, warmup_steps=200),
            train=TrainConfig(steps=2500, batch_size=64, checkpoint_every=500),
            eval=EvalConfig(split="val", complexity="workdir/demo/complexity"),
        )
    if task == "cheaper":
        return ExperimentConfig(
            task="clip",
            clip=ClipConfig(
                variant="vit_demo", exits=(4,), exit_head="attention", merge=(0, 20, 14), context_length=32,
                temperature="shared",
            ),
            loss=LossConfig(exit_weights=(0.05, 1.0), distill_init=10.0),
            data=cropped,
            optim=OptimConfig(lr=5e-4, exit_lr=1e-3, weight_decay=0.2, warmup_steps=30),
            train=TrainConfig(steps=300, batch_size=64, checkpoint_every=100, init="workdir/photos"),
            eval=EvalConfig(split="val", complexity="workdir/photos_light/router", early_share=(0.4,)),
        )  # fmt: skip
    if task == "router":
        return ExperimentConfig(
            task="complexity",
            complexity=ComplexityConfig(
                variant="blocks", clip="workdir/photos_light", blocks=4, target="regret", regret="kl", rivals=4000,
                pooled_norm="parts", dropout=0.0,
            ),
            data=DataConfig(**data),  # the CLIP's preprocessing, without random crops
            optim=OptimConfig(lr=1e-3, warmup_steps=100),
            train=TrainConfig(steps=2000, batch_size=256, checkpoint_every=250, dtype="float32"),
        )  # fmt: skip
    raise ConfigError(f"configs/photos.py:{task}: unknown; use configs/photos.py:{', :'.join(ARGUMENTS)}")

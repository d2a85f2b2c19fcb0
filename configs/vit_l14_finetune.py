"""Dual-path fine-tuning of a converted ViT-L/14 on COCO or Flickr30k (Karpathy splits), with the rates of the ICAR paper.

    icar convert PATH/TO/laion2b_s32b_b82k workdir/l14
    python train.py --config=configs/vit_l14_finetune.py:coco --config.data.root=PATH/TO/coco --workdir=workdir/icar

configs/vit_l14_finetune.py:coco and configs/vit_l14_finetune.py:flickr30k. The folder holds dataset_coco.json or
dataset_flickr30k.json and the pictures. Ten epochs at 128 pairs a step; one caption of each picture is drawn an epoch.
"""

from icar_jax.config import ClipConfig, ConfigError, DataConfig, EvalConfig, ExperimentConfig, OptimConfig, TrainConfig

ARGUMENTS = ("coco", "flickr30k")
# pictures to train on, and the splits that hold them
SETS = {"coco": (113_287, "train+restval"), "flickr30k": (29_000, "train")}


def get_config(dataset: str = "coco") -> ExperimentConfig:
    if dataset not in SETS:
        raise ConfigError(f"configs/vit_l14_finetune.py:{dataset}: unknown; use one of {', '.join(SETS)}")
    pictures, split = SETS[dataset]
    return ExperimentConfig(
        clip=ClipConfig(variant="vit_l14", exits=(13,), temperature="own"),
        data=DataConfig(
            source="folder", train_split=split, resize="squash", interpolation="bilinear", normalise="half", workers=4,
        ),
        optim=OptimConfig(lr=1e-6, exit_lr=1e-4, temperature_lr=1e-3, weight_decay=0.01, warmup_steps=100),
        train=TrainConfig(steps=10 * pictures // 128, batch_size=128, seed=42, init="workdir/l14", remat="dots"),
        eval=EvalConfig(split="val"),
    )  # fmt: skip

"""Fine-tunes a converted ViT-L/14 on COCO or Flickr30k (Karpathy splits) to reduce its compute per image.

    icar convert PATH/TO/laion2b_s32b_b82k workdir/l14
    python train.py --config=configs/vit_l14_finetune.py:coco --config.data.root=PATH/TO/coco --workdir=workdir/cheaper
    python train.py --config=configs/vit_l14_finetune.py:coco,router --config.data.root=PATH/TO/coco \\
        --workdir=workdir/cheaper/router
    python evaluate.py --config=configs/vit_l14_finetune.py:coco --config.data.root=PATH/TO/coco --workdir=workdir/cheaper

configs/vit_l14_finetune.py:coco and :flickr30k follow docs/recipe.md, which was developed on small towers: token merging after
one third and one half of the blocks, distillation from the initial weights, and an exit after two thirds of the blocks with a
loss weight of 0.05. :coco,router and :flickr30k,router train a head at that exit on regret, with thousands of extra negatives.
:coco,paper and :flickr30k,paper are the dual-path fine-tuning of the ICAR paper; both recipes use the paper's learning rates.
:coco,official and :flickr30k,official differ from it as the paper's released code does: the exit reads the first patch, its
head starts at random, and the loss is image to text alone.
The folder contains dataset_coco.json or dataset_flickr30k.json and the images. Training takes ten epochs at 128 pairs per step,
one epoch for the router; each epoch draws one caption per image.
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

# number of training images, and the splits that contain them
SETS = {"coco": (113_287, "train+restval"), "flickr30k": (29_000, "train")}
ARGUMENTS = tuple(f"{name}{kind}" for kind in ("", ",router", ",paper", ",official") for name in SETS)
MERGE = (*(0,) * 7, 80, 0, 0, 0, 56)  # of 256 patches: 0.68 of full depth's FLOPs


def get_config(argument: str = "coco") -> ExperimentConfig:
    if argument not in ARGUMENTS:
        raise ConfigError(f"configs/vit_l14_finetune.py:{argument}: unknown; use one of {' '.join(ARGUMENTS)}")
    dataset, _, kind = argument.partition(",")
    images, split = SETS[dataset]
    data = DataConfig(
        source="folder", train_split=split, resize="squash", interpolation="bilinear", normalise="half", workers=4,
    )  # fmt: skip
    if kind == "router":
        return ExperimentConfig(
            task="complexity",
            complexity=ComplexityConfig(
                variant="blocks", clip="workdir/cheaper", blocks=16, target="regret", regret="kl", rivals=4000,
                pooled_norm="parts", dropout=0.0,
            ),
            data=data,
            optim=OptimConfig(lr=1e-3, warmup_steps=100),
            train=TrainConfig(steps=images // 128, batch_size=128, seed=42),
        )  # fmt: skip
    if kind in ("paper", "official"):
        clip, loss = ClipConfig(variant="vit_l14", exits=(13,), temperature="own"), LossConfig()
        if kind == "official":
            clip.pool, clip.exit_start, loss.direction = "first_patch", "random", "image_to_text"
        evaluation = EvalConfig(split="val")
    else:
        clip = ClipConfig(variant="vit_l14", exits=(16,), exit_head="attention", merge=MERGE, temperature="shared")
        loss = LossConfig(exit_weights=(0.05, 1.0), distill_init=10.0)
        evaluation = EvalConfig(split="val", complexity="workdir/cheaper/router", early_share=(0.4,))
    return ExperimentConfig(
        clip=clip,
        loss=loss,
        data=data,
        optim=OptimConfig(lr=1e-6, exit_lr=1e-4, temperature_lr=1e-3, weight_decay=0.01, warmup_steps=100),
        train=TrainConfig(steps=10 * images // 128, batch_size=128, seed=42, init="workdir/l14", remat="dots"),
        eval=evaluation,
    )

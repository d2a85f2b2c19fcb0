"""Fine-tuning of a converted ViT-L/14 on COCO or Flickr30k (Karpathy splits), so that it needs less of its compute.

    icar convert PATH/TO/laion2b_s32b_b82k workdir/l14
    python train.py --config=configs/vit_l14_finetune.py:coco --config.data.root=PATH/TO/coco --workdir=workdir/cheaper
    python train.py --config=configs/vit_l14_finetune.py:coco,router --config.data.root=PATH/TO/coco \\
        --workdir=workdir/cheaper/router
    python evaluate.py --config=configs/vit_l14_finetune.py:coco --config.data.root=PATH/TO/coco --workdir=workdir/cheaper

configs/vit_l14_finetune.py:coco and :flickr30k follow docs/recipe.md, which was found on small towers: patches are merged a
third and half of the way up, the tower is held to what the converted one said, an exit two thirds of the way weighs a
twentieth, and a head that reads there (:coco,router) learns among thousands of pairs which images to send out.
:coco,paper and :flickr30k,paper are the dual-path fine-tuning of the ICAR paper, whose rates both have. The folder holds
dataset_coco.json or dataset_flickr30k.json and the pictures. Ten epochs at 128 pairs a step, one for the router; one caption of
each picture is drawn an epoch.
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

# pictures to train on, and the splits that hold them
SETS = {"coco": (113_287, "train+restval"), "flickr30k": (29_000, "train")}
ARGUMENTS = tuple(f"{name}{kind}" for kind in ("", ",router", ",paper") for name in SETS)
MERGE = (*(0,) * 7, 80, 0, 0, 0, 56)  # of 256 patches: 0.68 of full depth's FLOPs


def get_config(argument: str = "coco") -> ExperimentConfig:
    if argument not in ARGUMENTS:
        raise ConfigError(f"configs/vit_l14_finetune.py:{argument}: unknown; use one of {' '.join(ARGUMENTS)}")
    dataset, _, kind = argument.partition(",")
    pictures, split = SETS[dataset]
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
            train=TrainConfig(steps=pictures // 128, batch_size=128, seed=42),
        )  # fmt: skip
    if kind == "paper":
        clip, loss = ClipConfig(variant="vit_l14", exits=(13,), temperature="own"), LossConfig()
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
        train=TrainConfig(steps=10 * pictures // 128, batch_size=128, seed=42, init="workdir/l14", remat="dots"),
        eval=evaluation,
    )

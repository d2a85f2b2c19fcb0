"""The demo: a small multi-exit CLIP and its complexity model on `scenes`, sized for minutes on two CPU cores.

`make demo` trains configs/demo.py:clip and configs/demo.py:complexity. The recipe of docs/recipe.md is :long, :cheaper and
:router. :long is a CLIP trained for more steps, on larger images and with AdamW. :cheaper fine-tunes it with token merging,
distillation from the initial weights and an exit with a small loss weight. :router trains a head at that exit on regret, with
thousands of extra negatives.

    python train.py --config=configs/demo.py:long --workdir=workdir/long
    python train.py --config=configs/demo.py:cheaper --workdir=workdir/cheaper
    python train.py --config=configs/demo.py:router --workdir=workdir/cheaper/router
    python evaluate.py --config=configs/demo.py:cheaper --workdir=workdir/cheaper
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

ARGUMENTS = ("clip", "complexity", "long", "cheaper", "router")


def get_config(task: str = "clip") -> ExperimentConfig:
    if task == "clip":
        return ExperimentConfig(
            task="clip",
            clip=ClipConfig(
                variant="vit_demo", image_size=48, exits=(2,), exit_head="attention", context_length=32, temperature="shared"
            ),
            data=DataConfig(source="scenes", vocabulary=512),
            optim=OptimConfig(kind="muon", lr=1.5e-3, exit_lr=3e-3, warmup_steps=30),
            # float32, because bf16 is several times slower on processors without bf16 instructions.
            train=TrainConfig(steps=500, batch_size=64, checkpoint_every=250, dtype="float32"),
            eval=EvalConfig(split="val", size=500, complexity="workdir/demo/complexity"),
        )  # fmt: skip
    if task == "long":
        return ExperimentConfig(
            task="clip",
            clip=ClipConfig(variant="vit_demo", exits=(2,), context_length=32, temperature="shared"),
            data=DataConfig(source="scenes", vocabulary=512),
            optim=OptimConfig(lr=1e-3, exit_lr=1e-3, warmup_steps=100),
            train=TrainConfig(steps=1000, batch_size=64, checkpoint_every=250),
            eval=EvalConfig(split="val", size=500, complexity="workdir/demo/complexity"),
        )
    if task == "cheaper":
        return ExperimentConfig(
            task="clip",
            clip=ClipConfig(
                variant="vit_demo", exits=(4,), exit_head="attention", merge=(0, 20, 14), context_length=32,
                temperature="shared",
            ),
            loss=LossConfig(exit_weights=(0.05, 1.0), distill_init=10.0),
            data=DataConfig(source="scenes", vocabulary=512),
            optim=OptimConfig(lr=5e-4, exit_lr=1e-3, warmup_steps=30),
            train=TrainConfig(steps=300, batch_size=64, checkpoint_every=100, init="workdir/long"),
            eval=EvalConfig(split="val", size=500, complexity="workdir/cheaper/router", early_share=(0.4,)),
        )  # fmt: skip
    if task == "complexity":
        return ExperimentConfig(
            task="complexity",
            complexity=ComplexityConfig(variant="convnextv2_demo", head="regression", image_size=64, dropout=0.0),
            data=DataConfig(source="scenes", normalise="imagenet"),
            optim=OptimConfig(kind="muon", lr=2e-3, warmup_steps=40),
            train=TrainConfig(steps=700, batch_size=64, checkpoint_every=350, dtype="float32"),
        )
    if task == "router":
        return ExperimentConfig(
            task="complexity",
            complexity=ComplexityConfig(
                variant="blocks", clip="workdir/cheaper", blocks=4, target="regret", regret="kl", rivals=4000,
                pooled_norm="parts", dropout=0.0,
            ),
            data=DataConfig(source="scenes", vocabulary=512),
            optim=OptimConfig(lr=1e-3, warmup_steps=100),
            train=TrainConfig(steps=2000, batch_size=256, checkpoint_every=250, dtype="float32"),
        )  # fmt: skip
    raise ConfigError(f"configs/demo.py:{task}: unknown; use configs/demo.py:{', :'.join(ARGUMENTS)}")

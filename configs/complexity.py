"""ConvNeXt-IC on `scenes`, rendered images with known complexity, at 64 pixels or at the size given after a comma.

    python train.py --config=configs/complexity.py:demo --workdir=workdir/complexity
    python train.py --config=configs/complexity.py:atto,112 --workdir=workdir/atto112 --config.train.init=workdir/atto

Variants by size: demo, atto, femto, pico, nano, tiny (ConvNeXt V2, from scratch). Two CPU cores train demo in about twenty
minutes; the larger ones need an accelerator, or the few steps of experiments/retention/cheap_routers.py. A size above 64
pixels learns fastest when initialised from the 64-pixel model. The best model by PCC on `val` is kept; evaluate.py reports on
`test`.
"""

from icar_jax.config import ComplexityConfig, ConfigError, DataConfig, EvalConfig, ExperimentConfig, OptimConfig, TrainConfig

ARGUMENTS = ("demo", "atto", "femto", "pico", "nano", "tiny")
PIXELS = 64


def get_config(argument: str = "demo") -> ExperimentConfig:
    variant, _, size = argument.partition(",")
    if variant not in ARGUMENTS or (size and not size.isdecimal()):
        raise ConfigError(
            f"configs/complexity.py:{argument}: unknown; use one of {', '.join(ARGUMENTS)}, or add the image size: atto,112"
        )
    pixels = int(size or PIXELS)
    return ExperimentConfig(
        task="complexity",
        complexity=ComplexityConfig(variant=f"convnextv2_{variant}", head="regression", image_size=pixels, dropout=0.0),
        data=DataConfig(source="scenes", scenes_pixels=pixels, normalise="imagenet"),
        optim=OptimConfig(lr=1e-3, warmup_steps=100),
        train=TrainConfig(
            steps=7000 if variant == "demo" else 4000,
            batch_size=64,
            dtype="float32" if variant == "demo" else "bfloat16",
            eval_every=500,
            eval_split="val",
            keep_best=True,
            checkpoint_every=500,
        ),
        eval=EvalConfig(split="test", size=1000),
    )

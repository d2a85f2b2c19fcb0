"""ConvNeXt-IC on `scenes`, whose complexity is known, drawn at 128 pixels.

    python train.py --config=configs/complexity.py:atto --workdir=workdir/complexity

Variants by size: demo, atto, femto, pico, nano, tiny (ConvNeXt V2, from scratch). Two CPU cores train demo or atto in about ten
minutes; the larger ones want an accelerator. The best model by PCC on `val` is kept; evaluate.py reports on `test`.
"""

from icar_jax.config import ComplexityConfig, ConfigError, DataConfig, EvalConfig, ExperimentConfig, OptimConfig, TrainConfig

ARGUMENTS = ("demo", "atto", "femto", "pico", "nano", "tiny")
PIXELS = 128
STEPS = {"demo": 3000, "atto": 750}  # the others: LONGER
LONGER = 4000


def get_config(variant: str = "atto") -> ExperimentConfig:
    if variant not in ARGUMENTS:
        raise ConfigError(f"configs/complexity.py:{variant}: unknown; use one of {', '.join(ARGUMENTS)}")
    return ExperimentConfig(
        task="complexity",
        complexity=ComplexityConfig(variant=f"convnextv2_{variant}", head="regression", image_size=PIXELS, dropout=0.0),
        data=DataConfig(source="scenes", scenes_pixels=PIXELS, normalise="imagenet"),
        optim=OptimConfig(lr=1e-3, b2=0.999, warmup_steps=100),
        train=TrainConfig(
            steps=STEPS.get(variant, LONGER),
            batch_size=32,
            eval_every=250,
            eval_split="val",
            keep_best=True,
            checkpoint_every=250,
        ),
        eval=EvalConfig(split="test", size=1000),
    )

"""A folder of photographs with captions, from scratch on two CPU cores.

    python train.py --config=configs/photos.py --config.data.root=PATH/TO/flickr8k --workdir=workdir/photos

The folder holds images (in images/ or beside) and dataset*.json (Karpathy's layout), captions.csv or captions.jsonl.
"""

from icar_jax.config import ClipConfig, DataConfig, EvalConfig, ExperimentConfig, OptimConfig, TrainConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        task="clip",
        clip=ClipConfig(variant="vit_demo", exits=(3,), context_length=32, temperature="shared"),
        data=DataConfig(source="folder", resize="crop", crop_scale=0.5, flip=True, calibration_size=500, vocabulary=4096),
        optim=OptimConfig(lr=1e-3, exit_lr=1e-3, weight_decay=0.2, warmup_steps=200),
        train=TrainConfig(steps=2500, batch_size=64, checkpoint_every=500),
        eval=EvalConfig(split="val", complexity="workdir/demo/complexity"),
    )

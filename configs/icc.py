"""ICAR's complexity classifier on labels {file: 0 | 1 | -1}: simple, complex, undecided.

    python train.py --config=configs/icc.py --config.data.root=PATH/TO/IMAGES --config.data.ratings=PATH/TO/labels.json \
        --workdir=workdir/icc --config.train.init=CONVERTED/convnextv2_tiny

The recipe: ConvNeXt V2 tiny at 224 pixels, squashed; AdamW 1e-5 with decay 1e-5, batch 32, 10 epochs, cross-entropy, early stop
on the validation loss; 70/15/15 split; random crop (0.8 to 1), flip, rotation 10 degrees, shift 0.1, jitter .2/.2/.1. Here the
cosine moves at every step, after a real warm-up; the official one moves once an epoch over a horizon counted in batches, so
hardly at all. Decay spares norms and biases. best/ holds the model of the lowest validation loss, model/ the last one.
"""

from icar_jax.config import ComplexityConfig, DataConfig, EvalConfig, ExperimentConfig, OptimConfig, TrainConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        task="complexity",
        complexity=ComplexityConfig(variant="convnextv2_tiny", head="classification", image_size=224),
        data=DataConfig(
            source="ratings", normalise="imagenet", workers=2,
            crop_scale=0.8, flip=True, rotate=10.0, translate=0.1, brightness=0.2, contrast=0.2, saturation=0.1,
        ),
        optim=OptimConfig(lr=1e-5, weight_decay=1e-5, b2=0.999, eps=1e-8, clip_norm=0.0, warmup_steps=100),
        train=TrainConfig(
            epochs=10, batch_size=32, eval_every=-1, eval_split="val", keep_best=True, patience=3, log_every=10,
            checkpoint_every=200,
        ),
        eval=EvalConfig(split="test"),
    )  # fmt: skip

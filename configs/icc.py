"""ICAR's complexity classifier, trained on labels {file: 0 | 1 | -1}: simple, complex, undecided.

    python train.py --config=configs/icc.py --config.data.root=PATH/TO/IMAGES --config.data.ratings=PATH/TO/labels.json \
        --workdir=workdir/icc --config.train.init=CONVERTED/convnextv2_tiny

The recipe: ConvNeXt V2 tiny at 224 pixels, squashed; AdamW at 1e-5 with weight decay 1e-5, batch 32, 10 epochs, cross-entropy,
early stopping on the validation loss; 70/15/15 split; random crop (0.8 to 1), flip, rotation 10 degrees, shift 0.1, colour
jitter .2/.2/.1. Two differences: the cosine schedule is updated at every step after a warm-up (the official code updates it
once per epoch with a period counted in batches, so the rate hardly changes), and weight decay does not apply to norms and
biases. best/ contains the model with the lowest validation loss, model/ the last one.
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

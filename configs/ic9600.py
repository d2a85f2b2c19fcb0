"""ConvNeXt-IC on human complexity ratings: IC9600 (Feng et al. 2023), or any folder of images with scores.

    python train.py --config=configs/ic9600.py --config.data.root=PATH/TO/IC9600 --workdir=workdir/ic9600 \
        --config.train.init=CONVERTED/convnextv2_nano

The folder contains images/, train.txt and test.txt (lines `name<two spaces>score`). A tenth of train.txt is the validation
split, which selects the best model by PCC and calibrates thresholds; `python evaluate.py` with the same flags reports on
test.txt.

The recipe: ConvNeXt V2 nano at 512 pixels, squashed; mean squared error; learning rate 1e-4, batch 32, 30 epochs, horizontal
flip. The original uses Adam with L2 regularisation of 1e-5. Here weight decay is decoupled and does not apply to norms and
biases (AdamW); at 1e-9 of a weight per step it is negligible, and weaker than L2 regularisation through Adam, which divides
it by the root of the second moment. The rate follows a cosine at every step, after a warm-up of about half an epoch.
"""

from icar_jax.config import ComplexityConfig, DataConfig, EvalConfig, ExperimentConfig, OptimConfig, TrainConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        task="complexity",
        complexity=ComplexityConfig(variant="convnextv2_nano", head="regression", image_size=512, dropout=0.2),
        data=DataConfig(source="ratings", normalise="imagenet", flip=True, workers=2),
        optim=OptimConfig(lr=1e-4, weight_decay=1e-5, b2=0.999, eps=1e-8, clip_norm=0.0, warmup_steps=100),
        train=TrainConfig(
            epochs=30, batch_size=32, eval_every=-1, eval_split="val", keep_best=True, log_every=10, checkpoint_every=200
        ),
        eval=EvalConfig(split="test"),
    )

"""ConvNeXt-IC on human ratings: IC9600 (Feng et al. 2023), or any folder of images with scores.

    python train.py --config=configs/ic9600.py --config.data.root=PATH/TO/IC9600 --workdir=workdir/ic9600 \
        --config.train.init=CONVERTED/convnextv2_nano

The folder holds images/, train.txt and test.txt (lines `name<two spaces>score`). A tenth of train.txt is the validation split:
the best model is chosen by its PCC there, and thresholds come from it; `python evaluate.py` with the same flags reports on
test.txt.

The recipe: ConvNeXt V2 nano at 512 pixels, squashed; mean squared error; rate 1e-4, batch 32, 30 epochs, horizontal flip. It
asks for Adam with 1e-5 times the weights added to the gradient. Here the decay is decoupled and spares norms and biases
(AdamW): 1e-9 of a weight a step, next to none; Adam divides it by the root of its second moment, and so decays more. The
rate follows a cosine at every step, after a warm-up of about half an epoch.
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

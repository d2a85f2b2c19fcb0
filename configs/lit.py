"""A CLIP of one's own from two pretrained towers and a folder of photographs with captions (LiT, dino.txt).

    python train.py --config=configs/lit.py --config.data.root=PHOTOS --config.train.init_image=DINOV2 \\
        --config.train.init_text=MINILM --workdir=workdir/lit

PHOTOS contains images (at the top level or in images/) and dataset*.json (Karpathy's layout), captions.csv or captions.jsonl.
DINOV2 and MINILM are folders of Hugging Face, or anything else that `icar convert` reads. Both towers stay as they are: heads
after blocks 6 to 12 learn a common space, and each reads the last four blocks up to it (of a text: the last three). The towers
run once over the photographs, and their outputs are kept on disk: training takes minutes on two CPU cores. docs/lit.md shows it
all.

`:reduced` merges tokens on the way (ToMe, 0.8 of the FLOPs of the image tower).

    python train.py --config=configs/lit.py:unlocked --config.data.root=PHOTOS --config.train.init=workdir/lit \\
        --workdir=workdir/lit_unlocked

continues from there and trains both towers, with lower rates for lower blocks. Use an accelerator for it.
"""

from icar_jax.config import (
    ClipConfig,
    ConfigError,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)

ARGUMENTS = ("locked", "reduced", "unlocked")
EXITS = (6, 7, 8, 9, 10, 11)


def get_config(how: str = "locked") -> ExperimentConfig:
    clip = ClipConfig(variant="init", image_size=168, context_length=32, exits=EXITS, exit_start="random", temperature="shared")
    data = DataConfig(
        source="folder", resize="squash", interpolation="init", normalise="init", flip=True, calibration_size=500,
    )  # fmt: skip
    if how == "reduced":
        clip.reduce, clip.reduce_to = "tome", 0.8
    if how in ("locked", "reduced"):
        clip.head, clip.embed_dim, clip.projection, clip.projection_width = "cls_mean", 512, "linear_mlp", 1024
        clip.head_blocks, clip.text_head_blocks = 4, 3
        return ExperimentConfig(
            task="clip",
            clip=clip,
            data=data,
            loss=LossConfig(exit_weights=(0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 1.0)),
            optim=OptimConfig(lr=1e-3, exit_lr=1e-3, temperature_lr=1e-3, weight_decay=1.0, warmup_steps=40, ema=0.98),
            train=TrainConfig(
                epochs=30, batch_size=512, dtype="float32", checkpoint_every=200,
                freeze=("image_trunk", "text_trunk"), cache_frozen=True, cache_views=2,
            ),
            eval=EvalConfig(split="val"),
        )  # fmt: skip
    if how == "unlocked":
        return ExperimentConfig(
            task="clip",
            clip=clip,
            data=data,
            loss=LossConfig(exit_weights=(0.2, 0.2, 0.2, 0.2, 0.2, 0.2, 1.0)),
            optim=OptimConfig(
                lr=5e-5, exit_lr=5e-5, temperature_lr=1e-4, weight_decay=0.1, warmup_steps=40, layer_decay=0.7, ema=0.99
            ),
            train=TrainConfig(epochs=4, batch_size=256, checkpoint_every=50, init="workdir/lit"),
            eval=EvalConfig(split="val"),
        )
    raise ConfigError(f"configs/lit.py:{how}: unknown; use configs/lit.py:{', :'.join(ARGUMENTS)}")

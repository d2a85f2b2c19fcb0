"""ViT-B/32 with an exit after half its blocks, pretrained on WebDataset shards (img2dataset's layout).

    python train.py --config=configs/vit_b32_pretrain.py --config.data.root="PATH/TO/{00000..01023}.tar" \\
        --config.data.tokenizer=PATH/TO/bpe_simple_vocab_16e6.txt.gz --workdir=workdir/b32

Batch size and learning rates are the usual ones for CLIP at 32,768 pairs; `icar plan` computes whether they fit a pod.
"""

from icar_jax.config import ClipConfig, DataConfig, ExperimentConfig, OptimConfig, TrainConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        clip=ClipConfig(variant="vit_b32", exits=(6,)),
        data=DataConfig(
            source="webdataset", train_split=".", resize="crop", normalise="openai", crop_scale=0.9, workers=8,
            tokenizer="bpe_simple_vocab_16e6.txt.gz",
        ),
        optim=OptimConfig(lr=1e-3, exit_lr=1e-3, temperature_lr=1e-3, weight_decay=0.2, warmup_steps=2000),
        train=TrainConfig(steps=100_000, batch_size=32_768, checkpoint_every=1000, scan_blocks=True),
    )  # fmt: skip

"""ViT-B/16 with an exit after half its blocks, pretrained with SigLIP's sigmoid loss on WebDataset shards.

    python train.py --config=configs/vit_b16_siglip.py --config.data.root="PATH/TO/{00000..01023}.tar" \\
        --config.data.tokenizer=PATH/TO/bpe_simple_vocab_16e6.txt.gz --workdir=workdir/siglip

The towers are CLIP's; the loss classifies every image-text pair as match or not, with a learned temperature and bias.
"""

from icar_jax.config import ClipConfig, DataConfig, ExperimentConfig, LossConfig, OptimConfig, TrainConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        clip=ClipConfig(variant="vit_b16", exits=(6,)),
        data=DataConfig(
            source="webdataset", train_split=".", resize="squash", normalise="half", workers=8,
            tokenizer="bpe_simple_vocab_16e6.txt.gz",
        ),
        optim=OptimConfig(lr=1e-3, exit_lr=1e-3, temperature_lr=1e-3, weight_decay=1e-4, b2=0.95, eps=1e-8, warmup_steps=5000),
        loss=LossConfig(kind="sigmoid", chunk=1024),
        train=TrainConfig(steps=100_000, batch_size=32_768, checkpoint_every=1000, scan_blocks=True, remat="dots"),
    )  # fmt: skip

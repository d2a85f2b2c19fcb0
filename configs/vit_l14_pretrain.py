"""ViT-L/14 with an exit after half its blocks, pretrained on WebDataset shards; 128 pairs per chip on a v5e pod of 256.

    icar plan --config=configs/vit_l14_pretrain.py --topology=v5e:16x16
    python train.py --config=configs/vit_l14_pretrain.py --config.data.root="gs-mount/{00000..41407}.tar" \\
        --config.data.tokenizer=PATH/TO/bpe_simple_vocab_16e6.txt.gz --workdir=workdir/l14
"""

from icar_jax.config import ClipConfig, DataConfig, ExperimentConfig, LossConfig, MeshConfig, OptimConfig, TrainConfig


def get_config() -> ExperimentConfig:
    return ExperimentConfig(
        clip=ClipConfig(variant="vit_l14", exits=(12,)),
        data=DataConfig(
            source="webdataset", train_split=".", resize="crop", normalise="openai", crop_scale=0.9, workers=16,
            tokenizer="bpe_simple_vocab_16e6.txt.gz",
        ),
        optim=OptimConfig(lr=5e-4, exit_lr=5e-4, temperature_lr=5e-4, weight_decay=0.2, warmup_steps=5000),
        loss=LossConfig(chunk=1024),
        train=TrainConfig(steps=200_000, batch_size=32_768, checkpoint_every=1000, scan_blocks=True, remat="full"),
        mesh=MeshConfig(data=-1, fsdp=1),
    )  # fmt: skip

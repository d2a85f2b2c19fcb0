"""Complexity models on human ratings within categories: SAVOIAS (Saraee, Jalal, Betke 2018), or a folder like it.

    icar convert PATH/TO/dinov2-small workdir/dinov2 --image-size 224
    python train.py --config=configs/savoias.py:6 --config.data.root=SAVOIAS --config.complexity.clip=workdir/dinov2 \
        --workdir=workdir/complexity
    python evaluate.py --config=configs/savoias.py:6 --config.data.root=SAVOIAS --config.complexity.clip=workdir/dinov2 \
        --workdir=workdir/complexity

The folder contains images/ and ratings.csv with the columns file, score in [0, 1] and optionally category; without it, or with
--config.data.categories=prefix as here, names give the category: ad_003.jpg or ad/003.jpg. train.py fits the head on all images
in closed form, evaluate.py cross-validates all methods.

Arguments: a number of blocks of the vision tower below the head (a CLIP's or a tower's alone), or `convnext`, a ConvNeXt of 1.4
million parameters that needs no other model; the default.
"""

from icar_jax.config import ComplexityConfig, ConfigError, DataConfig, ExperimentConfig


def get_config(argument: str = "convnext") -> ExperimentConfig:
    if argument != "convnext" and not (argument.isdecimal() and int(argument)):
        raise ConfigError(
            f"configs/savoias.py:{argument}: unknown; use convnext, or the number of blocks below the head, such as 6"
        )
    if argument == "convnext":
        scorer = ComplexityConfig(variant="convnextv2_micro", image_size=224, pool="statistics", fit="ridge")
    else:
        scorer = ComplexityConfig(variant="blocks", blocks=int(argument), fit="ridge")
    return ExperimentConfig(
        task="complexity",
        complexity=scorer,
        data=DataConfig(source="ratings", categories="prefix", normalise="imagenet"),
    )

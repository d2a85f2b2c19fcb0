"""What is compared on two frozen towers: heads on one block or several, and token reduction, trained or off the shelf."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from configs import lit
from icar_jax.config import ExperimentConfig

SHARES = (0.8, 0.6, 0.5)  # of the image tower's FLOPs, after reduction
METHODS = ("tome", "pitome", "drop")
LAST_BLOCK, ONE_BLOCK, RECIPE = "last_block", "one_block", "recipe"


@dataclass(frozen=True)
class Row:
    """One training run a seed, or the recipe's heads on a reduced tower without training.

    Attributes:
        name: of the row.
        reduce: token reduction, and `share` of FLOPs that it leaves; 'none' and 1 without.
        trained: whether heads are trained on the reduced tower; else those of the recipe are taken.
        early: whether there are heads before the last block.
        several: whether a head reads several blocks.
    """

    name: str
    reduce: str = "none"
    share: float = 1.0
    trained: bool = True
    early: bool = True
    several: bool = True


def rows() -> dict[str, Row]:
    """All rows by name, those that others are compared with first."""
    made = [Row(LAST_BLOCK, early=False, several=False), Row(ONE_BLOCK, several=False), Row(RECIPE)]
    for suffix, how in (("", {"early": False}), ("_exits", {}), ("_untrained", {"trained": False})):
        made += [Row(f"{method}_{share:g}{suffix}", method, share, **how) for method in METHODS for share in SHARES]
    return {row.name: row for row in made}


def config(row: Row, photos: str, image: str, text: str, cache: str, seed: int) -> ExperimentConfig:
    """The configuration of a trained row."""
    found = lit.get_config("locked")
    clip, train = found.clip, found.train
    found.data.root = photos
    if row.reduce != "none":
        clip = dataclasses.replace(clip, reduce=row.reduce, reduce_to=row.share)
    if not row.early:
        clip = dataclasses.replace(clip, exits=())
        found.loss.exit_weights = (1.0,)
    if not row.several:
        clip = dataclasses.replace(clip, head_blocks=1, text_head_blocks=1)
    train = dataclasses.replace(train, init_image=image, init_text=text, cache_folder=cache, seed=seed)
    return dataclasses.replace(found, clip=clip, train=train)

"""A vision tower and a text tower without projections, as a user brings them to join."""

import dataclasses

from icar_jax import checkpoint
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.vision import VisionArch, VisionTower
from tests.support import drawn

TOKENIZER = Tokenizer.train(["a red ball", "two blue dogs"] * 3, 280)
VISION = VisionArch(32, 8, 24, 3, 2, 48, 24, pre_norm=False, patch_bias=True, projection="none", registers=1)
TEXT = TextArch(
    12, TOKENIZER.vocab_size, 16, 2, 2, 32, 16, end_id=TOKENIZER.end_id, pool="mean", causal=False, post_norm=True,
    pad_id=TOKENIZER.pad_id, projection="none",
)  # fmt: skip


def write(root):
    """Returns the folders of a vision tower and of a text tower below `root`."""
    vision = {"vision": drawn.params(VisionTower.graph(VISION).shapes, 1)}
    about = {"arch": dataclasses.asdict(VISION), "preprocess": Preprocess(32).to_dict()}
    text = {"text": drawn.params(TextTower.graph(TEXT).shapes, 2)}
    return (
        checkpoint.write(root / "image", "vision", about, vision),
        checkpoint.write(root / "text", "text", {"arch": dataclasses.asdict(TEXT)}, text, TOKENIZER.to_json()),
    )

"""A CLIP of four blocks and a batch for it."""

import numpy as np

from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

ARCH = ClipArch(
    VisionArch(16, 8, 24, 4, 3, 48, 16, exits=(1, 3), exit_head="adapter"), TextArch(8, 50, 16, 2, 2, 32, 16, end_id=49)
)
IMAGES = np.random.default_rng(0).standard_normal((3, 16, 16, 3)).astype(np.float32)
TOKENS = np.random.default_rng(1).integers(0, 49, (3, 8)).astype(np.int32)
TOKENS[:, 5] = 49

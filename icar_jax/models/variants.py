"""Registry of named architectures: CLIP and CONVNEXT.

Sizes follow OpenAI and OpenCLIP for CLIP and timm for ConvNeXt; vit_tiny and the `demo` and `micro` entries are
specific to this project.
"""

from __future__ import annotations

from icar_jax.models.clip import ClipArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch


def _clip(image: tuple[int, int, int, int, int, int], text: tuple[int, int, int], embed: int) -> ClipArch:
    size, patch, width, depth, heads, mlp = image
    text_width, text_depth, text_heads = text
    return ClipArch(
        VisionArch(size, patch, width, depth, heads, mlp, embed),
        TextArch(77, 49408, text_width, text_depth, text_heads, 4 * text_width, embed),
    )


_TEXT_B, _TEXT_L, _TEXT_H, _TEXT_G = (512, 12, 8), (768, 12, 12), (1024, 24, 16), (1280, 32, 20)

# (image size, patch, width, blocks, heads, MLP width), (text width, blocks, heads), embedding
CLIP: dict[str, ClipArch] = {
    "vit_demo": _clip((64, 8, 128, 6, 4, 512), (128, 3, 4), 128),
    "vit_tiny": _clip((128, 16, 192, 12, 3, 768), (192, 4, 3), 192),
    "vit_s16": _clip((224, 16, 384, 12, 6, 1536), (384, 12, 6), 384),
    "vit_b32": _clip((224, 32, 768, 12, 12, 3072), _TEXT_B, 512),
    "vit_b16": _clip((224, 16, 768, 12, 12, 3072), _TEXT_B, 512),
    "vit_l14": _clip((224, 14, 1024, 24, 16, 4096), _TEXT_L, 768),
    "vit_l14_336": _clip((336, 14, 1024, 24, 16, 4096), _TEXT_L, 768),
    "vit_h14": _clip((224, 14, 1280, 32, 16, 5120), _TEXT_H, 1024),
    "vit_g14": _clip((224, 14, 1408, 40, 16, 6144), _TEXT_H, 1024),
    "vit_bigg14": _clip((224, 14, 1664, 48, 16, 8192), _TEXT_G, 1280),
}

_CONVNEXT = {
    "demo": ((1, 1, 2, 1), 16),
    "micro": ((2, 1, 1, 1), 40),
    "atto": ((2, 2, 6, 2), 40),
    "femto": ((2, 2, 6, 2), 48),
    "pico": ((2, 2, 6, 2), 64),
    "nano": ((2, 2, 8, 2), 80),
    "tiny": ((3, 3, 9, 3), 96),
    "small": ((3, 3, 27, 3), 96),
    "base": ((3, 3, 27, 3), 128),
    "large": ((3, 3, 27, 3), 192),
}
CONVNEXT: dict[str, ConvNeXtArch] = {
    f"{name}_{size}": ConvNeXtArch(depths, (width, 2 * width, 4 * width, 8 * width), version)
    for name, version in (("convnext", 1), ("convnextv2", 2))
    for size, (depths, width) in _CONVNEXT.items()
}

BLOCKS = "blocks"  # variant of a complexity model that is a head on the first blocks of a CLIP's vision tower

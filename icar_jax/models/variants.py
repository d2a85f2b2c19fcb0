"""Named architectures, and how a configuration picks one.

Sizes: OpenAI and OpenCLIP for the vision transformers, timm for ConvNeXt. The `tiny` and `demo` entries are this project's own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax.models.clip import ClipArch
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch
from icar_jax.models.token_router import BlocksArch, ScorerArch
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

BLOCKS = "blocks"  # beside the ConvNeXts: a head on the first blocks of a CLIP's vision tower


def clip_arch(config: cfg.ClipConfig, vocabulary: int | None = None, end_id: int | None = None) -> ClipArch:
    """The architecture that `config.clip` asks for; the tokenizer's size and end token replace CLIP's where given.

    Raises ConfigError for an unknown variant, exits beyond the depth, or an image size off the patch grid.
    """
    if config.variant not in CLIP:
        raise cfg.unknown("config.clip.variant", config.variant, CLIP)
    base = CLIP[config.variant]
    depth = config.depth or base.vision.depth
    cfg.validate_depth(config.exits, depth)
    size = config.image_size or base.vision.image_size
    patch = config.patch_size or base.vision.patch_size
    if size < patch or size % patch:
        near = max(patch, round(size / patch) * patch)
        raise cfg.ConfigError(
            f"config.clip.image_size={size} is not a multiple of the patch size {patch}; use {near} "
            "or another config.clip.patch_size"
        )
    if config.context_length < 0 or config.context_length == 1:
        raise cfg.ConfigError(f"config.clip.context_length={config.context_length} must be 0 or at least 2")
    try:
        vision = dataclasses.replace(
            base.vision,
            depth=depth,
            image_size=size,
            patch_size=patch,
            exits=tuple(config.exits),
            pool=config.pool,
            exit_head=config.exit_head,
            exit_sum=config.exit_sum,
            merge=tuple(config.merge),
        )
    except ValueError as error:
        raise cfg.ConfigError(f"config.clip: {error}") from error
    text = dataclasses.replace(
        base.text,
        context_length=config.context_length or base.text.context_length,
        vocabulary=base.text.vocabulary if vocabulary is None else vocabulary,
        end_id=base.text.end_id if end_id is None else end_id,
    )
    return ClipArch(vision, text, config.temperature)


def complexity_arch(config: cfg.ComplexityConfig) -> ScorerArch:
    """The architecture that `config.complexity` asks for; of variant 'blocks' the CLIP's description says the rest.

    Raises ConfigError for an unknown variant, a bad size, or a CLIP that cannot be read or lacks these blocks.
    """
    if config.variant not in (*CONVNEXT, BLOCKS):
        raise cfg.unknown("config.complexity.variant", config.variant, (*CONVNEXT, BLOCKS))
    if not 0 <= config.dropout < 1:
        raise cfg.ConfigError(f"config.complexity.dropout={config.dropout} must lie in [0, 1)")
    if config.variant == BLOCKS:
        return _blocks_arch(config)
    for name, off in (("clip", ""), ("blocks", 0), ("pooled_norm", "whole")):
        if getattr(config, name) != off and not (name == "clip" and config.target == "regret"):
            where = " or target='regret'" if name == "clip" else ""
            raise cfg.ConfigError(
                f"config.complexity.{name}={getattr(config, name)!r} is for config.complexity.variant='{BLOCKS}'{where} only, "
                f"found {config.variant!r}; leave it {off!r}"
            )
    if config.image_size < 32:
        raise cfg.ConfigError(f"config.complexity.image_size={config.image_size} must be at least 32 pixels")
    return ComplexityArch(CONVNEXT[config.variant], config.head, config.image_size, config.dropout)


def _blocks_arch(config: cfg.ComplexityConfig) -> BlocksArch:
    if not config.clip:
        raise cfg.ConfigError(
            f"config.complexity.clip='' but config.complexity.variant='{BLOCKS}' puts a head on the vision tower of a CLIP; "
            "name its checkpoint or workdir"
        )
    folder = routed_clip(config)
    clip = cfg.from_dict(checkpoint.describe(folder)["arch"], ClipArch, f"{folder}: arch")
    if not 1 <= config.blocks <= clip.vision.all_exits[0]:
        raise cfg.ConfigError(
            f"config.complexity.blocks={config.blocks} must lie in 1 to {clip.vision.all_exits[0]}, the first exit of "
            f"{config.clip}: an image that leaves there has to be scored before"
        )
    plain = {name: getattr(VisionArch, name) for name in ("exits", "pool", "exit_head", "exit_sum")}  # it has no exits
    vision = dataclasses.replace(clip.vision, **plain, merge=clip.vision.merge_before(config.blocks))
    return BlocksArch(vision, config.blocks, config.head, config.dropout, config.pooled_norm == "parts")


def routed_clip(config: cfg.ComplexityConfig) -> Path:
    """The folder of the CLIP checkpoint that config.complexity.clip names. Raises ConfigError."""
    try:
        return checkpoint.find(config.clip, ("clip",))
    except checkpoint.CheckpointError as error:
        raise cfg.ConfigError(f"config.complexity.clip={config.clip}: {error}") from error

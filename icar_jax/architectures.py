"""The architectures that a configuration asks for: named variants with its exits, sizes and heads."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax.models.clip import ClipArch
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.reduction_plan import reduced_text, reduced_vision
from icar_jax.models.token_router import BlocksArch, ScorerArch
from icar_jax.models.variants import BLOCKS, CLIP, CONVNEXT
from icar_jax.models.vision import EXIT_FIELDS, VisionArch

INIT = "init"  # the variant that takes the architecture of the weights that a run starts from


def clip_arch(
    config: cfg.ClipConfig, vocabulary: int | None = None, end_id: int | None = None, start: ClipArch | None = None
) -> ClipArch:
    """The architecture that `config.clip` asks for; the tokenizer's size and end token replace CLIP's where given.

    `start` is that of variant 'init'. Raises ConfigError for an unknown variant, exits beyond the depth, or an image size off
    the patch grid.
    """
    if config.variant == INIT:
        if start is None:
            raise cfg.ConfigError(
                "config.clip.variant='init' is the architecture of the weights that a run starts from; name them with "
                "config.train.init, or with config.train.init_image and config.train.init_text"
            )
        base = start
    elif config.variant in CLIP:
        base = CLIP[config.variant]
    else:
        raise cfg.unknown("config.clip.variant", config.variant, (*CLIP, INIT))
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
    head = config.head or base.vision.head
    space: dict[str, Any] = {
        "embed_dim": config.embed_dim or base.vision.embed_dim,
        "projection": config.projection or base.vision.projection,
        "projection_width": config.projection_width or base.vision.projection_width,
    }
    try:
        vision = dataclasses.replace(
            base.vision,
            **space,
            head=head,
            head_blocks=config.head_blocks or base.vision.head_blocks,
            depth=depth,
            image_size=size,
            patch_size=patch,
            exits=tuple(config.exits),
            pool=head if head in ("map", "cls_mean") else config.pool,  # its heads read other channels than these pools
            exit_head=config.exit_head,
            exit_sum=config.exit_sum,
            merge=tuple(config.merge),
            reduce="none",
            schedule=(),
            schedules=(),
            routes=(),
        )
        text = dataclasses.replace(
            base.text,
            **space,
            head_blocks=config.text_head_blocks or base.text.head_blocks,
            reduce="none",
            schedule=(),
            context_length=config.context_length or base.text.context_length,
            vocabulary=base.text.vocabulary if vocabulary is None else vocabulary,
            end_id=base.text.end_id if end_id is None else end_id,
        )
        plain = ClipArch(vision, text, config.temperature)
    except ValueError as error:
        raise cfg.ConfigError(f"config.clip: {error}") from error
    return reduced_clip(config, plain)


def reduced_clip(config: cfg.ClipConfig, arch: ClipArch) -> ClipArch:
    """`arch`, which removes no tokens, with the token reduction that `config.clip` asks for. Raises ConfigError."""
    if config.reduce == "none":
        return arch
    try:
        vision = reduced_vision(
            arch.vision, config.reduce, tuple(config.reduce_r), config.reduce_to, config.reduce_after,
            config.reduce_proportional, config.reduce_routes,
        )  # fmt: skip
        text = reduced_text(arch.text, tuple(config.reduce_text)) if config.reduce == "crossget" else arch.text
        return dataclasses.replace(arch, vision=vision, text=text)
    except ValueError as error:
        raise cfg.ConfigError(f"config.clip.reduce={config.reduce!r}: {error}") from error


def complexity_arch(config: cfg.ComplexityConfig) -> ScorerArch:
    """The architecture that `config.complexity` asks for; of variant 'blocks' the CLIP's description says the rest.

    Raises ConfigError for an unknown variant, a bad size, or a CLIP that cannot be read or lacks these blocks.
    """
    if config.variant not in (*CONVNEXT, BLOCKS):
        raise cfg.unknown("config.complexity.variant", config.variant, (*CONVNEXT, BLOCKS))
    if not 0 <= config.dropout < 1:
        raise cfg.ConfigError(f"config.complexity.dropout={config.dropout} must lie in [0, 1)")
    if config.variant == BLOCKS:
        if config.pool != "mean":
            raise cfg.ConfigError(
                f"config.complexity.pool={config.pool!r} is for a ConvNeXt; a head on blocks reads class token, mean and "
                "deviation: leave it 'mean'"
            )
        return _blocks_arch(config)
    readout = _readout(config)
    for name, off in (("clip", ""), ("blocks", 0), ("pooled_norm", "whole")):
        if getattr(config, name) != off and not (name == "clip" and (config.target == "regret" or config.fit == "ridge")):
            where = " or target='regret'" if name == "clip" else ""
            raise cfg.ConfigError(
                f"config.complexity.{name}={getattr(config, name)!r} is for config.complexity.variant='{BLOCKS}'{where} only, "
                f"found {config.variant!r}; leave it {off!r}"
            )
    if config.image_size < 32:
        raise cfg.ConfigError(f"config.complexity.image_size={config.image_size} must be at least 32 pixels")
    backbone = CONVNEXT[config.variant]
    return ComplexityArch(backbone, config.head, config.image_size, config.dropout, config.pool, readout)


def _readout(config: cfg.ComplexityConfig) -> str:
    if config.fit == "ridge" and config.head != "regression":
        raise cfg.ConfigError(f"config.complexity.fit='ridge' needs config.complexity.head='regression', not {config.head!r}")
    return "linear" if config.fit == "ridge" else "mlp"


def _blocks_arch(config: cfg.ComplexityConfig) -> BlocksArch:
    if not config.clip:
        raise cfg.ConfigError(
            f"config.complexity.clip='' but config.complexity.variant='{BLOCKS}' puts a head on the vision tower of a CLIP; "
            "name its checkpoint or workdir"
        )
    folder = routed_clip(config)
    tower = vision_of(folder)
    if not 1 <= config.blocks <= tower.depths[0]:
        raise cfg.ConfigError(
            f"config.complexity.blocks={config.blocks} must lie in 1 to {tower.depths[0]}, the first exit of "
            f"{config.clip}: an image that leaves there has to be scored before"
        )
    plain = {name: getattr(VisionArch, name) for name in EXIT_FIELDS}  # the trunk has no exits
    reduced: dict[str, Any] = tower.reduction_until(config.blocks)
    vision = dataclasses.replace(tower, **plain, **reduced, schedules=(), routes=())
    norm_parts = config.pooled_norm == "parts"
    return BlocksArch(vision, config.blocks, config.head, config.dropout, norm_parts, _readout(config))


def vision_of(folder: Path) -> VisionArch:
    """The architecture of the vision tower of a CLIP's checkpoint, or of a tower alone. Raises ConfigError."""
    about = checkpoint.describe(folder)
    if about["kind"] == "vision":
        return cfg.from_dict(about["arch"], VisionArch, f"{folder}: arch")
    return cfg.from_dict(about["arch"], ClipArch, f"{folder}: arch").vision


def routed_clip(config: cfg.ComplexityConfig) -> Path:
    """The checkpoint that config.complexity.clip names: a CLIP or, for ratings, a vision tower. Raises ConfigError."""
    try:
        return checkpoint.find(config.clip, ("clip",) if config.target == "regret" else ("clip", "vision"))
    except checkpoint.CheckpointError as error:
        raise cfg.ConfigError(f"config.complexity.clip={config.clip}: {error}") from error

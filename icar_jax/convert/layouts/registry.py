"""The weight layouts that this library knows. To add one: its file in this folder, and its line in LAYOUTS."""

from __future__ import annotations

from icar_jax.convert.layouts import (
    bert,
    crossget,
    hf,
    hf_dinov2,
    hf_lone,
    hf_vit,
    icar,
    icc,
    open_clip,
    open_clip_encoder,
    openai,
    siglip,
    timm,
    timm_vit,
)  # fmt: skip
from icar_jax.convert.layouts.base import KINDS, Layout

LAYOUTS: tuple[Layout, ...] = (
    openai.LAYOUT,
    crossget.LAYOUT,
    open_clip.LAYOUT,
    hf.LAYOUT,
    siglip.LAYOUT,
    hf_lone.VISION,
    hf_lone.TEXT,
    hf_vit.LAYOUT,
    hf_dinov2.LAYOUT,
    bert.LAYOUT,
    open_clip_encoder.LAYOUT,
    timm_vit.LAYOUT,
    timm.LAYOUT,
    icar.LAYOUT,
    icc.LAYOUT,
    icc.REGRESSOR,
)


def names() -> list[str]:
    """Names of all layouts."""
    return [layout.name for layout in LAYOUTS]


def named(name: str) -> Layout:
    """The layout of that name; KeyError for an unknown one."""
    return {layout.name: layout for layout in LAYOUTS}[name]


def by_precedence() -> list[Layout]:
    """All layouts in the order in which they are tried on a source."""
    return sorted(LAYOUTS, key=lambda layout: -layout.precedence)


def exports() -> dict[str, list[Layout]]:
    """{name in `icar export --to`: layouts that share it}; those that hold a CLIP come first."""
    found: dict[str, list[Layout]] = {}
    for layout in sorted(LAYOUTS, key=lambda layout: KINDS.index(layout.kind)):
        if layout.export:
            found.setdefault(layout.export.to, []).append(layout)
    return found


def weight_files() -> list[str]:
    """Names of weight files that single layouts use, in the order of LAYOUTS."""
    return list(dict.fromkeys(name for layout in LAYOUTS for name in layout.weight_files))


def config_files() -> list[str]:
    """Names of all configuration files that a layout reads, sorted."""
    return sorted({name for layout in LAYOUTS for name in layout.config_files})

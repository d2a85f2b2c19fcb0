"""The released ICAR checkpoints: OpenCLIP's names below 'clip.', and one early exit that reads the first patch.

Official `early_exit_layer` k counts from 0 and includes block k: k + 1 blocks run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts.open_clip import open_clip_arch, open_clip_rules, text_prefix
from icar_jax.convert.rules import SCALAR, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.source import Source
from icar_jax.models.clip import ClipArch


def rules(exit: int, text: str = "") -> list[Rule]:
    """Names of an ICAR checkpoint whose exit runs `exit` blocks; `text` is the prefix of the text tower within 'clip.'."""
    return [
        *prefixed(open_clip_rules(text), "clip."),
        *norm("early_ln", f"vision/exits/{exit}/ln"),
        *linear("early_proj", f"vision/exits/{exit}/proj", bias=False),
        rule("early_temp", f"exit_logit_scale/{exit}", SCALAR),
        dropped("temp_clamp", "the limit of 100 on the logit scale"),
    ]


def source_rules(source: Source, arch: ClipArch) -> list[Rule]:
    """The rules of this source."""
    return rules(arch.vision.exits[0], text_prefix(source, "clip."))


def arch(source: Source, options: Any) -> ClipArch:
    """CLIP's architecture with the exit that the checkpoint's config names, or --exits for a bare state dict.

    Raises ConvertError where neither names it, both do and differ, or the exit lies outside the tower.
    """
    config = Fields(f"{source.path}: config", source.weights.extra).section("config")
    layer = config.content.get("early_exit_layer")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ConvertError(f"{config.where}: early_exit_layer must be a block number, counted from 0, found {layer!r}")
    if layer is None and len(options.exits) != 1:
        raise ConvertError(
            f"{source.path} does not say where its exit is; pass --exits BLOCKS, the number of blocks it runs "
            "(early_exit_layer + 1: 13 for early_exit_layer 12)"
        )
    exit = options.exits[0] if layer is None else layer + 1
    if options.exits and tuple(options.exits) != (exit,):
        raise ConvertError(
            f"{source.path} has one trained exit, after {exit} blocks (early_exit_layer {layer}); --exits "
            f"{' '.join(map(str, options.exits))} cannot be added to it"
        )
    base = open_clip_arch(source, options, prefix="clip.", activation=_activation(config))
    if not 1 <= exit < base.vision.depth:
        raise ConvertError(f"{source.path}: an exit after {exit} blocks lies outside the tower of {base.vision.depth} blocks")
    vision = dataclasses.replace(base.vision, exits=(exit,), pool="first_patch")
    return dataclasses.replace(base, vision=vision, temperature="own")


def _activation(config: Fields) -> str:
    """OpenCLIP's rule for a model name: QuickGELU for OpenAI's weights and names that say so."""
    name, pretrained = config.get("model_name", str, ""), config.get("pretrained", str, "")
    if not name:
        return ""
    return "quick_gelu" if "quickgelu" in name.lower() or pretrained == "openai" else "gelu"

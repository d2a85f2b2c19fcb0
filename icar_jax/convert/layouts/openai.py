"""OpenAI's CLIP: OpenCLIP's names in a TorchScript archive, or in a state dict that stores the sizes as tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from icar_jax.convert.layouts import open_clip
from icar_jax.convert.layouts.base import Export, ExportFiles, ExportSource, Layout
from icar_jax.convert.layouts.clip_export import (
    HEAD_WIDTH,
    beyond_clip,
    pools_other_than_highest,
    refuse,
    tokenizer_files,
    weights_without_exits,
)
from icar_jax.data.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from icar_jax.models.clip import ClipArch


def _export(source: ExportSource) -> ExportFiles:
    arch = source.arch
    _require_openai(arch, source.preprocess)
    leaves, notes = weights_without_exits(source, open_clip.open_clip_rules())
    sizes = {
        "input_resolution": arch.vision.image_size,
        "context_length": arch.text.context_length,
        "vocab_size": arch.text.vocabulary,
    }
    state: dict[str, Any] = leaves | {name: np.array(size, np.int64) for name, size in sizes.items()}
    words, more_notes = tokenizer_files(source, arch.text)
    return ExportFiles({"model.pt": state, **words}, notes + more_notes)


def _require_openai(arch: ClipArch, preprocess: Preprocess) -> None:
    """Raises ConvertError where OpenAI's code, which reads everything from shapes, would compute another result."""
    v, t = arch.vision, arch.text
    prepared = (preprocess.resize_mode, preprocess.interpolation, preprocess.mean, preprocess.std, preprocess.resize_to)
    refuse(
        "openai",
        {
            **beyond_clip(arch),
            f"its activations are {v.activation} and {t.activation}, the layout means quick_gelu":
                {v.activation, t.activation} != {"quick_gelu"},
            "its heads are not 64 wide": v.width != HEAD_WIDTH * v.heads or t.width != HEAD_WIDTH * t.heads,
            "its MLPs are not four times as wide as their tower": v.mlp_width != 4 * v.width or t.mlp_width != 4 * t.width,
            "its norms have another epsilon than 1e-5": {v.norm_eps, t.norm_eps} != {1e-5},
            "its text tower is not causal": not t.causal,
            "it does not pool the highest token id": pools_other_than_highest(t),
            "it has a logit bias": arch.logit_bias,
            f"it prepares images otherwise ({preprocess})": prepared != ("crop", "bicubic", OPENAI_MEAN, OPENAI_STD, 0),
        },
    )  # fmt: skip


LAYOUT = Layout(
    name="openai",
    kind="clip",
    detect=lambda source: open_clip.is_vit(source) and open_clip.is_openai(source),
    arch=partial(open_clip.open_clip_arch, activation="quick_gelu", head_width=HEAD_WIDTH),
    rules=lambda source, arch: open_clip.open_clip_rules(open_clip.text_prefix(source)),
    preprocess=partial(open_clip.preprocess, preset="openai"),
    export=Export("openai", _export),
    precedence=1,
)

"""Hugging Face's Dinov2Model and Dinov2WithRegistersModel, alone or below a classifier.

LayerScale multiplies the outputs of attention and feed-forward part; here these factors are part of the last matrix of each.
"""

from __future__ import annotations

import numpy as np

from icar_jax.convert.layouts import hf_vit
from icar_jax.convert.layouts.base import (
    TOWER_OPTIONS,
    Export,
    ExportFiles,
    ExportSource,
    Layout,
    Options,
    Source,
    require_agreement,
    shape_of,
)
from icar_jax.convert.rules import ROWS, Rule, linear, norm, rule, scaled
from icar_jax.models.vision import VisionArch

_PLAIN, _WITH_REGISTERS = "dinov2", "dinov2_with_registers"
_BLOCK: list[Rule] = [
    *norm("norm1", "ln1"),
    *hf_vit.ATTENTION,
    *scaled("attention.output.dense", "attn/out", "layer_scale1.lambda1"),
    *norm("norm2", "ln2"),
]
_MLP = [*linear("mlp.fc1", "mlp/fc1"), *scaled("mlp.fc2", "mlp/fc2", "layer_scale2.lambda1")]
_SWIGLU = [*linear("mlp.weights_in", "mlp/fc1"), *scaled("mlp.weights_out", "mlp/fc2", "layer_scale2.lambda1")]


def _rules(swiglu: bool) -> list[Rule]:
    ffn = _SWIGLU if swiglu else _MLP
    return [*hf_vit.bare_rules([*_BLOCK, *ffn]), rule("embeddings.register_tokens", "vision/registers", ROWS)]


def _prefix(source: Source) -> str:
    return hf_vit.prefix_of(source) or ""


def _has_swiglu(source: Source) -> bool:
    return f"{_prefix(source)}encoder.layer.0.mlp.weights_in.weight" in source.tensors


def _arch(source: Source, options: Options) -> VisionArch:
    registers_name = f"{_prefix(source)}embeddings.register_tokens"
    has_registers, swiglu = registers_name in source.tensors, _has_swiglu(source)
    config = hf_vit.config_of(source, _WITH_REGISTERS if has_registers else _PLAIN)
    registers = shape_of(source, registers_name, 3)[1] if has_registers else 0
    first = f"{_prefix(source)}encoder.layer.0.mlp.{'weights_in' if swiglu else 'fc1'}.weight"
    rows, width = shape_of(source, first, 2)
    hidden = rows // 2 if swiglu else rows
    stated = int(width * config.positive("mlp_ratio", float, 4.0))
    require_agreement(
        source,
        hf_vit.CONFIG,
        {
            "use_swiglu_ffn": (config.get("use_swiglu_ffn", bool, False), swiglu),
            "num_register_tokens": (config.get("num_register_tokens", int) if has_registers else None, registers),
            "mlp_ratio, in channels": (_swiglu_width(stated) if swiglu else stated, hidden),
        },
    )
    ffn = "swiglu" if swiglu else "mlp"
    return hf_vit.tower_arch(source, options, config, hidden, 1e-6, registers=registers, ffn=ffn)


def _swiglu_width(mlp: int) -> int:
    """DINOv2's hidden channels of a SwiGLU in place of an MLP of so many: two thirds, up to a multiple of 8."""
    return (int(mlp * 2 / 3) + 7) // 8 * 8


def _export(source: ExportSource) -> ExportFiles:
    arch: VisionArch = source.arch
    swiglu = arch.ffn == "swiglu"
    ratios = [r for r in range(1, 33) if arch.mlp_width == (_swiglu_width(r * arch.width) if swiglu else r * arch.width)]
    wrong = {f"its {arch.mlp_width} hidden channels are no whole mlp_ratio of width {arch.width}": not ratios}
    kind = _WITH_REGISTERS if arch.registers else _PLAIN
    name = "Dinov2WithRegistersModel" if arch.registers else "Dinov2Model"
    config = {
        "model_type": kind,
        "architectures": [name],
        "mlp_ratio": (*ratios, 0)[0],
        "use_swiglu_ffn": swiglu,
        "layerscale_value": 1.0,
    }
    config |= {"num_register_tokens": arch.registers} if arch.registers else {"use_mask_token": False}
    made = hf_vit.tower_files(source, _rules(swiglu), config, wrong)
    del made.files[hf_vit.CONFIG]["intermediate_size"]
    if arch.registers:  # the library's model always has the token of masked patches, which was left out on the way in
        made.files["model.safetensors"]["embeddings.mask_token"] = np.zeros((1, arch.width), np.float32)
    return made


LAYOUT = Layout(
    name="hf_dinov2",
    kind="vision",
    detect=lambda source: source.has(*(f"{hf_vit.prefix_of(source)}encoder.layer.0.layer_scale{n}." for n in (1, 2))),
    arch=_arch,
    rules=lambda source, arch: hf_vit.tower_rules(source, _rules(_has_swiglu(source))),
    preprocess=hf_vit.preprocess,
    details=hf_vit.details,
    # transformers resizes the positions of the two models differently.
    antialiased=lambda arch: arch.registers > 0,
    export=Export("hf", _export),
    options=TOWER_OPTIONS,
    config_files=(hf_vit.CONFIG, *hf_vit.PREPROCESSORS),
    precedence=2,
)

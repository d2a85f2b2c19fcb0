"""SigLIP as Hugging Face stores it (model_type 'siglip'; SigLIP 2 at a fixed resolution has the same layout)."""

from __future__ import annotations

from typing import Any

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.layouts import hf
from icar_jax.convert.layouts.base import Export, ExportFiles, ExportSource, Layout, Options, Source
from icar_jax.convert.layouts.clip_export import beyond_vit, refuse, several_blocks
from icar_jax.convert.layouts.hf_export import export_files, text_config, tower_config
from icar_jax.convert.rules import ROW, TRANSPOSE, VECTOR, Rule, linear, norm, prefixed, rule
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

END_ID = 1  # </s> of the first vocabulary, <eos> of the second; the tower pools the last place
VISION = {"pool": "map", "head": "map", "class_token": False, "patch_bias": True, "pre_norm": False}  # of VisionArch
TEXT = {"end_id": END_ID, "pool": "last", "causal": False, "proj_bias": True}  # of TextArch
DEFAULTS = {"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def rules() -> list[Rule]:
    """Rules for the names of a SiglipModel."""
    return [
        *prefixed(vision_rules(), "vision_model."),
        *prefixed(text_rules(), "text_model."),
        rule("logit_scale", "logit_scale", VECTOR),
        rule("logit_bias", "logit_bias", VECTOR),
    ]


def vision_rules() -> list[Rule]:
    """Rules for the names, without a prefix, of SigLIP's vision tower."""
    return [
        *hf.vision_rules(),
        rule("embeddings.patch_embedding.bias", "vision/patch/bias"),
        rule("head.probe", "vision/map/probe", ROW),
        rule("head.attention.in_proj_weight", "vision/map/attn/qkv/kernel", TRANSPOSE),
        rule("head.attention.in_proj_bias", "vision/map/attn/qkv/bias"),
        *linear("head.attention.out_proj", "vision/map/attn/out"),
        *norm("head.layernorm", "vision/map/ln"),
        *linear("head.mlp.fc1", "vision/map/mlp/fc1"),
        *linear("head.mlp.fc2", "vision/map/mlp/fc2"),
    ]


def text_rules() -> list[Rule]:
    """Rules for the names, without a prefix, of SigLIP's text tower."""
    return [*hf.text_rules(), *linear("head", "text/proj")]


def arch(source: Source, options: Options) -> ClipArch:
    """The architecture of a SiglipModel. Raises ConvertError where something is missing, contradictory or unsupported."""
    towers = hf.read_towers(
        source, options, "siglip", class_token=False, embed="text_model.head.weight", defaults=(DEFAULTS, DEFAULTS)
    )
    width, embed_dim = towers.vision["width"], towers.vision["embed_dim"]
    if embed_dim != width:
        raise ConvertError(f"{source.path}: the text head gives {embed_dim} values and the image tower {width}")
    return ClipArch(
        VisionArch(**towers.vision, **VISION),
        TextArch(**towers.text, **TEXT),
        logit_bias=True,
    )


def _export(source: ExportSource) -> ExportFiles:
    return export_files(source, _config(source.arch, source.preprocess.image_size), rules(), "SiglipImageProcessor")


def _config(arch: ClipArch, image_size: int) -> dict[str, Any]:
    """config.json of a SiglipModel. Raises ConvertError for a model that is none."""
    v, t = arch.vision, arch.text
    refuse("hf", {
        **beyond_vit(v), **several_blocks(t), "its text tower is causal": t.causal,
        "it does not pool the last place": t.pool != "last", "it has no logit bias": not arch.logit_bias,
        "its text projection has no bias": not t.proj_bias, "it has a class token": v.class_token,
        "it has a norm before the blocks": v.pre_norm, "its patch embedding has no bias": not v.patch_bias,
    })  # fmt: skip
    return {
        "model_type": "siglip",
        "architectures": ["SiglipModel"],
        "text_config": {**tower_config("siglip_text_model", t), **text_config(t), "projection_size": t.embed_dim},
        "vision_config": {
            **tower_config("siglip_vision_model", v),
            "image_size": image_size,
            "patch_size": v.patch_size,
        },
    }


LAYOUT = Layout(
    name="siglip",
    kind="clip",
    detect=lambda source: hf.has_towers(source) and hf.is_siglip(source),
    arch=arch,
    rules=lambda source, arch: rules(),
    preprocess=hf.preprocess,
    export=Export("hf", _export, holds=lambda arch: arch.vision.head == "map"),
    config_files=(hf.CONFIG, *hf.PREPROCESSORS),
    precedence=3,
)

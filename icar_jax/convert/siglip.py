"""SigLIP as Hugging Face stores it (model_type 'siglip'; SigLIP 2 at a fixed resolution has the same layout)."""

from __future__ import annotations

from typing import Any

from icar_jax.convert import engine
from icar_jax.convert.clip import HF_BLOCK, hf_section, hf_sizes
from icar_jax.convert.engine import CONV, ROW, TRANSPOSE, VECTOR, Rule, linear, norm, prefixed, rule
from icar_jax.convert.errors import ConvertError
from icar_jax.convert.settings import choose_activation, choose_heads, hf_activation
from icar_jax.convert.source import Source, require_agreement, shape_of, square_side
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

_END_ID = 1  # </s> of the first vocabulary, <eos> of the second; the tower itself reads the last place
_DEFAULTS = {"num_attention_heads": 12, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


def rules() -> list[Rule]:
    """Hugging Face's names of a SiglipModel."""
    return [
        rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/kernel", CONV),
        rule("vision_model.embeddings.patch_embedding.bias", "vision/patch/bias"),
        rule("vision_model.embeddings.position_embedding.weight", "vision/pos"),
        *prefixed(HF_BLOCK, "vision_model.encoder.layers.{}.", "vision/blocks/{}/"),
        *norm("vision_model.post_layernorm", "vision/ln_post"),
        rule("vision_model.head.probe", "vision/map/probe", ROW),
        rule("vision_model.head.attention.in_proj_weight", "vision/map/attn/qkv/kernel", TRANSPOSE),
        rule("vision_model.head.attention.in_proj_bias", "vision/map/attn/qkv/bias"),
        *linear("vision_model.head.attention.out_proj", "vision/map/attn/out"),
        *norm("vision_model.head.layernorm", "vision/map/ln"),
        *linear("vision_model.head.mlp.fc1", "vision/map/mlp/fc1"),
        *linear("vision_model.head.mlp.fc2", "vision/map/mlp/fc2"),
        rule("text_model.embeddings.token_embedding.weight", "text/embed"),
        rule("text_model.embeddings.position_embedding.weight", "text/pos"),
        *prefixed(HF_BLOCK, "text_model.encoder.layers.{}.", "text/blocks/{}/"),
        *norm("text_model.final_layer_norm", "text/ln_final"),
        *linear("text_model.head", "text/proj"),
        rule("logit_scale", "logit_scale", VECTOR),
        rule("logit_bias", "logit_bias", VECTOR),
        engine.dropped("text_model.embeddings.position_ids", "0, 1, 2, ..."),
        engine.dropped("vision_model.embeddings.position_ids", "0, 1, 2, ..."),
    ]


def arch(source: Source, options: Any) -> ClipArch:
    """The architecture of a SiglipModel. Raises ConvertError where something is missing, contradictory or unsupported."""
    where = "config.json"
    if source.configs.get(where, {}).get("model_type") == "siglip2":
        raise ConvertError(f"{source.path}: SigLIP 2 with variable resolution (NaFlex) is not supported; take a fixed-size one")
    vision, text = (hf_section(source, name, _DEFAULTS) for name in ("vision_config", "text_config"))
    acts = [hf_activation(section["hidden_act"], where) for section in (vision, text)]
    for act in acts:
        choose_activation(options.activation, act, where)
    width, _, patch, _ = shape_of(source, "vision_model.embeddings.patch_embedding.weight", 4)
    positions = shape_of(source, "vision_model.embeddings.position_embedding.weight", 2)[0]
    side = square_side(source, "vision_model.embeddings.position_embedding.weight", positions)
    depth = engine.count(source.tensors, "vision_model.encoder.layers.{}")
    mlp = shape_of(source, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0]
    vocabulary, text_width = shape_of(source, "text_model.embeddings.token_embedding.weight", 2)
    context = shape_of(source, "text_model.embeddings.position_embedding.weight", 2)[0]
    text_depth = engine.count(source.tensors, "text_model.encoder.layers.{}")
    text_mlp = shape_of(source, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0]
    embed_dim = shape_of(source, "text_model.head.weight", 2)[0]
    if embed_dim != width:
        raise ConvertError(f"{source.path}: the text head gives {embed_dim} values and the image tower {width}")
    require_agreement(
        source,
        where,
        {
            **hf_sizes("vision_config", vision, width, depth, mlp),
            **hf_sizes("text_config", text, text_width, text_depth, text_mlp),
            "vision_config.patch_size": (vision.get("patch_size"), patch),
            "text_config.max_position_embeddings": (text.get("max_position_embeddings"), context),
            "text_config.vocab_size": (text.get("vocab_size"), vocabulary),
        },
    )
    heads = choose_heads(0, vision["num_attention_heads"], width, depth, "vision", where)
    text_heads = choose_heads(0, text["num_attention_heads"], text_width, text_depth, "text", where)
    # 384 pixels in patches of 14 leave 6 pixels over, which the library's convolution drops: the tower sees 27 x 14.
    return ClipArch(
        VisionArch(patch * side, patch, width, depth, heads, mlp, embed_dim, acts[0], pool="map", head="map",
                   class_token=False, patch_bias=True, pre_norm=False, norm_eps=vision["layer_norm_eps"]),
        TextArch(context, vocabulary, text_width, text_depth, text_heads, text_mlp, embed_dim, acts[1], end_id=_END_ID,
                 pool="last", causal=False, proj_bias=True, norm_eps=text["layer_norm_eps"]),
        logit_bias=True,
    )  # fmt: skip

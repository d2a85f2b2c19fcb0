"""CLIP layouts: OpenAI and OpenCLIP (one set of names), and Hugging Face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icar_jax.convert import engine
from icar_jax.convert.engine import CONV, QKV_BIAS, QKV_WEIGHT, SCALAR, TRANSPOSE, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.errors import ConvertError
from icar_jax.convert.settings import (
    choose_activation,
    choose_heads,
    choose_preprocess,
    first_config,
    hf_activation,
    hf_preprocess,
    open_clip_preprocess,
)
from icar_jax.convert.source import Source, require_agreement, shape_of, square_side
from icar_jax.data.images import Preprocess
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

CLIP_END_ID = 49407
_BLOCK: list[Rule] = [
    *norm("ln_1", "ln1"),
    rule("attn.in_proj_weight", "attn/qkv/kernel", TRANSPOSE),
    rule("attn.in_proj_bias", "attn/qkv/bias"),
    *linear("attn.out_proj", "attn/out"),
    *norm("ln_2", "ln2"),
    *linear("mlp.c_fc", "mlp/fc1"),
    *linear("mlp.c_proj", "mlp/fc2"),
]
HF_BLOCK: list[Rule] = [
    *norm("layer_norm1", "ln1"),
    rule([f"self_attn.{part}_proj.weight" for part in "qkv"], "attn/qkv/kernel", QKV_WEIGHT),
    rule([f"self_attn.{part}_proj.bias" for part in "qkv"], "attn/qkv/bias", QKV_BIAS),
    *linear("self_attn.out_proj", "attn/out"),
    *norm("layer_norm2", "ln2"),
    *linear("mlp.fc1", "mlp/fc1"),
    *linear("mlp.fc2", "mlp/fc2"),
]


def open_clip_rules(text_prefix: str = "") -> list[Rule]:
    """OpenAI's and OpenCLIP's names; CustomTextCLIP has `text_prefix` 'text.'."""
    vision = [
        rule("conv1.weight", "patch/kernel", CONV),
        rule("class_embedding", "cls"),
        rule("positional_embedding", "pos"),
        *norm("ln_pre", "ln_pre"),
        *prefixed(_BLOCK, "transformer.resblocks.{}.", "blocks/{}/"),
        *norm("ln_post", "ln_post"),
        rule("proj", "proj/kernel"),
    ]
    text = [
        rule("token_embedding.weight", "embed"),
        rule("positional_embedding", "pos"),
        *prefixed(_BLOCK, "transformer.resblocks.{}.", "blocks/{}/"),
        *norm("ln_final", "ln_final"),
        rule("text_projection", "proj/kernel"),
        dropped("attn_mask", "the causal mask"),
    ]
    return [
        *prefixed(vision, "visual.", "vision/"),
        *prefixed(text, text_prefix, "text/"),
        rule("logit_scale", "logit_scale", SCALAR),
        rule("logit_bias", "logit_bias", SCALAR),
        *(dropped(name, "a size, not a weight") for name in ("input_resolution", "context_length", "vocab_size")),
    ]


def hf_rules() -> list[Rule]:
    """Hugging Face's names of a CLIPModel."""
    return [
        rule("vision_model.embeddings.patch_embedding.weight", "vision/patch/kernel", CONV),
        rule("vision_model.embeddings.class_embedding", "vision/cls"),
        rule("vision_model.embeddings.position_embedding.weight", "vision/pos"),
        *norm("vision_model.pre_layrnorm", "vision/ln_pre"),
        *prefixed(HF_BLOCK, "vision_model.encoder.layers.{}.", "vision/blocks/{}/"),
        *norm("vision_model.post_layernorm", "vision/ln_post"),
        *linear("visual_projection", "vision/proj", bias=False),
        rule("text_model.embeddings.token_embedding.weight", "text/embed"),
        rule("text_model.embeddings.position_embedding.weight", "text/pos"),
        *prefixed(HF_BLOCK, "text_model.encoder.layers.{}.", "text/blocks/{}/"),
        *norm("text_model.final_layer_norm", "text/ln_final"),
        *linear("text_projection", "text/proj", bias=False),
        rule("logit_scale", "logit_scale", SCALAR),
        dropped("text_model.embeddings.position_ids", "0, 1, 2, ..."),
        dropped("vision_model.embeddings.position_ids", "0, 1, 2, ..."),
    ]


def text_prefix(source: Source, prefix: str = "") -> str:
    """'text.' for OpenCLIP's CustomTextCLIP, else ''."""
    return "text." if any(name.startswith(f"{prefix}text.") for name in source.tensors) else ""


# What an OpenCLIP config may say beyond sizes, and what it must say for these towers to compute the same.
_VISION_ONLY = {
    "timm_model_name": (None, ""), "attentional_pool": (None, False), "pool_type": (None, "tok"), "input_patchnorm": (None, False),
    "ls_init_value": (None,), "no_ln_pre": (None, False), "final_ln_after_pool": (None, False), "block_type": (None,),
    "pos_embed_type": (None, "learnable"), "qk_norm": (None, False), "scaled_cosine_attn": (None, False),
    "scale_heads": (None, False), "scale_attn_inner": (None, False), "scale_attn": (None, False), "scale_fc": (None, False),
}  # fmt: skip
_TEXT_ONLY = {
    "hf_model_name": (None, ""), "pool_type": (None, "argmax", "eos", "last"), "embed_cls": (None, False),
    "proj_type": (None, "linear"), "proj_bias": (None, False), "final_ln_after_pool": (None, False), "ls_init_value": (None,),
    "block_type": (None,), "qk_norm": (None, False), "scaled_cosine_attn": (None, False), "scale_heads": (None, False),
    "scale_attn_inner": (None, False), "scale_attn": (None, False), "scale_fc": (None, False),
}  # fmt: skip


def _require_supported(section: str, found: Mapping[str, Any], allowed: Mapping[str, tuple], where: str) -> None:
    wrong = [f"{section}.{k}={found[k]!r}" for k, values in allowed.items() if found.get(k) not in values]
    if wrong:
        raise ConvertError(f"{where} describes a tower that is not supported: {', '.join(wrong)}")


def open_clip_arch(source: Source, options: Any, prefix: str = "", activation: str = "") -> ClipArch:
    """The architecture of OpenAI's and OpenCLIP's layout, from shapes and, where there is one, open_clip_config.json.

    `activation` is what the caller knows of it. Raises ConvertError where something is missing, contradictory or unsupported.
    """
    config = source.configs.get("open_clip_config.json", {}).get("model_cfg", {})
    where = "open_clip_config.json" if config else str(source.path)
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if isinstance(vision.get("layers"), list):
        raise ConvertError(f"{where}: a ResNet tower (vision_cfg.layers={vision['layers']}) is not supported")
    if f"{prefix}visual.layer1.0.conv1.weight" in source.tensors:
        raise ConvertError(f"{source.path}: the vision tower is a ResNet, which is not supported; expected a vision transformer")
    _require_supported("vision_cfg", vision, _VISION_ONLY, where)
    _require_supported("text_cfg", text, _TEXT_ONLY, where)
    found = [activation or _open_clip_activation(config, section) for section in (vision, text)]
    activation, text_activation = (choose_activation(options.activation, name, where) for name in found)

    in_text = prefix + text_prefix(source, prefix)
    width, _, patch, _ = shape_of(source, f"{prefix}visual.conv1.weight", 4)
    positions = shape_of(source, f"{prefix}visual.positional_embedding", 2)[0]
    side = square_side(source, f"{prefix}visual.positional_embedding", positions - 1)
    depth = engine.count(source.tensors, f"{prefix}visual.transformer.resblocks.{{}}")
    mlp = shape_of(source, f"{prefix}visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    embed_dim = shape_of(source, f"{prefix}visual.proj", 2)[1]
    vocabulary, text_width = shape_of(source, f"{in_text}token_embedding.weight", 2)
    context = shape_of(source, f"{in_text}positional_embedding", 2)[0]
    text_depth = engine.count(source.tensors, f"{in_text}transformer.resblocks.{{}}")
    text_mlp = shape_of(source, f"{in_text}transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    require_agreement(
        source,
        where,
        {
            "embed_dim": (config.get("embed_dim"), embed_dim),
            "vision_cfg.width": (vision.get("width"), width),
            "vision_cfg.layers": (vision.get("layers"), depth),
            "vision_cfg.patch_size": (vision.get("patch_size"), patch),
            "vision_cfg.image_size": (vision.get("image_size"), patch * side),
            "text_cfg.width": (text.get("width"), text_width),
            "text_cfg.layers": (text.get("layers"), text_depth),
            "text_cfg.context_length": (text.get("context_length"), context),
            "text_cfg.vocab_size": (text.get("vocab_size"), vocabulary),
        },
    )
    said = (width // vision.get("head_width", 64), text.get("heads", 8)) if config else (None, None)
    asked = options.heads or (0, 0)
    heads = choose_heads(asked[0], said[0], width, depth, "vision", where)
    text_heads = choose_heads(asked[1], said[1], text_width, text_depth, "text", where)
    return ClipArch(
        VisionArch(patch * side, patch, width, depth, heads, mlp, embed_dim, activation,
                   norm_eps=_eps(vision)),
        TextArch(context, vocabulary, text_width, text_depth, text_heads, text_mlp, embed_dim, text_activation,
                 end_id=text.get("eos_id", vocabulary - 1) if text.get("pool_type") == "eos" else vocabulary - 1,
                 pool={"eos": "end", "last": "last"}.get(text.get("pool_type"), "argmax"),
                 causal=not text.get("no_causal_mask", False), norm_eps=_eps(text)),
        logit_bias=f"{prefix}logit_bias" in source.tensors,
    )  # fmt: skip


def _open_clip_activation(config: Mapping[str, Any], section: Mapping[str, Any]) -> str:
    if not config:
        return ""
    if config.get("quick_gelu"):
        return "quick_gelu"
    return "gelu_tanh" if (section.get("act_kwargs") or {}).get("approximate") == "tanh" else "gelu"


def _eps(config: Mapping[str, Any]) -> float:
    return (config.get("norm_kwargs") or {}).get("eps", 1e-5)


def open_clip_found_preprocess(source: Source, image_size: int) -> Preprocess | None:
    """What open_clip_config.json says of the images; OpenAI's own for OpenAI's files; else None."""
    config = source.configs.get("open_clip_config.json")
    if config is not None and "preprocess_cfg" in config:
        return open_clip_preprocess(config["preprocess_cfg"], image_size, "open_clip_config.json")
    if source.layout == "openai":
        return choose_preprocess("openai", None, image_size, str(source.path))
    return None


def hf_section(source: Source, name: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """One tower's part of config.json; what it leaves out has the library's default."""
    config = source.configs.get("config.json")
    if config is None:
        raise ConvertError(
            f"{source.path}: there is no config.json beside {source.weights.path.name}, so heads and activation are unknown; "
            "copy the whole folder"
        )
    return {**defaults, **(config.get(name) or config.get(f"{name}_dict") or {})}


_HF_DEFAULTS = {
    "text_config": {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "eos_token_id": CLIP_END_ID},
    "vision_config": {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}


def hf_arch(source: Source, options: Any) -> ClipArch:
    """The architecture of a Hugging Face CLIPModel. Raises ConvertError as `open_clip_arch` does."""
    vision, text = (hf_section(source, name, _HF_DEFAULTS[name]) for name in ("vision_config", "text_config"))
    where = "config.json"
    acts = [hf_activation(section["hidden_act"], where) for section in (vision, text)]
    for act in acts:
        choose_activation(options.activation, act, where)
    width, _, patch, _ = shape_of(source, "vision_model.embeddings.patch_embedding.weight", 4)
    positions = shape_of(source, "vision_model.embeddings.position_embedding.weight", 2)[0]
    side = square_side(source, "vision_model.embeddings.position_embedding.weight", positions - 1)
    depth = engine.count(source.tensors, "vision_model.encoder.layers.{}")
    mlp = shape_of(source, "vision_model.encoder.layers.0.mlp.fc1.weight", 2)[0]
    embed_dim = shape_of(source, "visual_projection.weight", 2)[0]
    vocabulary, text_width = shape_of(source, "text_model.embeddings.token_embedding.weight", 2)
    context = shape_of(source, "text_model.embeddings.position_embedding.weight", 2)[0]
    text_depth = engine.count(source.tensors, "text_model.encoder.layers.{}")
    text_mlp = shape_of(source, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0]
    require_agreement(
        source,
        where,
        {
            **hf_sizes("vision_config", vision, width, depth, mlp),
            **hf_sizes("text_config", text, text_width, text_depth, text_mlp),
            "vision_config.patch_size": (vision.get("patch_size"), patch),
            "vision_config.image_size": (vision.get("image_size"), patch * side),
            "text_config.max_position_embeddings": (text.get("max_position_embeddings"), context),
            "text_config.vocab_size": (text.get("vocab_size"), vocabulary),
        },
    )
    heads = choose_heads(0, vision["num_attention_heads"], width, depth, "vision", where)
    text_heads = choose_heads(0, text["num_attention_heads"], text_width, text_depth, "text", where)
    # Configs older than the field's meaning say 2; the library then takes the highest id.
    legacy = text["eos_token_id"] == 2
    return ClipArch(
        VisionArch(patch * side, patch, width, depth, heads, mlp, embed_dim, acts[0], norm_eps=vision["layer_norm_eps"]),
        TextArch(context, vocabulary, text_width, text_depth, text_heads, text_mlp, embed_dim, acts[1],
                 end_id=vocabulary - 1 if legacy else text["eos_token_id"], pool="argmax" if legacy else "end",
                 norm_eps=text["layer_norm_eps"]),
    )  # fmt: skip


def hf_sizes(name: str, section: Mapping[str, Any], width: int, depth: int, mlp: int) -> dict[str, tuple[Any, Any]]:
    return {
        f"{name}.hidden_size": (section.get("hidden_size"), width),
        f"{name}.num_hidden_layers": (section.get("num_hidden_layers"), depth),
        f"{name}.intermediate_size": (section.get("intermediate_size"), mlp),
    }


def hf_found_preprocess(source: Source) -> Preprocess | None:
    """What preprocessor_config.json (or processor_config.json) says of the images, or None without one."""
    found = first_config(source, "preprocessor_config.json", "processor_config.json")
    return hf_preprocess(found[1], found[0]) if found else None

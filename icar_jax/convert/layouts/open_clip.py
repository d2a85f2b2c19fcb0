"""The layout of OpenAI's and OpenCLIP's CLIP: one set of names."""

from __future__ import annotations

from typing import Any

from icar_jax.convert import rules
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.rules import CONV, SCALAR, TRANSPOSE, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.settings import choose_activation, choose_heads, choose_preprocess, open_clip_preprocess
from icar_jax.convert.source import Source, require_agreement, shape_of, square_side
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import CLIP_VOCAB_SIZE
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

CONFIG = "open_clip_config.json"
_BLOCK: list[Rule] = [
    *norm("ln_1", "ln1"),
    rule("attn.in_proj_weight", "attn/qkv/kernel", TRANSPOSE),
    rule("attn.in_proj_bias", "attn/qkv/bias"),
    *linear("attn.out_proj", "attn/out"),
    *norm("ln_2", "ln2"),
    *linear("mlp.c_fc", "mlp/fc1"),
    *linear("mlp.c_proj", "mlp/fc2"),
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


def text_prefix(source: Source, prefix: str = "") -> str:
    """'text.' for OpenCLIP's CustomTextCLIP, else ''."""
    return "text." if any(name.startswith(f"{prefix}text.") for name in source.tensors) else ""


# What an OpenCLIP config may say beyond sizes, and what it must say for these towers to compute the same.
_BOTH = {name: (None, False) for name in ("final_ln_after_pool", "qk_norm", "scaled_cosine_attn", "scale_heads",
                                          "scale_attn_inner", "scale_attn", "scale_fc")}  # fmt: skip
_BOTH |= {"ls_init_value": (None,), "block_type": (None,)}
_VISION_ONLY = _BOTH | {
    "timm_model_name": (None, ""), "attentional_pool": (None, False), "pool_type": (None, "tok"),
    "input_patchnorm": (None, False),
    "no_ln_pre": (None, False), "pos_embed_type": (None, "learnable"),
}  # fmt: skip
_TEXT_ONLY = _BOTH | {
    "hf_model_name": (None, ""), "pool_type": (None, "argmax", "eos", "last"), "embed_cls": (None, False),
    "proj_type": (None, "linear"), "proj_bias": (None, False),
}  # fmt: skip


def _require_supported(section: Fields, allowed: dict[str, tuple]) -> None:
    wrong = [f"{k}={section.content[k]!r}" for k, values in allowed.items() if section.content.get(k) not in values]
    if wrong:
        raise ConvertError(f"{section.where} describes a tower that is not supported: {', '.join(wrong)}")


def model_config(source: Source) -> Fields:
    """The `model_cfg` of open_clip_config.json; empty where there is none."""
    return Fields(CONFIG, source.configs.get(CONFIG, {})).section("model_cfg")


def open_clip_arch(source: Source, options: Any, prefix: str = "", activation: str = "") -> ClipArch:
    """The architecture of OpenAI's and OpenCLIP's layout, from shapes and, where there is one, open_clip_config.json.

    `activation` is what the caller knows of it. Raises ConvertError where something is missing, contradictory or unsupported.
    """
    config = model_config(source)
    where = CONFIG if config else str(source.path)
    vision, text = config.section("vision_cfg"), config.section("text_cfg")
    if isinstance(vision.content.get("layers"), list) or f"{prefix}visual.layer1.0.conv1.weight" in source.tensors:
        raise ConvertError(
            f"{source.path}: the vision tower is a ResNet, which is not supported; expected a vision transformer"
        )
    _require_supported(vision, _VISION_ONLY)
    _require_supported(text, _TEXT_ONLY)
    found = [activation or _activation(config, section) for section in (vision, text)]
    activation, text_activation = (choose_activation(options.activation, name, where) for name in found)

    in_text = prefix + text_prefix(source, prefix)
    width, _, patch, _ = shape_of(source, f"{prefix}visual.conv1.weight", 4)
    positions = shape_of(source, f"{prefix}visual.positional_embedding", 2)[0]
    side = square_side(source, f"{prefix}visual.positional_embedding", positions - 1)
    depth = rules.count(source.tensors, f"{prefix}visual.transformer.resblocks.{{}}")
    mlp = shape_of(source, f"{prefix}visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    embed_dim = shape_of(source, f"{prefix}visual.proj", 2)[1]
    vocabulary, text_width = shape_of(source, f"{in_text}token_embedding.weight", 2)
    context = shape_of(source, f"{in_text}positional_embedding", 2)[0]
    text_depth = rules.count(source.tensors, f"{in_text}transformer.resblocks.{{}}")
    text_mlp = shape_of(source, f"{in_text}transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    require_agreement(
        source,
        where,
        {
            "embed_dim": (config.get("embed_dim", int), embed_dim),
            "vision_cfg.width": (vision.get("width", int), width),
            "vision_cfg.layers": (vision.get("layers", int), depth),
            "vision_cfg.patch_size": (vision.get("patch_size", int), patch),
            "vision_cfg.image_size": (vision.get("image_size", int), patch * side),
            "text_cfg.width": (text.get("width", int), text_width),
            "text_cfg.layers": (text.get("layers", int), text_depth),
            "text_cfg.context_length": (text.get("context_length", int), context),
            "text_cfg.vocab_size": (text.get("vocab_size", int), vocabulary),
        },
    )
    if not config and vocabulary > CLIP_VOCAB_SIZE:
        raise ConvertError(
            f"{source.path}: with a vocabulary of {vocabulary} the token that the text tower pools is unknown; copy "
            f"{CONFIG} beside the weights"
        )
    said: tuple[int | None, int | None] = (None, None)
    if config:
        said = (width // vision.positive("head_width", int, 64), text.positive("heads", int, 8))
    elif source.layout == "openai":  # OpenAI's own code takes 64 for every tower
        said = (width // 64, text_width // 64)
    asked = options.heads or (0, 0)
    heads = choose_heads(asked[0], said[0], width, depth, "vision", where)
    text_heads = choose_heads(asked[1], said[1], text_width, text_depth, "text", where)
    pool = text.get("pool_type", str, "argmax")
    return ClipArch(
        VisionArch(patch * side, patch, width, depth, heads, mlp, embed_dim, activation, norm_eps=_eps(vision)),
        TextArch(context, vocabulary, text_width, text_depth, text_heads, text_mlp, embed_dim, text_activation,
                 # 2 is what OpenCLIP takes where its config names no end token.
                 end_id=text.get("eos_id", int, 2) if pool == "eos" else vocabulary - 1,
                 pool={"eos": "end", "last": "last", "argmax": "argmax"}[pool],
                 causal=not text.get("no_causal_mask", bool, False), norm_eps=_eps(text)),
        logit_bias=f"{prefix}logit_bias" in source.tensors,
    )  # fmt: skip


def _activation(config: Fields, section: Fields) -> str:
    if not config:
        return ""
    if config.get("quick_gelu", bool, False):
        return "quick_gelu"
    return "gelu_tanh" if section.section("act_kwargs").get("approximate", str) == "tanh" else "gelu"


def _eps(section: Fields) -> float:
    return section.section("norm_kwargs").positive("eps", float, 1e-5)


def found_preprocess(source: Source, image_size: int) -> Preprocess | None:
    """What open_clip_config.json says of the images; OpenAI's own for OpenAI's files; else None."""
    content = Fields(CONFIG, source.configs.get(CONFIG, {})).section("preprocess_cfg")
    if content:
        return open_clip_preprocess(content, image_size)
    if source.layout == "openai":
        return choose_preprocess("openai", None, image_size, str(source.path))
    return None

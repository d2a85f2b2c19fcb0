"""OpenCLIP's layout, whose tensor names OpenAI's CLIP and ICAR share."""

from __future__ import annotations

from icar_jax.convert import rules
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts.base import Export, Layout, Options, Source, require_agreement, shape_of, square_side
from icar_jax.convert.layouts.open_clip_export import CONFIG, export_files, text_config
from icar_jax.convert.rules import CONV, SCALAR, TRANSPOSE, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.settings import RESAMPLING, checked_preprocess, choose_activation, choose_heads, choose_preprocess
from icar_jax.data.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from icar_jax.data.tokenizer import CLIP_VOCAB_SIZE
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

ENCODER = "text.transformer.embeddings."  # of a text encoder of transformers: open_clip_encoder.py
_BLOCK: list[Rule] = [
    *norm("ln_1", "ln1"),
    rule("attn.in_proj_weight", "attn/qkv/kernel", TRANSPOSE),
    rule("attn.in_proj_bias", "attn/qkv/bias"),
    *linear("attn.out_proj", "attn/out"),
    *norm("ln_2", "ln2"),
    *linear("mlp.c_fc", "mlp/fc1"),
    *linear("mlp.c_proj", "mlp/fc2"),
]


def vision_rules() -> list[Rule]:
    """Rules for the names of OpenAI's and OpenCLIP's vision towers, and of what the towers share."""
    vision = [
        rule("conv1.weight", "patch/kernel", CONV),
        rule("class_embedding", "cls"),
        rule("positional_embedding", "pos"),
        *norm("ln_pre", "ln_pre"),
        *prefixed(_BLOCK, "transformer.resblocks.{}.", "blocks/{}/"),
        *norm("ln_post", "ln_post"),
        rule("proj", "proj/kernel"),
    ]
    return [
        *prefixed(vision, "visual.", "vision/"),
        rule("logit_scale", "logit_scale", SCALAR),
        rule("logit_bias", "logit_bias", SCALAR),
    ]


def open_clip_rules(text_prefix: str = "") -> list[Rule]:
    """Rules for OpenAI's and OpenCLIP's names; `text_prefix` is 'text.' for CustomTextCLIP."""
    text = [
        rule("token_embedding.weight", "embed"),
        rule("positional_embedding", "pos"),
        *prefixed(_BLOCK, "transformer.resblocks.{}.", "blocks/{}/"),
        *norm("ln_final", "ln_final"),
        rule("text_projection", "proj/kernel"),
        dropped("attn_mask", "the causal mask"),
    ]
    return [
        *vision_rules(),
        *prefixed(text, text_prefix, "text/"),
        *(dropped(name, "a size, not a weight") for name in ("input_resolution", "context_length", "vocab_size")),
    ]


def text_prefix(source: Source, prefix: str = "") -> str:
    """'text.' for OpenCLIP's CustomTextCLIP, else ''; `prefix` stands before all names of the CLIP."""
    return "text." if source.has(f"{prefix}text.") else ""


def is_vit(source: Source) -> bool:
    """Whether the names are OpenAI's or OpenCLIP's. Raises ConvertError for a vision tower of timm, and for LongCLIP's own."""
    if source.has("visual.") and source.has("positional_embedding_res"):
        raise ConvertError(
            f"{source.path} is LongCLIP's own state dict, with two tables of text positions (positional_embedding_res), and "
            "is not read; convert its folder in Hugging Face's layout, or write rows 20 and later of positional_embedding_res "
            "over those of positional_embedding, remove the former and save the state dict"
        )
    if source.has("visual.trunk."):
        raise ConvertError(
            f"{source.path}: the vision tower is a timm model (visual.trunk.*), which is not supported; a SigLIP is read from "
            "its Hugging Face folder"
        )
    return source.has("visual.")


def is_openai(source: Source) -> bool:
    """Whether a file with these names is OpenAI's own: TorchScript, or with the sizes that OpenAI stores as tensors."""
    return source.weights.kind == "torchscript" or "input_resolution" in source.tensors


# Fields of an OpenCLIP config beyond sizes, with the values under which its towers compute what ours do.
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
    return source.config(CONFIG).section("model_cfg")


def open_clip_arch(source: Source, options: Options, prefix: str = "", activation: str = "", head_width: int = 0) -> ClipArch:
    """The architecture, from shapes and, where it exists, open_clip_config.json.

    `prefix` stands before all names. A layout that implies the activation or, for sources without a config, the width of an
    attention head passes them. Raises ConvertError where something is missing, contradictory or unsupported.
    """
    config = model_config(source)
    where = CONFIG if config else str(source.path)
    vision = vision_arch(source, options, prefix, activation, head_width)
    text = config.section("text_cfg")
    _require_supported(text, _TEXT_ONLY)
    text_activation = choose_activation(options.activation, activation or _activation(config, text), where)
    in_text = prefix + text_prefix(source, prefix)
    vocabulary, width = shape_of(source, f"{in_text}token_embedding.weight", 2)
    context = shape_of(source, f"{in_text}positional_embedding", 2)[0]
    depth = rules.count(source.tensors, f"{in_text}transformer.resblocks.{{}}")
    mlp = shape_of(source, f"{in_text}transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    require_agreement(
        source,
        where,
        {
            "text_cfg.width": (text.get("width", int), width),
            "text_cfg.layers": (text.get("layers", int), depth),
            "text_cfg.context_length": (text.get("context_length", int), context),
            "text_cfg.vocab_size": (text.get("vocab_size", int), vocabulary),
        },
    )
    if not config and vocabulary > CLIP_VOCAB_SIZE:
        raise ConvertError(
            f"{source.path}: with a vocabulary of {vocabulary} the token that the text tower pools is unknown; copy "
            f"{CONFIG} beside the weights"
        )
    said = text.positive("heads", int, 8) if config else width // head_width if head_width else None
    heads = choose_heads((options.heads or (0, 0))[1], said, width, depth, "text", where)
    pool = text.get("pool_type", str, "argmax")
    return ClipArch(
        vision,
        TextArch(context, vocabulary, width, depth, heads, mlp, vision.embed_dim, text_activation,
                 # 2 is what OpenCLIP takes where its config names no end token.
                 end_id=text.get("eos_id", int, 2) if pool == "eos" else vocabulary - 1,
                 pool={"eos": "end", "last": "last", "argmax": "argmax"}[pool],
                 causal=not text.get("no_causal_mask", bool, False), norm_eps=_eps(text)),
        logit_bias=f"{prefix}logit_bias" in source.tensors,
    )  # fmt: skip


def vision_arch(source: Source, options: Options, prefix: str = "", activation: str = "", head_width: int = 0) -> VisionArch:
    """The architecture of the vision tower; arguments and errors as of `open_clip_arch`."""
    config = model_config(source)
    where = CONFIG if config else str(source.path)
    vision = config.section("vision_cfg")
    if isinstance(vision.content.get("layers"), list) or f"{prefix}visual.layer1.0.conv1.weight" in source.tensors:
        raise ConvertError(
            f"{source.path}: the vision tower is a ResNet, which is not supported; expected a vision transformer"
        )
    _require_supported(vision, _VISION_ONLY)
    activation = choose_activation(options.activation, activation or _activation(config, vision), where)
    width, _, patch, _ = shape_of(source, f"{prefix}visual.conv1.weight", 4)
    positions = shape_of(source, f"{prefix}visual.positional_embedding", 2)[0]
    side = square_side(source, f"{prefix}visual.positional_embedding", positions - 1)
    depth = rules.count(source.tensors, f"{prefix}visual.transformer.resblocks.{{}}")
    mlp = shape_of(source, f"{prefix}visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0]
    embed_dim = shape_of(source, f"{prefix}visual.proj", 2)[1]
    require_agreement(
        source,
        where,
        {
            "embed_dim": (config.get("embed_dim", int), embed_dim),
            "vision_cfg.width": (vision.get("width", int), width),
            "vision_cfg.layers": (vision.get("layers", int), depth),
            "vision_cfg.patch_size": (vision.get("patch_size", int), patch),
            "vision_cfg.image_size": (vision.get("image_size", int), patch * side),
        },
    )
    if config:
        head_width = vision.positive("head_width", int, 64)
    heads = choose_heads(
        (options.heads or (0, 0))[0], width // head_width if head_width else None, width, depth, "vision", where
    )
    return VisionArch(patch * side, patch, width, depth, heads, mlp, embed_dim, activation, norm_eps=_eps(vision))


def _activation(config: Fields, section: Fields) -> str:
    if not config:
        return ""
    if config.get("quick_gelu", bool, False):
        return "quick_gelu"
    return "gelu_tanh" if section.section("act_kwargs").get("approximate", str) == "tanh" else "gelu"


def _eps(section: Fields) -> float:
    return section.section("norm_kwargs").positive("eps", float, 1e-5)


def preprocess(source: Source, options: Options, arch: ClipArch, preset: str = "") -> Preprocess:
    """The preprocessing: the user's, else that of open_clip_config.json, else the `preset` that the layout implies.

    Raises ConvertError where none of them is given, and for steps that are not supported.
    """
    size, asked, found = options.image_size or arch.vision.image_size, options.preprocess, None
    if not asked:  # a preprocessing that is not supported must not prevent --preprocess
        content = source.config(CONFIG).section("preprocess_cfg")
        found = _stated_preprocess(content, size) if content else None
        asked = "" if found else preset
    return choose_preprocess(asked, found, size, str(source.path))


def _stated_preprocess(config: Fields, image_size: int) -> Preprocess:
    resize, interpolation = config.get("resize_mode", str, "shortest"), config.get("interpolation", str, "bicubic")
    mode = {"shortest": "crop", "squash": "squash"}.get(resize)
    if mode is None or interpolation not in RESAMPLING:
        raise ConvertError(
            f"{config.where}: cannot prepare images that way: resize_mode={resize!r}, interpolation={interpolation!r}; "
            "pass --preprocess to say what to do instead"
        )
    mean, std = config.get("mean", list, OPENAI_MEAN), config.get("std", list, OPENAI_STD)
    return checked_preprocess(image_size, mode, RESAMPLING[interpolation], mean, std, config.where)


LAYOUT = Layout(
    name="open_clip",
    kind="clip",
    detect=lambda source: is_vit(source) and not is_openai(source) and not source.has(ENCODER),
    arch=open_clip_arch,
    rules=lambda source, arch: open_clip_rules(text_prefix(source)),
    preprocess=preprocess,
    export=Export(
        "open_clip",
        lambda source: export_files(source, open_clip_rules(), text_config(source.arch.text)),
        holds=lambda arch: not arch.text.post_norm,
    ),
    weight_files=(
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
    config_files=(CONFIG,),
    precedence=1,
)

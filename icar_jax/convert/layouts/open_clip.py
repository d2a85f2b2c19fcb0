"""OpenCLIP's layout, whose tensor names OpenAI's CLIP and ICAR share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icar_jax.convert import rules
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts.base import (
    Export,
    ExportFiles,
    ExportSource,
    Layout,
    Options,
    Source,
    require_agreement,
    shape_of,
    square_side,
)
from icar_jax.convert.layouts.clip_export import (
    beyond_clip,
    pools_other_than_highest,
    refuse,
    tokenizer_files,
    weights_without_exits,
)
from icar_jax.convert.rules import CONV, SCALAR, TRANSPOSE, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.settings import RESAMPLING, checked_preprocess, choose_activation, choose_heads, choose_preprocess
from icar_jax.data.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from icar_jax.data.tokenizer import CLIP_VOCAB_SIZE
from icar_jax.models import variants
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
    """Rules for OpenAI's and OpenCLIP's names; `text_prefix` is 'text.' for CustomTextCLIP."""
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
    """'text.' for OpenCLIP's CustomTextCLIP, else ''; `prefix` stands before all names of the CLIP."""
    return "text." if source.has(f"{prefix}text.") else ""


def is_vit(source: Source) -> bool:
    """Whether the names are OpenAI's or OpenCLIP's. Raises ConvertError for a vision tower of timm."""
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
    elif head_width:
        said = (width // head_width, text_width // head_width)
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


# --- export ----------------------------------------------------------------------------------------------------------------

_NAMES = {
    "vit_b32": "ViT-B-32", "vit_b16": "ViT-B-16", "vit_l14": "ViT-L-14", "vit_l14_336": "ViT-L-14-336", "vit_h14": "ViT-H-14",
    "vit_g14": "ViT-g-14", "vit_bigg14": "ViT-bigG-14",
}  # fmt: skip


def published_name(arch: ClipArch) -> str:
    """OpenCLIP's name of a published architecture, or '' for one of another size."""
    v, t = arch.vision, arch.text
    for name, known in variants.CLIP.items():
        a, b = known.vision, known.text
        same = all(getattr(a, size) == getattr(v, size) for size in ("image_size", "patch_size", "width", "depth", "heads"))
        if name in _NAMES and same and (b.width, b.depth, b.vocabulary) == (t.width, t.depth, t.vocabulary):
            return _NAMES[name] + ("-quickgelu" if v.activation == "quick_gelu" else "")
    return ""


def _export(source: ExportSource) -> ExportFiles:
    config = _config(source.arch, source.preprocess, source.params)
    leaves, notes = weights_without_exits(source, open_clip_rules())
    words, more_notes = tokenizer_files(source.tokenizer)
    return ExportFiles({"open_clip_model.safetensors": leaves, CONFIG: config, **words}, notes + more_notes)


def _config(arch: ClipArch, preprocess: Preprocess, params: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip_config.json. Raises ConvertError for a model that OpenCLIP's own towers cannot express."""
    v, t = arch.vision, arch.text
    quick = {"quick_gelu" == a for a in (v.activation, t.activation)}
    refuse("open_clip", {
        **beyond_clip(arch), "only one of its towers has quick_gelu": len(quick) > 1,
        f"it resizes images to {preprocess.resize_to} pixels before the crop": preprocess.resize_to > 0,
    })  # fmt: skip
    model: dict[str, Any] = {
        "embed_dim": v.embed_dim,
        "quick_gelu": v.activation == "quick_gelu",
        "vision_cfg": {
            "image_size": v.image_size,
            "layers": v.depth,
            "width": v.width,
            "head_width": v.width // v.heads,
            "patch_size": v.patch_size,
            "mlp_ratio": _ratio(v.mlp_width, v.width),
            **_config_extras(v),
        },
        "text_cfg": {
            "context_length": t.context_length,
            "vocab_size": t.vocabulary,
            "width": t.width,
            "heads": t.heads,
            "layers": t.depth,
            "mlp_ratio": _ratio(t.mlp_width, t.width),
            **_config_extras(t),
        },
    }
    text = model["text_cfg"]
    if not t.causal:
        text["no_causal_mask"] = True
    if t.pool == "last":
        text["pool_type"] = "last"
    elif pools_other_than_highest(t):
        text |= {"pool_type": "eos", "eos_id": t.end_id}
    if arch.logit_bias:
        model["init_logit_bias"] = float(params["logit_bias"])
    images = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash"}[preprocess.resize_mode],
    }
    return {"model_cfg": model, "preprocess_cfg": images}


def _config_extras(tower: VisionArch | TextArch) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if tower.norm_eps != 1e-5:
        extras["norm_kwargs"] = {"eps": tower.norm_eps}
    if tower.activation == "gelu_tanh":
        extras["act_kwargs"] = {"approximate": "tanh"}
    return extras


def _ratio(mlp: int, width: int) -> float:
    """The ratio whose product with `width`, cut to an integer, is `mlp`."""
    return mlp / width if mlp % width == 0 else round((mlp + 0.5) / width, 6)


LAYOUT = Layout(
    name="open_clip",
    kind="clip",
    detect=lambda source: is_vit(source) and not is_openai(source),
    arch=open_clip_arch,
    rules=lambda source, arch: open_clip_rules(text_prefix(source)),
    preprocess=preprocess,
    export=Export("open_clip", _export),
    weight_files=(
        "open_clip_model.safetensors",
        "open_clip_pytorch_model.safetensors",
        "open_clip_pytorch_model.bin",
    ),
    config_files=(CONFIG,),
    precedence=1,
)

"""Hugging Face's CLIPModel; the reading of config.json and the names that SiglipModel shares with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
from icar_jax.convert.layouts.clip_export import beyond_clip, refuse
from icar_jax.convert.layouts.hf_export import export_files, text_config, tower_config
from icar_jax.convert.rules import CONV, QKV_BIAS, QKV_WEIGHT, SCALAR, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.settings import choose_activation, choose_heads, choose_preprocess, hf_preprocess
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import CLIP_END_ID
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

CONFIG, PREPROCESSORS = "config.json", ("preprocessor_config.json", "processor_config.json")
BLOCK: list[Rule] = [
    *norm("layer_norm1", "ln1"),
    rule([f"self_attn.{part}_proj.weight" for part in "qkv"], "attn/qkv/kernel", QKV_WEIGHT),
    rule([f"self_attn.{part}_proj.bias" for part in "qkv"], "attn/qkv/bias", QKV_BIAS),
    *linear("self_attn.out_proj", "attn/out"),
    *norm("layer_norm2", "ln2"),
    *linear("mlp.fc1", "mlp/fc1"),
    *linear("mlp.fc2", "mlp/fc2"),
]
ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
# The library's defaults for fields that a config lacks.
CLIP_TEXT = {"num_attention_heads": 8, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
CLIP_VISION = {"num_attention_heads": 12, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}


def is_siglip(source: Source) -> bool:
    """Whether a source with these names has SigLIP's heads."""
    return "vision_model.head.probe" in source.tensors or "text_model.head.weight" in source.tensors


def has_towers(source: Source) -> bool:
    """Whether the names are those of a CLIPModel or a SiglipModel; a tower alone has no temperature."""
    found = [source.has(f"{tower}_model.") for tower in ("vision", "text")]
    return all(found) or (any(found) and "logit_scale" in source.tensors)


def tower_rules() -> list[Rule]:
    """Rules for the names that CLIPModel and SiglipModel share."""
    return [*prefixed(vision_rules(), "vision_model."), *prefixed(text_rules(), "text_model.")]


def vision_rules() -> list[Rule]:
    """Rules for the names, without a prefix, that the vision towers of CLIP and SigLIP share."""
    return [
        rule("embeddings.patch_embedding.weight", "vision/patch/kernel", CONV),
        rule("embeddings.position_embedding.weight", "vision/pos"),
        *prefixed(BLOCK, "encoder.layers.{}.", "vision/blocks/{}/"),
        *norm("post_layernorm", "vision/ln_post"),
        dropped("embeddings.position_ids", "0, 1, 2, ..."),
    ]


def text_rules() -> list[Rule]:
    """Rules for the names, without a prefix, that the text towers of CLIP and SigLIP share."""
    return [
        rule("embeddings.token_embedding.weight", "text/embed"),
        rule("embeddings.position_embedding.weight", "text/pos"),
        *prefixed(BLOCK, "encoder.layers.{}.", "text/blocks/{}/"),
        *norm("final_layer_norm", "text/ln_final"),
        dropped("embeddings.position_ids", "0, 1, 2, ..."),
    ]


def clip_vision_rules() -> list[Rule]:
    """Rules for the names, without a prefix, of CLIP's vision tower."""
    return [*vision_rules(), rule("embeddings.class_embedding", "vision/cls"), *norm("pre_layrnorm", "vision/ln_pre")]


def clip_rules() -> list[Rule]:
    """Rules for the names of a CLIPModel."""
    return [
        *prefixed(clip_vision_rules(), "vision_model."),
        *prefixed(text_rules(), "text_model."),
        *linear("visual_projection", "vision/proj", bias=False),
        *linear("text_projection", "text/proj", bias=False),
        rule("logit_scale", "logit_scale", SCALAR),
    ]


@dataclass(frozen=True)
class Towers:
    """Settings that CLIP and SigLIP share."""

    vision: dict[str, Any]  # arguments of VisionArch
    text: dict[str, Any]  # arguments of TextArch
    text_fields: Fields


def config_fields(source: Source, model_type: str) -> Fields:
    """The content of config.json. Raises ConvertError where it is missing or describes another kind of model."""
    if CONFIG not in source.configs:
        raise ConvertError(
            f"{source.path}: there is no config.json beside {source.weights.path.name}, so heads and activation are unknown; "
            "copy the whole folder"
        )
    config = source.config(CONFIG)
    found = config.get("model_type", str, model_type)
    if found != model_type:
        raise ConvertError(
            f"{source.path}: config.json describes a {found!r} model, whose towers may compute otherwise under the same names; "
            "supported are 'clip' and 'siglip'"
            + (" (SigLIP 2 with variable resolution, NaFlex, is not)" if found == "siglip2" else "")
        )
    return config


def read_towers(
    source: Source,
    options: Options,
    model_type: str,
    *,
    class_token: bool,
    embed: str,
    defaults: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> Towers:
    """Sizes from shapes; heads, activations and epsilons from config.json.

    `embed` names the matrix whose rows are the embedding's dimensions; `defaults` are the library's (vision, text).
    Raises ConvertError where something is missing, of a wrong type, contradictory or unsupported.
    """
    config = config_fields(source, model_type)
    vision, text = (section(config, name, d) for name, d in zip(("vision_config", "text_config"), defaults))
    embed_dim = shape_of(source, embed, 2)[0]
    asked = options.heads or (0, 0)
    return Towers(
        {**vision_sizes(source, options, vision, "vision_model.", class_token, asked[0]), "embed_dim": embed_dim},
        {**text_sizes(source, options, text, "text_model.", asked[1]), "embed_dim": embed_dim},
        text,
    )


def vision_sizes(
    source: Source, options: Options, config: Fields, prefix: str, class_token: bool, heads: int
) -> dict[str, Any]:
    """Arguments of VisionArch but `embed_dim`, for names that begin with `prefix`; `config` is the tower's configuration.

    Raises ConvertError where something is missing, of a wrong type, contradictory or unsupported.
    """
    width, _, patch, _ = shape_of(source, f"{prefix}embeddings.patch_embedding.weight", 4)
    positions = shape_of(source, f"{prefix}embeddings.position_embedding.weight", 2)[0]
    side = square_side(source, f"{prefix}embeddings.position_embedding.weight", positions - class_token)
    pixels = config.positive("image_size", int)
    sizes = {
        "patch_size": (config.get("patch_size", int), patch),
        # A picture that is no multiple of the patch loses its last rows: SigLIP's 384 pixels are 27 patches of 14.
        "image_size // patch_size": (pixels and pixels // patch, side),
    }
    blocks = _block_sizes(source, options, config, prefix, width, ("vision", heads), sizes)
    return {"image_size": patch * side, "patch_size": patch, **blocks}


def text_sizes(source: Source, options: Options, config: Fields, prefix: str, heads: int) -> dict[str, Any]:
    """Arguments of TextArch but `embed_dim` and the pooling; as `vision_sizes`."""
    vocabulary, width = shape_of(source, f"{prefix}embeddings.token_embedding.weight", 2)
    context = shape_of(source, f"{prefix}embeddings.position_embedding.weight", 2)[0]
    sizes = {
        "max_position_embeddings": (config.get("max_position_embeddings", int), context),
        "vocab_size": (config.get("vocab_size", int), vocabulary),
    }
    blocks = _block_sizes(source, options, config, prefix, width, ("text", heads), sizes)
    return {"context_length": context, "vocabulary": vocabulary, **blocks}


def _block_sizes(
    source: Source, options: Options, config: Fields, prefix: str, width: int, tower: tuple[str, int],
    sizes: dict[str, tuple[Any, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Arguments that both towers have; `tower` is its name and the number of heads that the user gives."""
    activation = _activation(config)
    choose_activation(options.activation, activation, config.where)
    depth = rules.count(source.tensors, f"{prefix}encoder.layers.{{}}")
    mlp = shape_of(source, f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0]
    sizes |= {
        "hidden_size": (config.get("hidden_size", int), width),
        "num_hidden_layers": (config.get("num_hidden_layers", int), depth),
        "intermediate_size": (config.get("intermediate_size", int), mlp),
    }  # fmt: skip
    place = config.where.removeprefix(CONFIG).removeprefix(": ")
    require_agreement(source, CONFIG, {f"{place}.{name}" if place else name: pair for name, pair in sizes.items()})
    name, asked = tower
    heads = choose_heads(asked, config.positive("num_attention_heads", int), width, depth, name, config.where)
    return {
        "width": width, "depth": depth, "heads": heads, "mlp_width": mlp, "activation": activation,
        "norm_eps": config.positive("layer_norm_eps", float),
    }  # fmt: skip


def _activation(section: Fields) -> str:
    """`hidden_act` by our name. Raises ConvertError for one that no tower here has."""
    name = section.get("hidden_act", str)
    if name not in ACTIVATIONS:
        raise ConvertError(f"{section.where}: hidden_act {name!r} is not supported; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def section(config: Fields, name: str, defaults: Mapping[str, Any]) -> Fields:
    """One tower's configuration: `defaults`, overridden by `name`, overridden by the older `name_dict` with its defaults."""
    old, new = config.section(f"{name}_dict"), config.section(name)
    known = lambda fields: {key: value for key, value in fields.content.items() if value is not None}
    merged = {**defaults, **known(new), **({**defaults, **known(old)} if old else {})}
    return Fields(f"{CONFIG}: {name}", merged)


def clip_arch(source: Source, options: Options) -> ClipArch:
    """The architecture of a CLIPModel. Raises ConvertError where something is missing, contradictory or unsupported."""
    towers = read_towers(
        source, options, "clip", class_token=True, embed="visual_projection.weight", defaults=(CLIP_VISION, CLIP_TEXT)
    )
    text = TextArch(**towers.text, **end_token(towers.text_fields, towers.text["vocabulary"]))
    return ClipArch(VisionArch(**towers.vision), text)


def end_token(text: Fields, vocabulary: int) -> dict[str, Any]:
    """The arguments `end_id` and `pool` of a TextArch. Raises ConvertError for a token outside the vocabulary."""
    value = text.content.get("eos_token_id")
    if isinstance(value, list) and len(value) == 1:
        end = Fields(text.where, {"eos_token_id": value[0]}).get("eos_token_id", int)
    else:
        end = text.get("eos_token_id", int, CLIP_END_ID)
    if end == 2:  # the first configs have 2 here, before the field was used; the library then pools the highest id
        return {"end_id": vocabulary - 1, "pool": "argmax"}
    if not 0 <= end < vocabulary:
        raise ConvertError(f"{text.where}: eos_token_id {end} lies outside the vocabulary of {vocabulary}")
    return {"end_id": end, "pool": "end"}


def preprocess(source: Source, options: Options, arch: ClipArch | VisionArch) -> Preprocess:
    """The preprocessing: the user's, else that of preprocessor_config.json (or processor_config.json).

    Raises ConvertError where neither is given, and for steps that are not supported.
    """
    size = options.image_size or getattr(arch, "vision", arch).image_size
    config = source.config(CONFIG)
    pixels = (section(config, "vision_config", {}) or config).positive("image_size", int)
    if pixels and not options.image_size:
        size = pixels  # SigLIP at 384 pixels with patches of 14: the convolution leaves the last 6 out
    # A preprocessing that is not supported must not prevent --preprocess.
    stated = next((name for name in PREPROCESSORS if name in source.configs), None) if not options.preprocess else None
    found = hf_preprocess(source.config(stated)) if stated else None
    return choose_preprocess(options.preprocess, found, size, str(source.path))


# --- export ----------------------------------------------------------------------------------------------------------------


def _export(source: ExportSource) -> ExportFiles:
    return export_files(source, _config(source.arch), clip_rules())


def _config(arch: ClipArch) -> dict[str, Any]:
    """config.json of a CLIPModel. Raises ConvertError for a model that is none."""
    v, t = arch.vision, arch.text
    refuse("hf", {**beyond_clip(arch), "it has a logit bias": arch.logit_bias, "its text tower is not causal": not t.causal,
                  "it pools the last place": t.pool == "last"})  # fmt: skip
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": v.embed_dim,
        "logit_scale_init_value": 2.6592,
        # 2 means the highest id, as in the configs of the first releases.
        "text_config": {**tower_config("clip_text_model", t), **text_config(t), "projection_dim": t.embed_dim,
                        "eos_token_id": t.end_id if t.pool == "end" else 2},
        "vision_config": {**tower_config("clip_vision_model", v), "projection_dim": v.embed_dim, "image_size": v.image_size,
                          "patch_size": v.patch_size},
    }  # fmt: skip


LAYOUT = Layout(
    name="hf_clip",
    kind="clip",
    detect=lambda source: has_towers(source) and not is_siglip(source),
    arch=clip_arch,
    rules=lambda source, arch: clip_rules(),
    preprocess=preprocess,
    export=Export("hf", _export, holds=lambda arch: arch.vision.head != "map"),
    config_files=(CONFIG, *PREPROCESSORS),
    precedence=3,
)

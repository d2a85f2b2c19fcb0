"""Hugging Face's ViTModel, alone or below a classifier, and what DINOv2's files share with it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts.base import (
    TOWER_OPTIONS,
    Details,
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
from icar_jax.convert.layouts.clip_export import beyond_tower, refuse
from icar_jax.convert.layouts.hf import ACTIVATIONS, CONFIG, PREPROCESSORS
from icar_jax.convert.layouts.hf_export import preprocessor, tower_config
from icar_jax.convert.rules import CONV, QKV_BIAS, QKV_WEIGHT, ROW, ROWS, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.settings import choose_activation, choose_heads, choose_preprocess, hf_preprocess
from icar_jax.data.images import Preprocess
from icar_jax.models.vision import VisionArch

PATCHES = "embeddings.patch_embeddings.projection.weight"
_PREFIXES = ("", "vit.", "dinov2.", "dinov2_with_registers.")  # of the tower below a classifier
ATTENTION: list[Rule] = [
    rule([f"attention.attention.{part}.weight" for part in ("query", "key", "value")], "attn/qkv/kernel", QKV_WEIGHT),
    rule([f"attention.attention.{part}.bias" for part in ("query", "key", "value")], "attn/qkv/bias", QKV_BIAS),
]
_BLOCK: list[Rule] = [
    *norm("layernorm_before", "ln1"),
    *ATTENTION,
    *linear("attention.output.dense", "attn/out"),
    *norm("layernorm_after", "ln2"),
    *linear("intermediate.dense", "mlp/fc1"),
    *linear("output.dense", "mlp/fc2"),
]
_LEFT_OUT = {
    "pooler.dense": "the pooler",
    "classifier": "the classifier",
    "embeddings.mask_token": "the token of masked patches",
}


def prefix_of(source: Source) -> str | None:
    """The prefix of the tower's names; None where there is no tower."""
    return next((prefix for prefix in _PREFIXES if source.has(f"{prefix}embeddings.patch_embeddings.projection.")), None)


def bare_rules(block: list[Rule]) -> list[Rule]:
    """Rules for the names of a tower with these blocks."""
    tower = [
        rule("embeddings.cls_token", "cls", ROW),
        rule("embeddings.position_embeddings", "pos", ROWS),
        rule(PATCHES, "patch/kernel", CONV),
        rule("embeddings.patch_embeddings.projection.bias", "patch/bias"),
        *prefixed(block, "encoder.layer.{}.", "blocks/{}/"),
        *norm("layernorm", "ln_post"),
    ]
    return prefixed(tower, "", "vision/")


def tower_rules(source: Source, tower: list[Rule]) -> list[Rule]:
    """The rules of a tower, alone or below a classifier, which is left out."""
    prefix = prefix_of(source) or ""
    names = {place + name for name in _LEFT_OUT for place in ("", prefix)}
    left_out = sorted(name + end for name in names for end in ("", ".weight", ".bias"))
    return [*prefixed(tower, prefix), *(dropped(name, "no part of the tower") for name in left_out)]


def details(source: Source, options: Options) -> Details:
    """Notes on what is left out, and on a preprocessing for another size than the positions'."""
    notes = [f"left out: {what}" for name, what in _LEFT_OUT.items() if any(name in key for key in source.tensors)]
    _, _, patch, side = _grid(source)
    stated = _stated(source, options)
    if stated is not None and not options.image_size and stated.image_size != patch * side:
        notes.append(
            f"the position embeddings are those of {patch * side} pixels, which the tower takes; transformers prepares "
            f"{stated.image_size} and resizes the positions in every call (--image-size {stated.image_size} does it once)"
        )
    return Details(notes=notes)


def _grid(source: Source) -> tuple[int, int, int, int]:
    """(width, blocks, patch size in pixels, patches per side)."""
    prefix = prefix_of(source) or ""
    width, _, patch, _ = shape_of(source, prefix + PATCHES, 4)
    positions = shape_of(source, f"{prefix}embeddings.position_embeddings", 3)[1]
    side = square_side(source, f"{prefix}embeddings.position_embeddings", positions - 1)
    return width, engine.count(source.tensors, f"{prefix}encoder.layer.{{}}"), patch, side


def config_of(source: Source, *types: str) -> Fields:
    """The content of config.json. Raises ConvertError where it is missing or describes another kind of model."""
    if CONFIG not in source.configs:
        raise ConvertError(
            f"{source.path}: there is no config.json, so heads and activation are unknown; copy the whole folder"
        )
    config = source.config(CONFIG)
    found = config.get("model_type", str, "")
    if found not in types:
        raise ConvertError(
            f"{source.path}: config.json describes a {found!r} model, whose tower may compute otherwise under the same names; "
            f"expected {' or '.join(map(repr, types))}"
        )
    return config


def tower_arch(source: Source, options: Options, config: Fields, mlp: int, eps: float, **more: Any) -> VisionArch:
    """The architecture of a tower with hidden width `mlp`; `eps` is the library's default, `more` further fields.

    Raises ConvertError where something is missing, contradictory or unsupported.
    """
    width, depth, patch, side = _grid(source)
    if not config.get("qkv_bias", bool, True):
        raise ConvertError(f"{config.where}: qkv_bias=false is not supported")
    if config.get("hidden_act", str, "gelu") not in ACTIVATIONS:
        raise ConvertError(
            f"{config.where}: hidden_act {config.content['hidden_act']!r} is not supported; expected {', '.join(ACTIVATIONS)}"
        )
    pixels = config.positive("image_size", int)
    require_agreement(
        source,
        CONFIG,
        {
            "hidden_size": (config.get("hidden_size", int), width),
            "num_hidden_layers": (config.get("num_hidden_layers", int), depth),
            "patch_size": (config.get("patch_size", int), patch),
            "image_size // patch_size": (pixels and pixels // patch, side),
        },
    )
    asked = options.heads[0] if options.heads else 0
    heads = choose_heads(asked, config.positive("num_attention_heads", int), width, depth, "vision", config.where)
    activation = choose_activation(options.activation, ACTIVATIONS[config.get("hidden_act", str, "gelu")], config.where)
    eps = config.positive("layer_norm_eps", float, eps)
    return VisionArch(
        patch * side, patch, width, depth, heads, mlp, width, activation, patch_bias=True, pre_norm=False, norm_eps=eps,
        exit_eps=eps, projection="none", **more,
    )  # fmt: skip


def _stated(source: Source, options: Options) -> Preprocess | None:
    """The preprocessing beside the weights; None where the user gives one or there is none."""
    file = next((name for name in PREPROCESSORS if name in source.configs), None)
    return hf_preprocess(source.config(file)) if file and not options.preprocess else None


def preprocess(source: Source, options: Options, arch: VisionArch) -> Preprocess:
    """The preprocessing: the user's, else that of preprocessor_config.json, at the tower's size.

    Raises ConvertError where neither is given, and for steps that are not supported.
    """
    size = options.image_size or arch.image_size
    return choose_preprocess(options.preprocess, _stated(source, options), size, str(source.path))


def _arch(source: Source, options: Options) -> VisionArch:
    config, prefix = config_of(source, "vit"), prefix_of(source) or ""
    mlp = shape_of(source, f"{prefix}encoder.layer.0.intermediate.dense.weight", 2)[0]
    require_agreement(source, CONFIG, {"intermediate_size": (config.get("intermediate_size", int), mlp)})
    return tower_arch(source, options, config, mlp, 1e-12)


# --- export ----------------------------------------------------------------------------------------------------------------


def tower_files(
    source: ExportSource, rules: list[Rule], config: Mapping[str, Any], wrong: Mapping[str, bool] = MappingProxyType({})
) -> ExportFiles:
    """A Hugging Face folder of a bare tower; `config` are the fields of config.json besides those of every tower.

    Raises ConvertError for a tower that is not bare, or for further reasons in `wrong`, as of `clip_export.refuse`.
    """
    arch = source.arch
    refuse("hf", beyond_tower(arch) | {
        "it has no class token": not arch.class_token, "it does not pool the class token": arch.head != "cls",
        "its patch embedding has no bias": not arch.patch_bias, "it has a norm before the blocks": arch.pre_norm, **wrong,
    })  # fmt: skip
    common = {**tower_config("", arch), "image_size": arch.image_size, "patch_size": arch.patch_size, "qkv_bias": True}
    files: dict[str, Any] = {
        "model.safetensors": engine.export_weights(source.params, rules, source.where),
        CONFIG: {**common, **config},
        PREPROCESSORS[0]: preprocessor(source.preprocess, "ViTImageProcessor", "BitImageProcessor"),
    }
    return ExportFiles(files)


def _export(source: ExportSource) -> ExportFiles:
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    made = tower_files(source, bare_rules(_BLOCK), config)
    return ExportFiles(
        made.files, ["no pooler was written: open it with ViTModel.from_pretrained(..., add_pooling_layer=False)"]
    )


LAYOUT = Layout(
    name="hf_vit",
    kind="vision",
    detect=lambda source: source.has(f"{prefix_of(source)}encoder.layer.0.layernorm_before."),
    arch=_arch,
    rules=lambda source, arch: tower_rules(source, bare_rules(_BLOCK)),
    preprocess=preprocess,
    details=details,
    antialiased=lambda arch: False,
    export=Export("hf", _export, holds=lambda arch: not arch.registers and arch.ffn == "mlp"),
    options=TOWER_OPTIONS,
    config_files=(CONFIG, *PREPROCESSORS),
    precedence=2,
)

"""One tower of CLIP or SigLIP as Hugging Face stores it alone: CLIPVisionModel, CLIPTextModel, SiglipVisionModel,
SiglipTextModel, and CLIP's ...WithProjection. Older versions put `vision_model.` or `text_model.` before the names."""

from __future__ import annotations

from typing import Any

from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts import hf, siglip
from icar_jax.convert.layouts.base import (
    TOWER_OPTIONS,
    Export,
    ExportFiles,
    ExportSource,
    Layout,
    Options,
    Source,
    shape_of,
)
from icar_jax.convert.layouts.clip_export import beyond_vit, refuse, several_blocks, tokenizer_files
from icar_jax.convert.layouts.hf_export import preprocessor, text_config, tower_config
from icar_jax.convert.rules import Rule, linear, prefixed
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

_MARKS = {"vision": "embeddings.patch_embedding.weight", "text": "embeddings.token_embedding.weight"}
_TYPES = {
    ("vision", False): "clip_vision_model", ("vision", True): "siglip_vision_model",
    ("text", False): "clip_text_model", ("text", True): "siglip_text_model",
}  # fmt: skip  # {(tower, whether it is SigLIP's): model_type}


def _prefix(source: Source, tower: str) -> str | None:
    """The prefix of the tower's names; None where it is not there."""
    return next((prefix for prefix in (f"{tower}_model.", "") if prefix + _MARKS[tower] in source.tensors), None)


def _is_alone(source: Source, tower: str) -> bool:
    other = "text" if tower == "vision" else "vision"
    return _prefix(source, tower) is not None and not source.has(f"{other}_model.", "logit_scale")


def _is_siglip(source: Source, tower: str) -> bool:
    prefix = _prefix(source, tower) or ""
    if tower == "text":
        return f"{prefix}head.weight" in source.tensors
    return f"{prefix}embeddings.class_embedding" not in source.tensors


def _config(source: Source, tower: str) -> Fields:
    """The tower's configuration, alone or a section of a whole model's. Raises ConvertError for one of another kind."""
    is_siglip = _is_siglip(source, tower)
    wanted, whole = _TYPES[tower, is_siglip], "siglip" if is_siglip else "clip"
    if hf.CONFIG not in source.configs:
        raise ConvertError(
            f"{source.path}: there is no config.json, so heads and activation are unknown; copy the whole folder"
        )
    config = source.config(hf.CONFIG)
    found = config.get("model_type", str, "")
    if found not in (wanted, whole):
        raise ConvertError(
            f"{source.path}: config.json describes a {found!r} model, whose towers may compute otherwise under the same names; "
            f"expected {wanted!r}"
        )
    usual = siglip.DEFAULTS if is_siglip else hf.CLIP_VISION if tower == "vision" else hf.CLIP_TEXT
    if found == whole:
        return hf.section(config, f"{tower}_config", usual)
    stated = {key: value for key, value in config.content.items() if value is not None}
    return Fields(hf.CONFIG, {**usual, **stated})


def _vision_arch(source: Source, options: Options) -> VisionArch:
    config, prefix, is_siglip = _config(source, "vision"), _prefix(source, "vision") or "", _is_siglip(source, "vision")
    if is_siglip and f"{prefix}head.probe" not in source.tensors:
        raise ConvertError(
            f"{source.path}: the tower has no attention-pool head (vision_use_head false), which is not supported"
        )
    heads = options.heads[0] if options.heads else 0
    sizes = hf.vision_sizes(source, options, config, prefix, not is_siglip, heads)
    if is_siglip:
        return VisionArch(**sizes, embed_dim=sizes["width"], **siglip.VISION)
    return VisionArch(**sizes, **_space(source, "visual_projection.weight", sizes["width"]))


def _space(source: Source, name: str, width: int) -> dict[str, Any]:
    """`embed_dim` and `projection` of a tower of CLIP, with a projection or without."""
    if name not in source.tensors:
        return {"embed_dim": width, "projection": "none"}
    return {"embed_dim": shape_of(source, name, 2)[0]}


def _vision_rules(source: Source, arch: VisionArch | None) -> list[Rule]:
    tower = siglip.vision_rules() if _is_siglip(source, "vision") else hf.clip_vision_rules()
    projection = linear("visual_projection", "vision/proj", bias=False)
    return [*prefixed(tower, _prefix(source, "vision") or ""), *projection]


def _text_arch(source: Source, options: Options) -> TextArch:
    config, prefix, is_siglip = _config(source, "text"), _prefix(source, "text") or "", _is_siglip(source, "text")
    sizes = hf.text_sizes(source, options, config, prefix, 0)
    if is_siglip:
        return TextArch(**sizes, embed_dim=shape_of(source, f"{prefix}head.weight", 2)[0], **siglip.TEXT)
    end = hf.end_token(config, sizes["vocabulary"])
    return TextArch(**sizes, **_space(source, "text_projection.weight", sizes["width"]), **end)


def _text_rules(source: Source, arch: TextArch | None) -> list[Rule]:
    tower = siglip.text_rules() if _is_siglip(source, "text") else hf.text_rules()
    return [*prefixed(tower, _prefix(source, "text") or ""), *linear("text_projection", "text/proj", bias=False)]


# --- export ----------------------------------------------------------------------------------------------------------------


def _holds_vision(arch: VisionArch) -> bool:
    return arch.head == "map" or (arch.pre_norm and not arch.patch_bias)


def _export_vision(source: ExportSource) -> ExportFiles:
    arch: VisionArch = source.arch
    is_siglip, bare = arch.head == "map", arch.projection == "none"
    refuse("hf", beyond_vit(arch) | {
        f"it has early exits, after {', '.join(map(str, arch.exits))} blocks": bool(arch.exits),
        f"it merges patch tokens between blocks (merge={arch.merge})": any(arch.merge),
        f"it has the projection {arch.projection!r}": arch.projection not in ("linear", "none"),
        "it has no class token": not (is_siglip or arch.class_token),
        f"it pools {arch.head!r}": arch.head not in ("cls", "map"),
        "its parts are not SigLIP's": is_siglip and (arch.class_token or arch.pre_norm or not arch.patch_bias),
    })  # fmt: skip
    tower = siglip.vision_rules() if is_siglip else hf.clip_vision_rules()
    rules = [*prefixed(tower, "vision_model."), *linear("visual_projection", "vision/proj", bias=False)]
    name = "SiglipVisionModel" if is_siglip else "CLIPVisionModel" + ("" if bare else "WithProjection")
    config = {
        **tower_config(_TYPES["vision", is_siglip], arch), "architectures": [name], "patch_size": arch.patch_size,
        "image_size": source.preprocess.image_size if is_siglip else arch.image_size, "projection_dim": arch.embed_dim,
    }  # fmt: skip
    return ExportFiles({
        "model.safetensors": engine.export_weights(source.params, rules, source.where), hf.CONFIG: config,
        hf.PREPROCESSORS[0]: preprocessor(source.preprocess, "SiglipImageProcessor" if is_siglip else "CLIPImageProcessor"),
    })  # fmt: skip


def _export_text(source: ExportSource) -> ExportFiles:
    arch: TextArch = source.arch
    is_siglip = arch.pool == "last"
    refuse("hf", {
        **several_blocks(arch),
        "its text tower is a BERT, with norms after the residuals": arch.post_norm,
        f"it has the projection {arch.projection!r}": arch.projection not in ("linear", "none"),
        "it is not causal": not (is_siglip or arch.causal),
        f"it pools {arch.pool!r}": arch.pool not in ("end", "argmax", "last"),
        "its parts are not SigLIP's": is_siglip and (arch.causal or not arch.proj_bias),
        "its projection has a bias": not is_siglip and arch.proj_bias,
    })  # fmt: skip
    tower = siglip.text_rules() if is_siglip else hf.text_rules()
    rules = [*prefixed(tower, "text_model."), *linear("text_projection", "text/proj", bias=False)]
    name = "SiglipTextModel" if is_siglip else "CLIPTextModel" + ("" if arch.projection == "none" else "WithProjection")
    space = {"projection_size": arch.embed_dim} if is_siglip else {
        "projection_dim": arch.embed_dim, "eos_token_id": arch.end_id if arch.pool == "end" else 2
    }  # fmt: skip
    config = {**tower_config(_TYPES["text", is_siglip], arch), **text_config(arch), **space, "architectures": [name]}
    words, notes = tokenizer_files(source, arch, config=True)
    leaves = engine.export_weights(source.params, rules, source.where)
    return ExportFiles({"model.safetensors": leaves, hf.CONFIG: config, **words}, notes)


VISION = Layout(
    name="hf_vision",
    kind="vision",
    detect=lambda source: _is_alone(source, "vision"),
    arch=_vision_arch,
    rules=_vision_rules,
    preprocess=hf.preprocess,
    antialiased=lambda arch: False,
    export=Export("hf", _export_vision, holds=_holds_vision),
    options=TOWER_OPTIONS,
    config_files=(hf.CONFIG, *hf.PREPROCESSORS),
    precedence=4,
)
TEXT = Layout(
    name="hf_text",
    kind="text",
    detect=lambda source: _is_alone(source, "text"),
    arch=_text_arch,
    rules=_text_rules,
    export=Export("hf", _export_text),
    options=frozenset({"activation", "tokenizer"}),
    config_files=(hf.CONFIG,),
    precedence=4,
)

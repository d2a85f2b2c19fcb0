"""The files of an OpenCLIP folder: a CLIP of its own towers, or with a text encoder of transformers."""

from __future__ import annotations

from typing import Any

from icar_jax.convert.layouts.base import ExportFiles, ExportSource
from icar_jax.convert.layouts.clip_export import (
    beyond_image_tower,
    pools_other_than_highest,
    refuse,
    several_blocks,
    tokenizer_files,
    weights_without_exits,
)
from icar_jax.convert.rules import Rule
from icar_jax.models import variants
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

CONFIG = "open_clip_config.json"
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


def export_files(source: ExportSource, rules: list[Rule], text: dict[str, Any]) -> ExportFiles:
    """An OpenCLIP folder; `text` is the section `text_cfg` of its config.

    Raises ConvertError for an image tower that OpenCLIP's own cannot express.
    """
    config = _config(source, text)
    leaves, notes = weights_without_exits(source, rules)
    words, more_notes = tokenizer_files(source, source.arch.text, config=source.arch.text.post_norm)
    return ExportFiles({"open_clip_model.safetensors": leaves, CONFIG: config, **words}, notes + more_notes)


def _config(source: ExportSource, text: dict[str, Any]) -> dict[str, Any]:
    arch, preprocess = source.arch, source.preprocess
    v, t = arch.vision, arch.text
    quick = {"quick_gelu" == a for a in (v.activation, t.activation)}
    refuse("open_clip", {
        **beyond_image_tower(v), "its text projection has a bias": t.proj_bias,
        "only one of its towers has quick_gelu": len(quick) > 1 and not t.post_norm,
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
        "text_cfg": text,
    }
    if arch.logit_bias:
        model["init_logit_bias"] = float(source.params["logit_bias"])
    images = {
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": {"crop": "shortest", "squash": "squash"}[preprocess.resize_mode],
    }
    return {"model_cfg": model, "preprocess_cfg": images}


def text_config(text: TextArch) -> dict[str, Any]:
    """`text_cfg` of OpenCLIP's own text tower. Raises ConvertError for a projection that it cannot have."""
    projected = {f"its text tower has the projection {text.projection!r}": text.projection != "linear"}
    refuse("open_clip", projected | several_blocks(text))
    config: dict[str, Any] = {
        "context_length": text.context_length,
        "vocab_size": text.vocabulary,
        "width": text.width,
        "heads": text.heads,
        "layers": text.depth,
        "mlp_ratio": _ratio(text.mlp_width, text.width),
        **_config_extras(text),
    }
    if not text.causal:
        config["no_causal_mask"] = True
    if text.pool == "last":
        config["pool_type"] = "last"
    elif pools_other_than_highest(text):
        config |= {"pool_type": "eos", "eos_id": text.end_id}
    return config


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

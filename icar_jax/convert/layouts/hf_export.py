"""The files of a Hugging Face folder that CLIPModel and SiglipModel share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icar_jax.convert.layouts.base import ExportFiles, ExportSource
from icar_jax.convert.layouts.clip_export import tokenizer_files, weights_without_exits
from icar_jax.convert.rules import Rule
from icar_jax.data.images import Preprocess
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def export_files(
    source: ExportSource, config: Mapping[str, Any], rules: list[Rule], processor: str = "CLIPImageProcessor"
) -> ExportFiles:
    """A Hugging Face folder with `config` as config.json; `processor` is the image processor for uncropped images."""
    leaves, notes = weights_without_exits(source, rules)
    files: dict[str, Any] = {
        "model.safetensors": leaves,
        "config.json": config,
        "preprocessor_config.json": preprocessor(source.preprocess, processor),
    }
    words, more_notes = tokenizer_files(source, source.arch.text, config=True)
    return ExportFiles(files | words, notes + more_notes)


def tower_config(model_type: str, tower: VisionArch | TextArch) -> dict[str, Any]:
    """Fields of config.json that every tower has."""
    return {
        "model_type": model_type,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": _ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def text_config(text: TextArch) -> dict[str, Any]:
    """Fields of config.json that every text tower has besides."""
    return {"vocab_size": text.vocabulary, "max_position_embeddings": text.context_length}


def preprocessor(preprocess: Preprocess, processor: str, cropping: str = "CLIPImageProcessor") -> dict[str, Any]:
    """preprocessor_config.json; `cropping` is the image processor for cropped images, `processor` for others."""
    side = preprocess.image_size
    square = {"height": side, "width": side}
    crop = preprocess.resize_mode == "crop"
    return {
        "image_processor_type": cropping if crop else processor,
        "do_resize": True,
        "size": {"shortest_edge": preprocess.shortest_side} if crop else square,
        "resample": _RESAMPLING[preprocess.interpolation],
        "do_center_crop": crop,
        **({"crop_size": square} if crop else {}),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
        "do_convert_rgb": True,
    }

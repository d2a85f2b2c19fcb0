"""Runs vision towers in PyTorch, as transformers and timm build them; functions as of `reference_models`.

`features` are what the tower gives after its last norm: the class token's, or for timm what it pools.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.parity.reference_inputs import ReferenceRequest, nchw, noise
from icar_jax.convert.parity.reference_models import Run
from icar_jax.convert.parity.reference_reading import (
    class_of,
    load_strictly,
    load_transformers,
    read_state_dict,
    refuse_options,
    require_stated,
)
from icar_jax.convert.source import Source

_CLASSES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "vit": "ViTModel"}
_MAY_LACK = ("pooler.", "mask_token")  # parts of the library's models that no output here depends on


def run_transformers_vision(torch: ModuleType, transformers: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    refuse_options(source, asked, "config.json describes the tower", "model_name", "exits", "heads")
    kind = class_of(source, _CLASSES)
    model = load_transformers(transformers, source, _CLASSES, _MAY_LACK)
    config = model.config
    stated = {"gelu_pytorch_tanh": "gelu_tanh"}.get(config.hidden_act, config.hidden_act)
    require_stated(source, asked, "config.json", stated, ())
    images = noise(asked, asked.image_size or config.image_size)
    more = {"interpolate_pos_encoding": True} if kind == "vit" else {}  # the others always resize positions
    tokens = model(pixel_values=nchw(torch, images), **more).last_hidden_state
    return {"images": images, "features": tokens[:, 0]}, {"class": type(model).__name__, "activation": config.hidden_act}


def run_lone_vision(torch: ModuleType, transformers: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    """The vision tower of a CLIP or a SigLIP alone."""
    refuse_options(source, asked, "config.json describes the tower", "model_name", "exits", "heads")
    projected = "visual_projection.weight" in source.tensors
    classes = {
        "clip_vision_model": "CLIPVisionModelWithProjection" if projected else "CLIPVisionModel",
        "siglip_vision_model": "SiglipVisionModel",
    }
    model = load_transformers(transformers, source, classes, ("position_ids",))
    images = noise(asked, asked.image_size or model.config.image_size)
    more = {"interpolate_pos_encoding": True} if asked.image_size else {}
    out = model(pixel_values=nchw(torch, images), **more)
    features = out.image_embeds if projected else out.pooler_output
    return {"images": images, "features": features}, {"class": type(model).__name__, "activation": model.config.hidden_act}


def run_timm_vit(torch: ModuleType, timm: ModuleType, source: Source, asked: ReferenceRequest) -> Run:
    refuse_options(source, asked, "timm knows its models by name", "exits", "heads", "activation")
    state, _ = read_state_dict(torch, source)
    config = source.configs.get("config.json", {})
    name = asked.model_name or config.get("architecture", "")
    if not timm.is_model(name):
        raise ConvertError(f"{source.path}: timm has no model {name!r}; give its name as --model-name")
    arguments: Mapping[str, Any] = config.get("model_args", {}) if name == config.get("architecture") else {}
    state = {name: value for name, value in state.items() if not name.startswith("head.")}
    patch = state["patch_embed.proj.weight"].shape[-1]
    size = patch * _side(state)
    try:
        model = timm.create_model(name, pretrained=False, **{"img_size": size, **arguments, "num_classes": 0})
    except TypeError as error:
        raise ConvertError(f"{source.path}: timm cannot build {name!r}: {error}") from error
    model = load_strictly(model, state, source, "timm")
    if asked.image_size:
        model.set_input_size(img_size=(asked.image_size, asked.image_size))
    images = noise(asked, asked.image_size or size)
    return {"images": images, "features": model(nchw(torch, images))}, {"from": name, **arguments}


def _side(state: Mapping[str, Any]) -> int:
    """Patches per side: the positions are those of the patches, some with a first one for the class token."""
    positions = state["pos_embed"].shape[1]
    return round(positions**0.5) if round(positions**0.5) ** 2 == positions else round((positions - 1) ** 0.5)

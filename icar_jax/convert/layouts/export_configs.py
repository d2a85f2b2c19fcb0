"""The configuration files of other libraries, written from an architecture; and what a layout cannot express."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Regex, normalizers, processors

from icar_jax.convert.fields import ConvertError
from icar_jax.data.images import OPENAI_MEAN, OPENAI_STD, Preprocess
from icar_jax.data.tokenizer import PAD, Tokenizer
from icar_jax.models import variants
from icar_jax.models.clip import ClipArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

_HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
_RESAMPLING = {"bilinear": 2, "bicubic": 3}
_OPEN_CLIP_NAMES = {
    "vit_b32": "ViT-B-32", "vit_b16": "ViT-B-16", "vit_l14": "ViT-L-14", "vit_l14_336": "ViT-L-14-336", "vit_h14": "ViT-H-14",
    "vit_g14": "ViT-g-14", "vit_bigg14": "ViT-bigG-14",
}  # fmt: skip


def _refuse(layout: str, wrong: Mapping[str, bool]) -> None:
    reasons = [what for what, is_wrong in wrong.items() if is_wrong]
    if reasons:
        raise ConvertError(f"the {layout} layout cannot hold this model: {'; '.join(reasons)}")


def _plain_clip(arch: ClipArch) -> dict[str, bool]:
    """What sets a model apart from CLIP's two towers."""
    v, t = arch.vision, arch.text
    return {
        "its image tower has an attention-pool head (SigLIP)": v.head == "map",
        "its image tower has no class token": not v.class_token,
        "its patch embedding has a bias": v.patch_bias,
        "its image tower has no norm before the blocks": not v.pre_norm,
        "its text projection has a bias": t.proj_bias,
        "its embeddings are sums over the heads of its exits (exit_sum)": v.exit_sum,
        f"its patches are merged on the way up (merge={v.merge})": any(v.merge),
    }


def require_openai(arch: ClipArch, preprocess: Preprocess) -> None:
    """Raises ConvertError for what OpenAI's code, which reads everything from shapes, would compute otherwise."""
    v, t = arch.vision, arch.text
    prepared = (preprocess.resize_mode, preprocess.interpolation, preprocess.mean, preprocess.std)
    _refuse(
        "openai",
        {
            **_plain_clip(arch),
            f"its activations are {v.activation} and {t.activation}, the layout means quick_gelu":
                {v.activation, t.activation} != {"quick_gelu"},
            "its heads are not 64 wide": v.width != 64 * v.heads or t.width != 64 * t.heads,
            "its MLPs are not four times as wide as their tower": v.mlp_width != 4 * v.width or t.mlp_width != 4 * t.width,
            "its norms have another epsilon than 1e-5": {v.norm_eps, t.norm_eps} != {1e-5},
            "its text tower is not causal": not t.causal,
            "it does not pool the highest token id": _pools_elsewhere(t),
            "it has a logit bias": arch.logit_bias,
            f"it prepares images otherwise ({preprocess})": prepared != ("crop", "bicubic", OPENAI_MEAN, OPENAI_STD),
        },
    )  # fmt: skip


def require_icar(arch: ClipArch) -> None:
    """Raises ConvertError unless the model has what a released ICAR checkpoint has: one exit that reads the first patch."""
    v = arch.vision
    _refuse(
        "icar",
        {
            **_plain_clip(arch),
            f"it has {len(v.exits)} early exits, the layout holds exactly one": len(v.exits) != 1,
            f"its exits pool {v.pool!r}, the layout's read the first patch": v.pool != "first_patch",
            f"its exit head has a residual ({v.exit_head})": v.exit_head != "linear",
            "its exit shares the temperature of full depth": arch.temperature != "own",
            "it has a logit bias": arch.logit_bias,
        },
    )


def _pools_elsewhere(text: TextArch) -> bool:
    return text.pool == "last" or (text.pool == "end" and text.end_id != text.vocabulary - 1)


def open_clip_name(arch: ClipArch) -> str:
    """OpenCLIP's name of a published architecture, or '' for one of another size."""
    v, t = arch.vision, arch.text
    for name, known in variants.CLIP.items():
        a, b = known.vision, known.text
        same = (a.image_size, a.patch_size, a.width, a.depth, a.heads) == (
            v.image_size,
            v.patch_size,
            v.width,
            v.depth,
            v.heads,
        )
        if name in _OPEN_CLIP_NAMES and same and (b.width, b.depth, b.vocabulary) == (t.width, t.depth, t.vocabulary):
            return _OPEN_CLIP_NAMES[name] + ("-quickgelu" if v.activation == "quick_gelu" else "")
    return ""


def open_clip_config(arch: ClipArch, preprocess: Preprocess, params: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip_config.json. Raises ConvertError for a model that OpenCLIP's own towers cannot express."""
    v, t = arch.vision, arch.text
    quick = {"quick_gelu" == a for a in (v.activation, t.activation)}
    _refuse("open_clip", {**_plain_clip(arch), "only one of its towers has quick_gelu": len(quick) > 1})
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
            **_open_clip_extras(v),
        },
        "text_cfg": {
            "context_length": t.context_length,
            "vocab_size": t.vocabulary,
            "width": t.width,
            "heads": t.heads,
            "layers": t.depth,
            "mlp_ratio": _ratio(t.mlp_width, t.width),
            **_open_clip_extras(t),
        },
    }
    text = model["text_cfg"]
    if not t.causal:
        text["no_causal_mask"] = True
    if t.pool == "last":
        text["pool_type"] = "last"
    elif _pools_elsewhere(t):
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


def _open_clip_extras(tower: VisionArch | TextArch) -> dict[str, Any]:
    extras: dict[str, Any] = {}
    if tower.norm_eps != 1e-5:
        extras["norm_kwargs"] = {"eps": tower.norm_eps}
    if tower.activation == "gelu_tanh":
        extras["act_kwargs"] = {"approximate": "tanh"}
    return extras


def _ratio(mlp: int, width: int) -> float:
    """The ratio whose product with `width`, cut to an integer, is `mlp`."""
    return mlp / width if mlp % width == 0 else round((mlp + 0.5) / width, 6)


def hf_config(arch: ClipArch, preprocess: Preprocess) -> dict[str, Any]:
    """config.json of a CLIPModel or a SiglipModel. Raises ConvertError for a model that is neither."""
    v, t = arch.vision, arch.text
    if v.head == "map":
        return _siglip_config(arch, preprocess)
    _refuse("hf", {**_plain_clip(arch), "it has a logit bias": arch.logit_bias, "its text tower is not causal": not t.causal,
                   "it pools the last place": t.pool == "last"})  # fmt: skip
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": v.embed_dim,
        "logit_scale_init_value": 2.6592,
        # 2 stands for the highest id, as in the configs of the first releases.
        "text_config": {**_hf_tower("clip_text_model", t), **_hf_text(t), "projection_dim": t.embed_dim,
                        "eos_token_id": t.end_id if t.pool == "end" else 2},
        "vision_config": {**_hf_tower("clip_vision_model", v), "projection_dim": v.embed_dim, "image_size": v.image_size,
                          "patch_size": v.patch_size},
    }  # fmt: skip


def _siglip_config(arch: ClipArch, preprocess: Preprocess) -> dict[str, Any]:
    v, t = arch.vision, arch.text
    _refuse("hf", {"its text tower is causal": t.causal, "it does not pool the last place": t.pool != "last",
                   "it has no logit bias": not arch.logit_bias, "its text projection has no bias": not t.proj_bias,
                   "it has a class token": v.class_token, "it has a norm before the blocks": v.pre_norm,
                   "its patch embedding has no bias": not v.patch_bias})  # fmt: skip
    return {
        "model_type": "siglip",
        "architectures": ["SiglipModel"],
        "text_config": {**_hf_tower("siglip_text_model", t), **_hf_text(t), "projection_size": t.embed_dim},
        "vision_config": {
            **_hf_tower("siglip_vision_model", v),
            "image_size": preprocess.image_size,
            "patch_size": v.patch_size,
        },
    }


def _hf_tower(model_type: str, tower: VisionArch | TextArch) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": _HF_ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def _hf_text(text: TextArch) -> dict[str, Any]:
    return {"vocab_size": text.vocabulary, "max_position_embeddings": text.context_length}


def hf_preprocessor(preprocess: Preprocess, is_siglip: bool) -> dict[str, Any]:
    """preprocessor_config.json."""
    side = preprocess.image_size
    square = {"height": side, "width": side}
    crop = preprocess.resize_mode == "crop"
    return {
        "image_processor_type": "SiglipImageProcessor" if is_siglip and not crop else "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side} if crop else square,
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


def hf_tokenizer_json(tokenizer: Tokenizer) -> str:
    """tokenizer.json that collapses whitespace and adds the start and end tokens by itself, as other libraries expect of it.

    What else `data.tokenizer.clean` repairs (mojibake, HTML entities) such a file cannot say.
    """
    content = json.loads(tokenizer.to_json())
    if tokenizer.start_id is None:
        return json.dumps(content, ensure_ascii=False)
    spaces = [json.loads(n.__getstate__()) for n in (normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip())]
    kept = [content["normalizer"]] if content.get("normalizer") else []
    content["normalizer"] = {"type": "Sequence", "normalizers": [*spaces, *kept]}
    if content.get("post_processor") is None:
        start, end = (tokenizer.token(i) for i in (tokenizer.start_id, tokenizer.end_id))
        template = processors.TemplateProcessing(
            single=f"{start} $A {end}", special_tokens=[(start, tokenizer.start_id), (end, tokenizer.end_id)]
        )
        content["post_processor"] = json.loads(template.__getstate__())
    return json.dumps(content, ensure_ascii=False)


def hf_tokenizer_config(tokenizer: Tokenizer, arch: ClipArch) -> dict[str, Any]:
    """tokenizer_config.json; the file tokenizer.json says everything, so the plain class reads it."""
    pad = tokenizer.token(tokenizer.pad_id)
    end = tokenizer.token(tokenizer.end_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": arch.text.context_length,
        "eos_token": end,
        # CLIP pads with an ordinary token ('!'), which the other library would then read apart from its word. What follows the
        # first end token does not count in a causal tower, so the end token serves there.
        "pad_token": end if tokenizer.start_id is not None and pad != PAD else pad,
    }
    if tokenizer.start_id is not None:
        config["bos_token"] = tokenizer.token(tokenizer.start_id)
    return config


def timm_name(arch: ConvNeXtArch) -> str:
    """timm's name of a published ConvNeXt, or a made-up one for another size."""
    for name, known in variants.CONVNEXT.items():
        if (known.depths, known.dims, known.version) == (arch.depths, arch.dims, arch.version) and "demo" not in name:
            return name
    return "convnextv2_custom" if arch.version == 2 else "convnext_custom"


def timm_config(arch: ConvNeXtArch, preprocess: Preprocess) -> dict[str, Any]:
    """config.json as timm's models carry it."""
    return {
        "architecture": timm_name(arch),
        "num_classes": arch.num_classes,
        "num_features": arch.dims[3],
        "model_args": {"depths": list(arch.depths), "dims": list(arch.dims)},
        "pretrained_cfg": {
            "input_size": [3, preprocess.image_size, preprocess.image_size],
            "interpolation": preprocess.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash" if preprocess.resize_mode == "squash" else "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": arch.num_classes,
            "first_conv": "stem.0",
            "classifier": "head.fc",
        },
    }

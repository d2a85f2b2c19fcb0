"""What weights alone do not tell: activation, preprocessing and the number of heads.

They come from the source's configuration files or from the user; where both are silent the conversion is refused with the
choices, because a wrong one spoils every embedding without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icar_jax.convert.errors import ConvertError
from icar_jax.convert.source import Source, read_json
from icar_jax.data.images import HALF_MEAN, HALF_STD, IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD, Preprocess

# name: (resize mode, interpolation, mean, std, who uses it)
PRESETS: dict[str, tuple[str, str, tuple, tuple, str]] = {
    "openai": ("crop", "bicubic", OPENAI_MEAN, OPENAI_STD, "OpenAI and most OpenCLIP weights"),
    "half": ("crop", "bicubic", HALF_MEAN, HALF_STD, "laion2b_s32b_b82k (ViT-L/14)"),
    "siglip": ("squash", "bicubic", HALF_MEAN, HALF_STD, "SigLIP"),
    "icar": ("squash", "bilinear", HALF_MEAN, HALF_STD, "the released ICAR weights"),
    "icc": ("squash", "bilinear", IMAGENET_MEAN, IMAGENET_STD, "the ICC complexity classifier"),
    "imagenet": ("crop", "bicubic", IMAGENET_MEAN, IMAGENET_STD, "ImageNet classifiers"),
}
ACTIVATIONS = {
    "quick_gelu": "OpenAI weights and OpenCLIP models whose name ends in -quickgelu",
    "gelu": "most other OpenCLIP and LAION weights",
    "gelu_tanh": "SigLIP",
}
_HF_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_RESAMPLING = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
# Vision towers of OpenCLIP whose heads are not 64 wide: (width, blocks) -> head width.
_HEAD_WIDTHS = {(1280, 32): 80, (1408, 40): 88, (1664, 48): 104, (1792, 56): 112}


def choose_activation(asked: str, found: str, where: str) -> str:
    """The activation: what the source says (`found`), else what the user says. Raises ConvertError for neither or for a clash."""
    if asked and asked not in ACTIVATIONS:
        raise ConvertError(f"--activation={asked} must be one of {', '.join(ACTIVATIONS)}")
    if asked and found and asked != found:
        raise ConvertError(f"--activation={asked}, but {where} says {found}; leave the flag out")
    if not (asked or found):
        choices = "\n".join(f"  --activation={name}: {who}" for name, who in ACTIVATIONS.items())
        raise ConvertError(f"{where} does not say which activation the towers use; pass one of\n{choices}")
    return asked or found


def hf_activation(name: str | None, where: str) -> str:
    """Hugging Face's `hidden_act` in our terms. Raises ConvertError for one that no tower here has."""
    if name not in _HF_ACTIVATIONS:
        raise ConvertError(f"{where}: hidden_act {name!r} is not supported; expected one of {', '.join(_HF_ACTIVATIONS)}")
    return _HF_ACTIVATIONS[name]


def choose_preprocess(asked: str, found: Preprocess | None, image_size: int, where: str) -> Preprocess:
    """How images are prepared, at `image_size`: what the user asks for, else what the source says.

    `asked` is a preset or a JSON file (the fields of Preprocess, or a Hugging Face preprocessor_config.json).
    Raises ConvertError listing the presets where neither says anything.
    """
    if asked in PRESETS:
        mode, interpolation, mean, std, _ = PRESETS[asked]
        return Preprocess(image_size, mode, interpolation, mean, std)
    if asked:
        file = Path(asked)
        if not file.is_file():
            raise ConvertError(f"--preprocess={asked} is neither a file nor one of {', '.join(PRESETS)}")
        content = read_json(file)
        if "image_mean" in content or "image_processor" in content:
            return resized(hf_preprocess(content, asked), image_size)
        try:
            return Preprocess.from_dict({"image_size": image_size, **content})
        except (TypeError, ValueError) as error:
            raise ConvertError(f"--preprocess={asked}: {error}") from error
    if found is None:
        choices = "\n".join(f"  --preprocess={n}: {p[0]}, {p[1]}; {p[4]}" for n, p in PRESETS.items())
        raise ConvertError(f"{where} does not say how its images are prepared; pass one of\n{choices}\n  or a JSON file")
    return resized(found, image_size)


def resized(preprocess: Preprocess, image_size: int) -> Preprocess:
    """The same preparation at another size."""
    return Preprocess(image_size, preprocess.resize_mode, preprocess.interpolation, preprocess.mean, preprocess.std)


def hf_preprocess(content: Mapping[str, Any], where: str) -> Preprocess:
    """A Hugging Face image processor's configuration. Raises ConvertError for steps that are not supported."""
    c = content.get("image_processor", content)
    size = c.get("size", 224)
    crop = c.get("do_center_crop", False)
    if isinstance(size, Mapping):
        squash = "height" in size
        side = size.get("shortest_edge", size.get("height"))
        if squash and size.get("width") != size["height"]:
            raise ConvertError(f"{where}: size {size} is not square")
    else:
        squash, side = not crop, size
    target = c.get("crop_size", side) if crop else side
    target = target.get("height") if isinstance(target, Mapping) else target
    wrong = {
        "do_resize": c.get("do_resize", True) is not True,
        "do_normalize": c.get("do_normalize", True) is not True,
        "do_rescale": c.get("do_rescale", True) is not True,
        "rescale_factor": abs(c.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-3,
        "resample": c.get("resample", 3) not in _RESAMPLING,
        "crop_size": target != side or not isinstance(side, int),
        "do_center_crop": not crop and not squash,
    }
    if any(wrong.values()):
        bad = ", ".join(f"{k}={c.get(k)!r}" for k, is_wrong in wrong.items() if is_wrong)
        raise ConvertError(f"{where}: cannot prepare images that way: {bad}; pass --preprocess to say what to do instead")
    mean, std = c.get("image_mean", OPENAI_MEAN), c.get("image_std", OPENAI_STD)
    return _preprocess(side, "squash" if squash else "crop", _RESAMPLING[c.get("resample", 3)], mean, std, where)


def open_clip_preprocess(content: Mapping[str, Any], image_size: int, where: str) -> Preprocess:
    """The `preprocess_cfg` of open_clip_config.json. Raises ConvertError for steps that are not supported."""
    mode = {"shortest": "crop", "squash": "squash"}.get(content.get("resize_mode", "shortest"))
    interpolation = _RESAMPLING.get(content.get("interpolation", "bicubic"))
    if mode is None or interpolation is None:
        raise ConvertError(
            f"{where}: cannot prepare images that way: resize_mode={content.get('resize_mode')!r}, interpolation="
            f"{content.get('interpolation')!r}; pass --preprocess to say what to do instead"
        )
    mean, std = content.get("mean", OPENAI_MEAN), content.get("std", OPENAI_STD)
    return _preprocess(image_size, mode, interpolation, mean, std, where)


def _preprocess(size: int, mode: str, interpolation: str, mean: Any, std: Any, where: str) -> Preprocess:
    try:
        return Preprocess(size, mode, interpolation, mean, std)
    except ValueError as error:
        raise ConvertError(f"{where}: {error}") from error


def choose_heads(asked: int, said: int | None, width: int, depth: int, tower: str, where: str) -> int:
    """Attention heads: from the config, else from the user, else the published towers' head widths.

    Raises ConvertError where the number does not divide the width, or nothing tells it.
    """
    if asked and said and asked != said:
        raise ConvertError(f"--heads says {asked} for the {tower} tower, but {where} says {said}; leave the flag out")
    heads = said or asked
    if not heads:
        head_width = _HEAD_WIDTHS.get((width, depth), 64) if tower == "vision" else 64
        if width % head_width:
            raise ConvertError(
                f"{where} does not say how many attention heads the {tower} tower of width {width} has; pass --heads VISION TEXT"
            )
        heads = width // head_width
    if heads < 1 or width % heads:
        raise ConvertError(f"{where}: {heads} heads do not divide the {tower} tower's width of {width}")
    return heads


def first_config(source: Source, *names: str) -> tuple[str, dict[str, Any]] | None:
    """The first of these configuration files that lies beside the weights, with its name."""
    return next(((name, source.configs[name]) for name in names if name in source.configs), None)

"""Settings that weights do not contain: activation, preprocessing and the number of heads.

They come from the source's configuration files or from the user. Where neither specifies one, the conversion is refused and the
choices are listed, because a wrong setting spoils every embedding without an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icar_jax.convert.fields import ConvertError, Fields, read_json
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
# Numbers are PIL's, as Hugging Face's configs have them.
RESAMPLING = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}
# Heads of the published CLIP towers, by (width, blocks); a tower of another size may have any number.
_HEADS = {
    "vision": {(192, 12): 3, (384, 12): 6, (512, 12): 8, (768, 12): 12, (896, 12): 14, (1024, 24): 16, (1280, 32): 16,
               (1408, 40): 16, (1536, 40): 24, (1664, 48): 16, (1792, 56): 16},
    "text": {(256, 10): 4, (384, 12): 6, (512, 12): 8, (640, 12): 10, (768, 12): 12, (1024, 24): 16, (1280, 24): 20,
             (1280, 32): 20, (1280, 36): 20},
}  # fmt: skip


def choose_activation(asked: str, found: str, where: str) -> str:
    """The activation that the source states (`found`), else the user's (`asked`).

    Raises ConvertError where neither is given, where they differ, and for an unknown name.
    """
    if asked and asked not in ACTIVATIONS:
        raise ConvertError(f"--activation={asked} must be one of {', '.join(ACTIVATIONS)}")
    if asked and found and asked != found:
        raise ConvertError(f"--activation={asked}, but {where} says {found}; leave the flag out")
    if not (asked or found):
        choices = "\n".join(f"  --activation={name}: {who}" for name, who in ACTIVATIONS.items())
        raise ConvertError(f"{where} does not say which activation the towers use; pass one of\n{choices}")
    return asked or found


def choose_preprocess(asked: str, found: Preprocess | None, image_size: int, where: str) -> Preprocess:
    """The preprocessing at `image_size` pixels: the user's (`asked`), else the one that the source states (`found`).

    `asked` is a preset or a JSON file (the fields of Preprocess, or a Hugging Face preprocessor_config.json).
    Raises ConvertError listing the presets where neither is given.
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
            return resized(hf_preprocess(Fields(asked, content)), image_size)
        if "resize_mode" not in content:
            raise ConvertError(
                f"--preprocess={asked} does not describe preprocessing; expected a preprocessor_config.json, or the fields "
                "resize_mode, interpolation, mean and std"
            )
        try:
            found = Preprocess.from_dict({"image_size": image_size, **content})
        except (TypeError, ValueError) as error:
            raise ConvertError(f"--preprocess={asked}: {error}") from error
        if found.image_size != image_size:
            raise ConvertError(
                f"--preprocess={asked} says {found.image_size} pixels, the model takes {image_size}; leave image_size out of "
                "the file, or pass --image-size"
            )
        return found
    if found is None:
        choices = "\n".join(f"  --preprocess={n}: {p[0]}, {p[1]}; {p[4]}" for n, p in PRESETS.items())
        raise ConvertError(f"{where} does not say how its images are prepared; pass one of\n{choices}\n  or a JSON file")
    return resized(found, image_size)


def resized(preprocess: Preprocess, image_size: int) -> Preprocess:
    """The same preprocessing at `image_size` pixels, with the same ratio of the crop."""
    resize_to = round(preprocess.resize_to * image_size / preprocess.image_size)
    return dataclasses.replace(preprocess, image_size=image_size, resize_to=resize_to)


def hf_preprocess(config: Fields) -> Preprocess:
    """The preprocessing that a Hugging Face image processor's configuration describes.

    Raises ConvertError for steps that are not supported.
    """
    c = config.section("image_processor") or config
    crop = c.get("do_center_crop", bool, False)
    size = c.content.get("size", 224)
    squash = "height" in size if isinstance(size, Mapping) else not crop
    side, target = _side(c, "size", 224), _side(c, "crop_size", None) if crop else None
    resample = c.content.get("resample", 3)
    wrong = {
        "do_resize": not c.get("do_resize", bool, True),
        "do_normalize": not c.get("do_normalize", bool, True),
        "do_rescale": not c.get("do_rescale", bool, True),
        "rescale_factor": abs(c.get("rescale_factor", float, 1 / 255) * 255 - 1) > 1e-3,
        "resample": not isinstance(resample, int | str) or resample not in RESAMPLING,
        "crop_size": target is not None and (target != side if squash else target > side),
        "do_center_crop": not crop and not squash,
    }
    if any(wrong.values()):
        bad = ", ".join(f"{k}={c.content.get(k)!r}" for k, is_wrong in wrong.items() if is_wrong)
        raise ConvertError(f"{c.where}: cannot prepare images that way: {bad}; pass --preprocess to say what to do instead")
    mean, std = c.get("image_mean", list, OPENAI_MEAN), c.get("image_std", list, OPENAI_STD)
    mode, resize_to = ("squash", 0) if squash else ("crop", side)
    return checked_preprocess(target or side, mode, RESAMPLING[resample], mean, std, c.where, resize_to)


def _side(config: Fields, name: str, default: int | None) -> int | None:
    """The side, in pixels, of a square that the config gives as a number or as an object."""
    value = config.content.get(name)
    if not isinstance(value, Mapping):
        return config.positive(name, int, default)
    box = config.section(name)
    side = box.positive("shortest_edge", int) or box.positive("height", int)
    if side is None or box.get("width", int, side) != side:
        raise ConvertError(f"{config.where}: {name} must be one side or a square, found {dict(value)}")
    return side


def checked_preprocess(
    size: int, mode: str, interpolation: str, mean: Any, std: Any, where: str, resize_to: int = 0
) -> Preprocess:
    """A Preprocess from values of a configuration file. Raises ConvertError, naming `where`, for impossible ones."""
    try:
        return Preprocess(size, mode, interpolation, mean, std, resize_to)
    except ValueError as error:
        raise ConvertError(f"{where}: {error}") from error


def choose_heads(asked: int, said: int | None, width: int, depth: int, tower: str, where: str) -> int:
    """The number of attention heads: the config's (`said`), else the user's (`asked`), else that of the published tower of this
    width and depth.

    Raises ConvertError where the number does not divide the width, and where none of the three is known.
    """
    if asked and said and asked != said:
        raise ConvertError(f"--heads says {asked} for the {tower} tower, but {where} says {said}; leave the flag out")
    heads = said or asked or _HEADS[tower].get((width, depth), 0)
    if not heads and not asked and said is None:
        raise ConvertError(
            f"{where} does not say how many attention heads the {tower} tower of width {width} and {depth} blocks has, and no "
            "published tower has that size; pass --heads VISION TEXT, or --heads NUMBER for a tower alone"
        )
    if heads < 1 or width % heads:
        raise ConvertError(f"{where}: {heads} heads do not divide the {tower} tower's width of {width}")
    return heads

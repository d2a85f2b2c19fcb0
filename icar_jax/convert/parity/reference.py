"""Writes reference outputs: the original weights are run in PyTorch by their own library, for `verify`.

Nothing here or in `reference_models` uses the converter's code for architectures: sizes come from the library's own
configuration or, where a source has none, from the shapes of its tensors, and the library itself reads the file. A mistake in
the conversion therefore cannot hide in the reference. Needs torch and, by layout, transformers, open_clip or timm.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.parity import reference_models as models
from icar_jax.convert.parity import reference_text as text
from icar_jax.convert.parity import reference_vision as vision
from icar_jax.convert.parity.reference_inputs import ACTIVATIONS, TEXT_POOLS, ReferenceRequest
from icar_jax.convert.parity.reference_reading import refuse_options
from icar_jax.convert.parity.verify import META, weights_sha256
from icar_jax.convert.source import Source, open_source

LIBRARIES = {
    "openai": "open_clip", "open_clip": "open_clip", "open_clip_encoder": "open_clip",
    "icar": "open_clip", "hf_clip": "transformers", "siglip": "transformers",
    "hf_dinov2": "transformers", "hf_vit": "transformers", "bert": "transformers",
    "hf_vision": "transformers", "hf_text": "transformers", "timm_vit": "timm", "timm": "timm",
    "icc": "timm", "ic9600": "timm",
}  # fmt: skip
_RUN = {
    "openai": models.run_open_clip, "open_clip": models.run_open_clip, "icar": models.run_open_clip,
    "open_clip_encoder": models.run_open_clip, "hf_clip": models.run_transformers, "siglip": models.run_transformers,
    "timm": models.run_timm, "icc": models.run_icc, "ic9600": models.run_ic9600,
    "hf_dinov2": vision.run_transformers_vision, "hf_vit": vision.run_transformers_vision, "timm_vit": vision.run_timm_vit,
    "bert": text.run_transformers_text, "hf_vision": vision.run_lone_vision, "hf_text": text.run_lone_text,
}  # fmt: skip


def write_reference(
    source_path: str | os.PathLike,
    out: str | os.PathLike,
    *,
    library: str = "",
    model_name: str = "",
    activation: str = "",
    heads: Sequence[int] = (),
    exits: Sequence[int] = (),
    image_size: int = 0,
    context_length: int = 0,
    text_pool: str = "",
    images: int = 4,
    seed: int = 0,
) -> Path:
    """Runs the weights at `source_path` on `images` seeded random images or texts or both, in float32 on the CPU, and
    writes `out`.

    `verify.read_reference` reads the file. Sources without a configuration file may need:
        model_name: a model of open_clip or timm, such as 'ViT-L-14' or 'convnextv2_tiny'.
        activation: gelu, gelu_tanh or quick_gelu.
        heads: attention heads of the vision and of the text tower.
        exits: executed blocks of an ICAR exit head (one).
        image_size: pixels. For CLIP layouts of open_clip and for vision towers another size than the source's resizes the
            position embeddings as the library does; for ConvNeXt it is the size of the inputs.
        context_length, text_pool: of a text encoder, as in `Options`: tokens of a text, and 'first' or 'mean'.
        library: checked only: the library that runs this layout.

    Raises ConvertError where the library is missing, the source does not specify the model, or the weights do not fit it.
    """
    out = Path(out)
    if out.suffix != ".npz":
        raise ConvertError(f"reference {out}: expected a file name that ends in .npz")
    if images < 1 or len(heads) not in (0, 2) or (activation and activation not in ACTIVATIONS):
        raise ConvertError(
            "reference: expected at least one image, two numbers of heads (vision, text) or none, and an activation among "
            f"{', '.join(ACTIVATIONS)}; found {images}, {tuple(heads)} and {activation!r}"
        )
    if text_pool and text_pool not in TEXT_POOLS:
        raise ConvertError(f"reference: text_pool {text_pool!r} must be one of {', '.join(TEXT_POOLS)}")
    source = open_source(source_path)
    if source.adapter is not None:
        raise ConvertError(f"{source.path} holds a LoRA adapter, which references do not cover; merge it with peft first")
    if source.layout not in LIBRARIES:
        raise ConvertError(f"{source.path} has the layout {source.layout!r}; references exist for {', '.join(LIBRARIES)}")
    needed = LIBRARIES[source.layout]
    if library and library != needed:
        raise ConvertError(f"{source.path} has the layout {source.layout!r}, which {needed} runs, not {library!r}")
    asked = ReferenceRequest(
        model_name, activation, tuple(heads), tuple(exits), image_size, images, seed, context_length, text_pool
    )
    if _RUN[source.layout] is not text.run_transformers_text:
        given = ("text_pool",) if source.layout == "open_clip_encoder" else ("context_length", "text_pool")
        refuse_options(source, asked, "it is no text encoder", *given)
    torch, module = _import("torch", source), _import(needed, source)
    with torch.inference_mode():
        arrays, built = _RUN[source.layout](torch, module, source, asked)
    meta = {
        "layout": source.layout, "libraries": {"torch": torch.__version__, needed: module.__version__}, "seed": seed,
        "file": source.weights.path.name, "sha256": weights_sha256(source.weights.path), "model": built,
    }  # fmt: skip
    arrays = {name: array if isinstance(array, np.ndarray) else array.detach().numpy() for name, array in arrays.items()}
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ConvertError(f"{source.path}: {needed} itself computes NaN or infinity: {', '.join(broken)}: damaged?")
    staging = out.with_name(f".{out.name}.{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(staging, "wb") as stream:
            np.savez(stream, **arrays, **{META: np.array(json.dumps(meta))})
        os.replace(staging, out)
    finally:
        staging.unlink(missing_ok=True)
    return out


def _import(name: str, source: Source) -> ModuleType:
    try:
        if name != "torch":
            declare_torchvision_operators(importlib.import_module("torch"))
        return importlib.import_module(name)
    except ImportError as error:
        raise ConvertError(
            f"reference of {source.path} (layout {source.layout!r}) needs torch and {LIBRARIES[source.layout]}, but importing "
            f"{name} failed ({error}); install them with: pip install 'icar_jax[parity]'"
        ) from error


def declare_torchvision_operators(torch: ModuleType) -> None:
    """Lets open_clip and timm import a torchvision whose compiled operators were built for another torch.

    torchvision attaches shape functions to two operators during its import, and fails where they do not exist. No model here
    calls them, so declaring their signatures is enough.
    """
    spec = importlib.util.find_spec("torchvision")
    if "torchvision" in sys.modules or spec is None or spec.origin is None:
        return
    for compiled in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(compiled))
            return
        except OSError:
            continue
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

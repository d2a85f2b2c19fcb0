"""ConvNeXt V1 and V2 in timm's layout."""

from __future__ import annotations

import re
from typing import Any

from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts.base import Details, Export, ExportFiles, ExportSource, Layout, Options, Source, shape_of
from icar_jax.convert.rules import CONV, POINTWISE, SAME, TRANSPOSE, Rule, linear, norm, prefixed, rule
from icar_jax.convert.settings import choose_preprocess
from icar_jax.data.images import Preprocess
from icar_jax.models import variants
from icar_jax.models.convnext import EPS, ConvNeXtArch

# Names of timm's ConvNeXts whose blocks are the usual ones; those that exports write end in 'custom'.
_PLAIN = re.compile(r"convnext(v2)?_(atto|femto|pico|nano|tiny|small|base|large|xlarge|huge|custom)(\..*)?")
_XXLARGE = (384, 768, 1536, 3072)  # widths of the one published ConvNeXt with another epsilon
# Arguments of timm's class with the values under which its network is the one here; None: any, for weights show them.
_ARGUMENTS: dict[str, tuple | None] = {
    "depths": None, "dims": None, "num_classes": None, "in_chans": (3,), "global_pool": ("avg",), "output_stride": (32,),
    "kernel_sizes": (7, [7, 7, 7, 7]), "ls_init_value": None, "stem_type": ("patch",), "patch_size": (4,),
    "head_init_scale": None, "head_norm_first": (False,), "head_hidden_size": (None,), "conv_mlp": None, "conv_bias": (True,),
    "use_grn": None, "act_layer": ("gelu",), "norm_layer": (None, "layernorm", "layernorm2d"), "norm_eps": (None, EPS),
    "drop_rate": None, "drop_path_rate": None,
}  # fmt: skip
INPUT_SIZE = 224  # pixels; the training resolution of the released classifiers and of most models of timm
_CONFIG = "config.json"


def rules(conv_mlp: bool) -> list[Rule]:
    """Rules for timm's names. Smaller models store the matrices of an MLP as 1x1 convolutions (`conv_mlp`)."""
    matrix = POINTWISE if conv_mlp else TRANSPOSE
    block = [
        # [C, 1, 7, 7] -> [7, 7, 1, C]
        rule("conv_dw.weight", "conv_dw/kernel", CONV),
        rule("conv_dw.bias", "conv_dw/bias"),
        *norm("norm", "norm"),
        rule("mlp.fc1.weight", "mlp/fc1/kernel", matrix),
        rule("mlp.fc1.bias", "mlp/fc1/bias"),
        rule("mlp.grn.weight", "mlp/grn/gamma", SAME),
        rule("mlp.grn.bias", "mlp/grn/beta", SAME),
        rule("mlp.fc2.weight", "mlp/fc2/kernel", matrix),
        rule("mlp.fc2.bias", "mlp/fc2/bias"),
        rule("gamma", "gamma"),
    ]
    return [
        rule("stem.0.weight", "stem/conv/kernel", CONV),
        rule("stem.0.bias", "stem/conv/bias"),
        *norm("stem.1", "stem/norm"),
        *norm("stages.{}.downsample.0", "stages/{}/downsample/norm"),
        rule("stages.{}.downsample.1.weight", "stages/{}/downsample/conv/kernel", CONV),
        rule("stages.{}.downsample.1.bias", "stages/{}/downsample/conv/bias"),
        *prefixed(block, "stages.{}.blocks.{}.", "stages/{}/blocks/{}/"),
        *norm("head.norm", "head/norm"),
        *linear("head.fc", "head/fc"),
    ]


def has_conv_mlp(source: Source, prefix: str = "") -> bool:
    """Whether the source stores the matrices of its MLPs as 1x1 convolutions; `prefix` stands before all names."""
    tensor = source.tensors.get(f"{prefix}stages.0.blocks.0.mlp.fc1.weight")
    return tensor is not None and len(tensor.shape) == 4


def uses_conv_mlp(arch: ConvNeXtArch) -> bool:
    """timm's choice for a named size: 1x1 convolutions up to nano, linear layers from tiny on."""
    return arch.dims[0] < 96


def convnext_arch(source: Source, prefix: str = "") -> ConvNeXtArch:
    """Depths, widths, version and classes, all from shapes. Raises ConvertError where they cannot be read."""
    names = source.tensors
    stages = engine.count(names, f"{prefix}stages.{{}}")
    if stages != 4:
        raise ConvertError(f"{source.path}: found {stages} stages, expected the four of a ConvNeXt")
    depths = tuple(engine.count(names, f"{prefix}stages.{i}.blocks.{{}}") for i in range(4))
    dims = tuple(shape_of(source, f"{prefix}stages.{i}.blocks.0.conv_dw.weight", 4)[0] for i in range(4))
    version = 2 if any(name.endswith(".mlp.grn.weight") for name in names) else 1
    classes = shape_of(source, f"{prefix}head.fc.weight", 2)[0] if f"{prefix}head.fc.weight" in names else 0
    return ConvNeXtArch(depths, dims, version, classes)


def _detect(source: Source) -> bool:
    if source.has("downsample_layers."):
        raise ConvertError(f"{source.path}: this is the original ConvNeXt layout; load it with timm and save its state dict")
    return source.has("stages.")


def _arch(source: Source, options: Options) -> ConvNeXtArch:
    arch = convnext_arch(source)
    require_plain(source, arch, source.config(_CONFIG).get("architecture", str, ""), _CONFIG)
    args = source.config(_CONFIG).section("model_args")
    stated = {"global_pool": source.config(_CONFIG).content.get("global_pool", "avg"), **args.content}
    fits = lambda name, value: (known := _ARGUMENTS.get(name, ())) is None or value in known
    wrong = [f"{name}={value!r}" for name, value in stated.items() if not fits(name, value)]
    if wrong:
        raise ConvertError(f"{args.where} describes a ConvNeXt that is not supported: {', '.join(wrong)}")
    return arch


def require_plain(source: Source, arch: ConvNeXtArch, name: str, where: str) -> None:
    """Raises ConvertError for a ConvNeXt whose `name`, or whose sizes without one, say that it computes otherwise."""
    if name and not _PLAIN.fullmatch(name):
        raise ConvertError(
            f"{source.path}: {where} names the architecture {name!r}, whose activation, epsilon, stem or head may be another; "
            "supported are ConvNeXt V1 and V2 from atto to huge"
        )
    if not name and arch.dims == _XXLARGE:
        raise ConvertError(f"{source.path}: these are the widths of convnext_xxlarge, whose epsilon is 1e-5; here it is {EPS}")


def _preprocess(source: Source, options: Options, arch: ConvNeXtArch) -> Preprocess:
    found = None if options.preprocess else _stated_preprocess(source)
    size = options.image_size or (found.image_size if found else INPUT_SIZE)
    return choose_preprocess(options.preprocess, found, size, str(source.path))


def _stated_preprocess(source: Source) -> Preprocess | None:
    """The preprocessing in timm's config.json (`pretrained_cfg`), or None without one."""
    config = source.config(_CONFIG).section("pretrained_cfg")
    if not config:
        return None
    size = config.get("input_size", list, [3, INPUT_SIZE, INPUT_SIZE])[-1:]
    mode = "squash" if config.get("crop_mode", str) == "squash" else "crop"
    interpolation, mean, std = (
        config.get(name, kind) for name, kind in (("interpolation", str), ("mean", list), ("std", list))
    )
    try:
        return Preprocess(*(*size, mode, interpolation or "bicubic", mean, std))
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{config.where}: {error}; pass --preprocess to say how images are prepared") from error


def _details(source: Source, options: Options) -> Details:
    crop = 1.0 if options.preprocess else source.config(_CONFIG).section("pretrained_cfg").get("crop_pct", float, 1.0)
    note = f"config.json crops the centre {crop:g} of the picture (crop_pct) when it classifies; this checkpoint takes it whole"
    return Details(stated_names(source.config(_CONFIG)), {"conv_mlp": has_conv_mlp(source)}, [] if crop == 1 else [note])


def stated_names(config: Fields) -> dict[str, Any]:
    """The architecture and the tag of the weights that a config.json of timm names, as entries of `source` of icar.json."""
    found = {"architecture": config.get("architecture", str), "tag": config.section("pretrained_cfg").get("tag", str)}
    return {name: value for name, value in found.items() if value}


def stated_tag(source: ExportSource) -> dict[str, Any]:
    """{"tag": that of the weights a checkpoint was converted from}, for `pretrained_cfg`; empty without one."""
    tag = source.description.get("source", {}).get("tag")
    return {"tag": tag} if tag else {}


# --- export ----------------------------------------------------------------------------------------------------------------


def published_name(arch: ConvNeXtArch) -> str:
    """timm's name of a published ConvNeXt, or a made-up one for another size."""
    for name, known in variants.CONVNEXT.items():
        if (known.depths, known.dims, known.version) == (arch.depths, arch.dims, arch.version) and "demo" not in name:
            return name
    return "convnextv2_custom" if arch.version == 2 else "convnext_custom"


def _export(source: ExportSource) -> ExportFiles:
    conv_mlp = source.description.get("conv_mlp", uses_conv_mlp(source.arch))
    leaves = engine.export_weights(source.params, rules(conv_mlp), source.where)
    return ExportFiles({"model.safetensors": leaves, _CONFIG: _config(source.arch, source.preprocess, stated_tag(source))})


def _config(arch: ConvNeXtArch, preprocess: Preprocess, tag: dict[str, Any]) -> dict[str, Any]:
    """config.json as timm's models have it."""
    return {
        "architecture": published_name(arch),
        "num_classes": arch.num_classes,
        "num_features": arch.dims[3],
        "model_args": {"depths": list(arch.depths), "dims": list(arch.dims)},
        "pretrained_cfg": {
            **tag,
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


LAYOUT = Layout(
    name="timm",
    kind="convnext",
    detect=_detect,
    arch=_arch,
    rules=lambda source, arch: rules(has_conv_mlp(source)),
    preprocess=_preprocess,
    details=_details,
    export=Export("timm", _export),
    options=frozenset({"preprocess", "image_size"}),
    config_files=(_CONFIG,),
)

"""ConvNeXt V1 and V2 as timm names them, and the ICC complexity classifier built on one."""

from __future__ import annotations

from typing import Any

from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.rules import CONV, POINTWISE, SAME, TRANSPOSE, Rule, linear, norm, prefixed, rule
from icar_jax.convert.settings import choose_preprocess
from icar_jax.convert.source import Source, shape_of
from icar_jax.data.images import Preprocess
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import EPS, ConvNeXtArch

INPUT_SIZE = 224  # pixels; what the released classifiers and most of timm's were trained at


def rules(conv_mlp: bool) -> list[Rule]:
    """timm's names. The smaller models hold the MLP's matrices as 1x1 convolutions (`conv_mlp`)."""
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


def classifier_rules(conv_mlp: bool) -> list[Rule]:
    """The ICC classifier: a backbone without classes, then a norm of its own and two logits."""
    return [
        *prefixed(rules(conv_mlp), "backbone.", "backbone/"),
        *norm("classifier.0", "head/norm"),
        *linear("classifier.1", "head/fc"),
    ]


def has_conv_mlp(source: Source, prefix: str = "") -> bool:
    tensor = source.tensors.get(f"{prefix}stages.0.blocks.0.mlp.fc1.weight")
    return tensor is not None and len(tensor.shape) == 4


def uses_conv_mlp(arch: ConvNeXtArch) -> bool:
    """timm's choice for a named size: 1x1 convolutions up to nano, linear layers from tiny on."""
    return arch.dims[0] < 96


def arch(source: Source, prefix: str = "") -> ConvNeXtArch:
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


def classifier_arch(source: Source, options: Any) -> ComplexityArch:
    """The ICC classifier over its backbone. Raises ConvertError where it has other than two classes."""
    classes = shape_of(source, "classifier.1.weight", 2)[0]
    if classes != 2:
        raise ConvertError(f"{source.path}: the classifier has {classes} classes, expected 2 (simple, complex)")
    return ComplexityArch(arch(source, "backbone."), "classification", options.image_size or INPUT_SIZE)


def found_preprocess(source: Source) -> Preprocess | None:
    """What timm's config.json (`pretrained_cfg`) says of the images, or None without one."""
    config = _config(source).section("pretrained_cfg")
    if not config:
        return None
    size = config.get("input_size", list, [3, INPUT_SIZE, INPUT_SIZE])[-1:]
    mode = "squash" if config.get("crop_mode", str) == "squash" else "crop"
    interpolation, mean, std = (
        config.get(name, kind) for name, kind in (("interpolation", str), ("mean", list), ("std", list))
    )
    try:
        return Preprocess(*size, mode, interpolation or "bicubic", mean, std)
    except (TypeError, ValueError) as error:
        raise ConvertError(f"{config.where}: {error}; pass --preprocess to say how images are prepared") from error


def require_supported(source: Source) -> None:
    """Raises ConvertError where config.json says that the model computes otherwise than timm's ConvNeXt does by default."""
    args = _config(source).section("model_args")
    eps = args.get("norm_eps", float, EPS)
    if eps != EPS:
        raise ConvertError(f"{args.where}: norm_eps {eps} is not supported; ConvNeXt here has {EPS}")


def notes(source: Source) -> list[str]:
    """What config.json says and a checkpoint cannot hold."""
    crop = _config(source).section("pretrained_cfg").get("crop_pct", float, 1.0)
    if crop == 1:
        return []
    return [
        f"config.json crops the centre {crop:g} of the picture (crop_pct) when it classifies; this checkpoint takes it whole"
    ]


def _config(source: Source) -> Fields:
    return Fields("config.json", source.configs.get("config.json", {}))


def classifier_preprocess(source: Source, options: Any) -> Preprocess:
    """The classifier's own preparation, unless the user says otherwise."""
    size = options.image_size or INPUT_SIZE
    return choose_preprocess(options.preprocess or "icc", None, size, str(source.path))

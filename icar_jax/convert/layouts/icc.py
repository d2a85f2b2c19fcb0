"""Complexity models on a ConvNeXt of timm without classes: the released ICC classifier (a norm and two logits), and the
regressor of human ratings (IC9600: a norm and an MLP)."""

from __future__ import annotations

from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts import timm
from icar_jax.convert.layouts.base import Details, Export, ExportFiles, ExportSource, Layout, Options, Source, shape_of
from icar_jax.convert.rules import Rule, linear, norm, prefixed
from icar_jax.convert.settings import choose_preprocess
from icar_jax.data.images import Preprocess
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch

_PREFIX = "backbone."


def classifier_rules(conv_mlp: bool) -> list[Rule]:
    """Rules for the classifier's names; `conv_mlp` as of `timm.rules`."""
    return [
        *prefixed(timm.rules(conv_mlp), _PREFIX, "backbone/"),
        *norm("classifier.0", "head/norm"),
        *linear("classifier.1", "head/fc"),
    ]


def _arch(source: Source, options: Options) -> ComplexityArch:
    classes = shape_of(source, "classifier.1.weight", 2)[0]
    if classes != 2:
        raise ConvertError(f"{source.path}: the classifier has {classes} classes, expected 2 (simple, complex)")
    return ComplexityArch(_backbone(source), "classification", options.image_size or timm.INPUT_SIZE)


def _backbone(source: Source) -> ConvNeXtArch:
    arch = timm.convnext_arch(source, _PREFIX)
    hparams = Fields(str(source.path), source.weights.extra).section("hparams")
    name = next((value for key in ("model_name", "backbone") if isinstance(value := hparams.content.get(key), str)), "")
    timm.require_plain(source, arch, name, f"{source.path.name}: hparams")
    return arch


def _preprocess(source: Source, options: Options, arch: ComplexityArch) -> Preprocess:
    return choose_preprocess(options.preprocess or "icc", None, arch.image_size, str(source.path))


def _details(source: Source, options: Options) -> Details:
    extra = {"conv_mlp": timm.has_conv_mlp(source, _PREFIX)}
    hparams = Fields(str(source.path), source.weights.extra).section("hparams")
    threshold = hparams.get("threshold", float)
    if threshold is None:
        return Details(extra=extra, notes=["the classifier has no threshold; set one with `icar bundle --thresholds`"])
    if not 0 <= threshold <= 1:
        raise ConvertError(f"{hparams.where}: threshold must lie in [0, 1], found {threshold}")
    return Details(extra={**extra, "threshold": threshold})


def _export(source: ExportSource) -> ExportFiles:
    arch, described = source.arch, source.description
    if not isinstance(arch, ComplexityArch):
        raise ConvertError(f"{source.where} is a head on the blocks of a CLIP; the ICC layout holds a ConvNeXt classifier")
    conv_mlp = described.get("conv_mlp", timm.uses_conv_mlp(arch.backbone))
    leaves = engine.export_weights(source.params, classifier_rules(conv_mlp), source.where)
    name = timm.published_name(arch.backbone)
    hparams = {"model_name": name, "num_classes": 2, "feature_dim": arch.backbone.dims[3]}
    if "threshold" in described:
        hparams["threshold"] = described["threshold"]
    return ExportFiles({"ICC.pt": {"state_dict": leaves, "hparams": hparams, "model_architecture": name}})


# --- IC9600's regressor -----------------------------------------------------------------------------------------------------

_RATED_SIZE = 512  # pixels at which IC9600's models are trained, squashed


def regressor_rules(conv_mlp: bool) -> list[Rule]:
    """Rules for the names of a regressor of ratings; `conv_mlp` as of `timm.rules`."""
    head = [*norm("0", "norm"), *linear("1", "fc1"), *linear("4", "fc2"), *linear("7", "fc3")]
    return [*prefixed(timm.rules(conv_mlp), _PREFIX, "backbone/"), *prefixed(head, "regressor.", "head/")]


def _regressor_arch(source: Source, options: Options) -> ComplexityArch:
    if shape_of(source, "regressor.7.weight", 2)[0] != 1:
        raise ConvertError(
            f"{source.path}: the regressor gives {shape_of(source, 'regressor.7.weight', 2)[0]} values, expected 1"
        )
    return ComplexityArch(_backbone(source), "regression", options.image_size or _RATED_SIZE)


def _export_regressor(source: ExportSource) -> ExportFiles:
    arch = source.arch
    conv_mlp = source.description.get("conv_mlp", timm.uses_conv_mlp(arch.backbone))
    leaves = engine.export_weights(source.params, regressor_rules(conv_mlp), source.where)
    name = timm.published_name(arch.backbone)
    return ExportFiles({"IC9600.pt": {"state_dict": leaves, "hparams": {"model_name": name, "image_size": arch.image_size}}})


REGRESSOR = Layout(
    name="ic9600",
    kind="complexity",
    detect=lambda source: source.has("regressor.") and source.has(_PREFIX),
    arch=_regressor_arch,
    rules=lambda source, arch: regressor_rules(timm.has_conv_mlp(source, _PREFIX)),
    preprocess=_preprocess,
    details=lambda source, options: Details(extra={"conv_mlp": timm.has_conv_mlp(source, _PREFIX)}),
    export=Export("icar", _export_regressor, holds=lambda arch: isinstance(arch, ComplexityArch) and arch.head == "regression"),
    options=frozenset({"preprocess", "image_size"}),
    precedence=1,
)
LAYOUT = Layout(
    name="icc",
    kind="complexity",
    detect=lambda source: source.has("classifier.") and source.has(_PREFIX),
    arch=_arch,
    rules=lambda source, arch: classifier_rules(timm.has_conv_mlp(source, _PREFIX)),
    preprocess=_preprocess,
    details=_details,
    export=Export("icar", _export, holds=lambda arch: getattr(arch, "head", "") == "classification"),
    options=frozenset({"preprocess", "image_size"}),
    precedence=1,
)

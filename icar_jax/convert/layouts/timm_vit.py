"""Vision transformers of timm: ViT and DeiT, DINO and DINOv2 with and without registers, and CLIP's image towers.

Names and shapes show most of a model. What they do not show (activation, epsilon, the order of norms) follows from the name of
the architecture in config.json; names that are not known to be plain are refused.
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts.base import (
    TOWER_OPTIONS,
    Details,
    Export,
    ExportFiles,
    ExportSource,
    Layout,
    Options,
    Source,
    require_agreement,
    shape_of,
    square_side,
)
from icar_jax.convert.layouts.clip_export import beyond_tower, refuse
from icar_jax.convert.layouts.timm import stated_names, stated_tag
from icar_jax.convert.rules import CONV, ROW, ROWS, TRANSPOSE, Rule, Transform, dropped, linear, norm, prefixed, rule, scaled
from icar_jax.convert.settings import RESAMPLING, checked_preprocess, choose_activation, choose_heads, choose_preprocess
from icar_jax.data.images import Preprocess
from icar_jax.models.vision import VisionArch

_CONFIG = "config.json"
_SIZES = "(tiny|small|medium|base|large|huge|giant|gigantic)"
# (names of architectures whose blocks are plain, activation, epsilon)
_KNOWN = (
    (rf"vit_{_SIZES}_patch\d+_(\d+|dinov2|reg4_dinov2)", "gelu", 1e-6),
    (rf"deit3?_{_SIZES}_patch\d+_\d+", "gelu", 1e-6),
    (rf"vit_{_SIZES}_patch\d+_clip_\d+", "gelu", 1e-5),
    (rf"vit_{_SIZES}_patch\d+_clip_quickgelu_\d+", "quick_gelu", 1e-5),
)
_GATED = "dinov2"  # in the name of an architecture whose gate is SwiGLU's
# Arguments of timm's class with the values under which its blocks compute what ours do; those without a list may have any,
# because names and shapes show them.
_ARGUMENTS: dict[str, tuple | None] = {
    "img_size": None, "patch_size": None, "in_chans": (3,), "num_classes": None, "global_pool": None, "embed_dim": None,
    "depth": None, "num_heads": None, "mlp_ratio": None, "qkv_bias": (True,), "init_values": None, "class_token": None,
    "no_embed_class": None, "reg_tokens": None, "pre_norm": None, "fc_norm": None, "act_layer": None, "dynamic_img_size": None,
    "pool_include_prefix": (False,), "final_norm": (True,), "qk_norm": (False,), "proj_bias": (True,), "pos_embed": ("learn",),
    "scale_attn_norm": (False,), "scale_mlp_norm": (False,), "dynamic_img_pad": (False,), "norm_layer": (None, "layernorm"),
    "drop_rate": None, "pos_drop_rate": None, "patch_drop_rate": None, "proj_drop_rate": None, "attn_drop_rate": None,
    "drop_path_rate": None, "weight_init": None, "fix_init": None,
}  # fmt: skip
_ACT_LAYERS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_tanh": "gelu_tanh"}
# Parts of models whose other names are the same: {a name contains this: what it is}.
_UNSUPPORTED = {
    ".q_norm.": "norms of queries and keys (qk_norm)", ".attn.norm.": "a norm inside attention (scale_attn_norm)",
    ".mlp.norm.": "a norm inside the MLP (scale_mlp_norm)", "attn_pool.": "an attention pool (global_pool 'map')",
    "dist_token": "a distillation token", "patch_embed.backbone.": "a convolutional stem (hybrid)",
    ".q_bias": "BEiT's attention", ".rel_pos": "relative positions", "fc1_g": "an unpacked SwiGLU",
    "register_tokens": "the original DINOv2's names; get the weights from timm or Hugging Face",
    "mask_token": "the original DINOv2's names; get the weights from timm or Hugging Face",
}  # fmt: skip
# Positions of the patches alone (no_embed_class) <-> positions with a first row for the class token.
_PATCHES_ALONE = Transform(
    lambda arrays: np.concatenate([np.zeros_like(arrays[0][0][:1]), arrays[0].reshape(arrays[0].shape[1:])]),
    lambda a: [a[None, 1:]],
)


def rules(layer_scale: bool, embedded_class: bool, fc_norm: bool) -> list[Rule]:
    """Rules for timm's names: with LayerScale or not, with positions of the class token, with the norm after pooling."""
    out = (lambda name, to, scale: scaled(name, to, scale)) if layer_scale else (lambda name, to, scale: linear(name, to))
    block = [
        *norm("norm1", "ln1"),
        rule("attn.qkv.weight", "attn/qkv/kernel", TRANSPOSE),
        rule("attn.qkv.bias", "attn/qkv/bias"),
        *out("attn.proj", "attn/out", "ls1.gamma"),
        *norm("norm2", "ln2"),
        *linear("mlp.fc1", "mlp/fc1"),
        *out("mlp.fc2", "mlp/fc2", "ls2.gamma"),
    ]
    tower = [
        rule("cls_token", "cls", ROW),
        rule("reg_token", "registers", ROWS),
        rule("pos_embed", "pos", ROWS if embedded_class else _PATCHES_ALONE),
        rule("patch_embed.proj.weight", "patch/kernel", CONV),
        rule("patch_embed.proj.bias", "patch/bias"),
        *norm("norm_pre", "ln_pre"),
        *prefixed(block, "blocks.{}.", "blocks/{}/"),
        *norm("fc_norm" if fc_norm else "norm", "ln_post"),
    ]
    return [*prefixed(tower, "", "vision/"), *(dropped(f"head.{part}", "the classifier") for part in ("weight", "bias"))]


def _source_rules(source: Source, arch: VisionArch | None) -> list[Rule]:
    plain = arch is None or not arch.class_token or source.tensors["pos_embed"].shape[1] == arch.grid**2 + 1
    return rules(any(name.endswith((".ls1.gamma", ".ls2.gamma")) for name in source.tensors), plain, source.has("fc_norm."))


def _arguments(source: Source) -> Fields:
    """`model_args` of config.json. Raises ConvertError for arguments under which the blocks compute otherwise."""
    args = source.config(_CONFIG).section("model_args")
    wrong = [
        f"{name}={value!r}" for name, value in args.content.items()
        if name not in _ARGUMENTS or (_ARGUMENTS[name] is not None and value not in _ARGUMENTS[name])
    ]  # fmt: skip
    if wrong:
        raise ConvertError(f"{args.where} describes a tower that is not supported: {', '.join(wrong)}")
    return args


def _manner(source: Source, options: Options) -> tuple[str, float]:
    """(activation, epsilon). Raises ConvertError for an architecture that is not known to be plain."""
    name = source.config(_CONFIG).get("architecture", str, "")
    if not name:
        if source.has("norm_pre."):
            raise ConvertError(
                f"{source.path}: the epsilon of a tower with a norm before its blocks is unknown; copy {_CONFIG} beside it"
            )
        return choose_activation(options.activation, "", str(source.path)), 1e-6
    found = next(((act, eps) for pattern, act, eps in _KNOWN if re.fullmatch(pattern, name)), None)
    if found is None:
        raise ConvertError(
            f"{source.path}: {_CONFIG} names the architecture {name!r}, which is not known to be a plain vision transformer; "
            "supported are vit_SIZE_patchN_SIZE, those of DINOv2 and CLIP, and deit_SIZE_patchN_SIZE"
        )
    act_layer = _arguments(source).get("act_layer", str)
    if act_layer is not None and act_layer not in _ACT_LAYERS:
        raise ConvertError(f"{_CONFIG}: act_layer {act_layer!r} is not supported; expected one of {', '.join(_ACT_LAYERS)}")
    return choose_activation(options.activation, _ACT_LAYERS[act_layer] if act_layer else found[0], _CONFIG), found[1]


def _head(source: Source) -> str:
    """The pooling. Raises ConvertError for one that the tower here cannot have."""
    has_class, fc_norm = "cls_token" in source.tensors, source.has("fc_norm.")
    config = source.config(_CONFIG)
    usual = "avg" if fc_norm else "token"
    found = _arguments(source).get("global_pool", str) or config.get("global_pool", str) or usual
    if found not in ("token", "avg"):
        raise ConvertError(f"{source.path}: global_pool {found!r} is not supported; expected 'token' or 'avg'")
    if found == "token" and not has_class:
        raise ConvertError(f"{source.path}: global_pool 'token', but there is no class token (cls_token)")
    if (found == "avg") != fc_norm:
        where = "after" if fc_norm else "before"
        raise ConvertError(
            f"{source.path}: global_pool {found!r} with the norm {where} pooling is not supported; towers here normalise the "
            "class token (norm.weight), or the mean of the patches (fc_norm.weight)"
        )
    return "mean" if found == "avg" else "cls"


def _arch(source: Source, options: Options) -> VisionArch:
    for name, what in _UNSUPPORTED.items():
        if found := next((key for key in source.tensors if name in key), None):
            raise ConvertError(f"{source.path}: the tower has {what}, which is not supported ({found})")
    activation, eps = _manner(source, options)
    args, head = _arguments(source), _head(source)
    width, _, patch, _ = shape_of(source, "patch_embed.proj.weight", 4)
    has_class = "cls_token" in source.tensors
    registers = shape_of(source, "reg_token", 3)[1] if "reg_token" in source.tensors else 0
    side = _side(source, has_class, registers)
    depth = engine.count(source.tensors, "blocks.{}")
    rows = shape_of(source, "blocks.0.mlp.fc1.weight", 2)[0]
    hidden = shape_of(source, "blocks.0.mlp.fc2.weight", 2)[1]
    gated = rows == 2 * hidden
    if gated and _GATED not in source.config(_CONFIG).get("architecture", str, ""):
        raise ConvertError(f"{source.path}: the MLPs have a gate of unknown kind; only that of DINOv2 is supported")
    require_agreement(
        source,
        _CONFIG,
        {
            "model_args.embed_dim": (args.get("embed_dim", int), width),
            "model_args.depth": (args.get("depth", int), depth),
            "model_args.patch_size": (args.get("patch_size", int), patch),
            "model_args.img_size": (args.get("img_size", int), patch * side),
            "model_args.reg_tokens": (args.get("reg_tokens", int), registers),
            "model_args.class_token": (args.get("class_token", bool), has_class),
        },
    )
    asked, pre_norm = options.heads[0] if options.heads else 0, source.has("norm_pre.")
    heads = choose_heads(asked, args.positive("num_heads", int), width, depth, "vision", str(source.path))
    return VisionArch(
        patch * side, patch, width, depth, heads, hidden, width, activation, head=head, class_token=has_class, norm_eps=eps,
        patch_bias=not pre_norm, pre_norm=pre_norm, registers=registers, exit_eps=eps,
        ffn="swiglu" if gated else "mlp", projection="none",
    )  # fmt: skip


def _side(source: Source, has_class: bool, registers: int) -> int:
    """Patches per side. Raises ConvertError where registers have positions of their own."""
    positions = shape_of(source, "pos_embed", 3)[1]
    for before in dict.fromkeys((int(has_class), 0)):
        side = math.isqrt(max(positions - before, 0))
        if side and side * side == positions - before:
            return side
    if registers and math.isqrt(positions - registers - has_class) ** 2 == positions - registers - has_class:
        raise ConvertError(f"{source.path}: positions for registers (reg_tokens without no_embed_class) are not supported")
    return square_side(source, "pos_embed", positions - has_class)


def _preprocess(source: Source, options: Options, arch: VisionArch) -> Preprocess:
    found = None if options.preprocess else _stated_preprocess(source)
    return choose_preprocess(options.preprocess, found, options.image_size or arch.image_size, str(source.path))


def _stated_preprocess(source: Source) -> Preprocess | None:
    """The preprocessing in timm's config.json (`pretrained_cfg`), or None without one."""
    config = source.config(_CONFIG).section("pretrained_cfg")
    if not config:
        return None
    shape = config.get("input_size", list, [3, 224, 224])
    interpolation, mode = config.get("interpolation", str, "bicubic"), config.get("crop_mode", str, "center")
    crop = config.positive("crop_pct", float, 0.875)  # timm's default
    wrong = {
        "input_size": len(shape) != 3 or shape[1] != shape[2] or not isinstance(shape[1], int) or shape[1] < 1,
        "interpolation": interpolation not in RESAMPLING,
        "crop_mode": mode not in ("center", "squash"),
        "crop_pct": crop > 1 or (mode == "squash" and crop != 1),
    }
    if any(wrong.values()):
        bad = ", ".join(f"{name}={config.content.get(name)!r}" for name, is_wrong in wrong.items() if is_wrong)
        raise ConvertError(
            f"{config.where}: cannot prepare images that way: {bad}; pass --preprocess to say what to do instead"
        )
    side, squash = shape[1], mode == "squash"
    resize_to = 0 if squash else math.floor(side / crop)
    mean, std = config.get("mean", list), config.get("std", list)
    return checked_preprocess(
        side, "squash" if squash else "crop", RESAMPLING[interpolation], mean, std, config.where, resize_to
    )


def _details(source: Source, options: Options) -> Details:
    return Details(
        stated_names(source.config(_CONFIG)),
        notes=["left out: the classifier (head)"] if "head.weight" in source.tensors else [],
    )


# --- export ----------------------------------------------------------------------------------------------------------------


def _export(source: ExportSource) -> ExportFiles:
    arch: VisionArch = source.arch
    refuse("timm", beyond_tower(arch) | {
        f"it pools {arch.head!r}": arch.head not in ("cls", "mean"),
        f"its norms have the epsilon {arch.norm_eps}": arch.norm_eps not in (1e-6, 1e-5),
        "its patch embedding has a bias beside a norm before the blocks, or neither": arch.patch_bias == arch.pre_norm,
        "its gated MLPs have norms with the epsilon 1e-5": arch.ffn == "swiglu" and arch.norm_eps != 1e-6,
    })  # fmt: skip
    params = dict(source.params["vision"])
    apart = bool(arch.registers)  # timm's positions are then those of the patches alone
    if apart and arch.class_token:
        pos = np.asarray(params["pos"], np.float32)
        params["cls"] = np.asarray(params["cls"], np.float32) + pos[0]
    leaves = engine.export_weights({"vision": params}, rules(False, not (apart and arch.class_token), arch.head == "mean"),
                                   source.where)  # fmt: skip
    return ExportFiles({"model.safetensors": leaves, _CONFIG: _config(arch, source.preprocess, stated_tag(source))})


def _config(arch: VisionArch, preprocess: Preprocess, tag: dict[str, Any]) -> dict[str, Any]:
    """config.json: an architecture with the same blocks, and the arguments that make it this one."""
    base = "vit_giant_patch14_dinov2" if arch.ffn == "swiglu" else "vit_base_patch16_224"
    if arch.norm_eps == 1e-5:
        base = "vit_base_patch16_clip_224"
    pool = {"cls": "token", "mean": "avg"}[arch.head]
    side, columns = preprocess.image_size, arch.mlp_width * (2 if arch.ffn == "swiglu" else 1)
    args = {
        "img_size": arch.image_size, "patch_size": arch.patch_size, "embed_dim": arch.width, "depth": arch.depth,
        "num_heads": arch.heads, "mlp_ratio": (columns + 0.5) / arch.width, "init_values": None, "global_pool": pool,
        "class_token": arch.class_token, "reg_tokens": arch.registers, "no_embed_class": bool(arch.registers),
        "pre_norm": arch.pre_norm, "fc_norm": pool == "avg",
    }  # fmt: skip
    if arch.ffn == "mlp":
        args["act_layer"] = arch.activation
    return {
        "architecture": base,
        "num_classes": 0,
        "num_features": arch.width,
        "global_pool": pool,
        "model_args": args,
        "pretrained_cfg": {
            **tag,
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "interpolation": preprocess.interpolation,
            "crop_pct": side / preprocess.shortest_side,
            "crop_mode": "squash" if preprocess.resize_mode == "squash" else "center",
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


LAYOUT = Layout(
    name="timm_vit",
    kind="vision",
    detect=lambda source: source.has("patch_embed.proj.") and source.has("blocks.0.attn.qkv."),
    arch=_arch,
    rules=_source_rules,
    preprocess=_preprocess,
    details=_details,
    export=Export("timm", _export),
    options=TOWER_OPTIONS,
    config_files=(_CONFIG,),
    precedence=1,
)

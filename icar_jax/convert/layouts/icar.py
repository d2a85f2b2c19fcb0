"""The released ICAR checkpoints: OpenCLIP's names below 'clip.', and one early exit that reads the first patch.

Official `early_exit_layer` k counts from 0 and includes block k: k + 1 blocks run.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.files.tensors import OPTIMIZER_GROUPS
from icar_jax.convert.layouts.base import Details, Export, ExportFiles, ExportSource, Layout, Options, Source
from icar_jax.convert.layouts.clip_export import beyond_clip, refuse, tokenizer_files
from icar_jax.convert.layouts.open_clip import open_clip_arch, open_clip_rules, text_prefix
from icar_jax.convert.layouts.open_clip_export import published_name
from icar_jax.convert.rules import SCALAR, Rule, dropped, linear, norm, prefixed, rule
from icar_jax.convert.settings import choose_preprocess
from icar_jax.data.images import Preprocess
from icar_jax.models.clip import ClipArch

_EXIT_GROUP = "early_projection"  # of the optimizer, where the official code trains the exit


def rules(exit: int, text: str = "") -> list[Rule]:
    """Rules for an ICAR checkpoint whose exit runs `exit` blocks; `text` is the prefix of the text tower within 'clip.'."""
    return [
        *prefixed(open_clip_rules(text), "clip."),
        *norm("early_ln", f"vision/exits/{exit}/ln"),
        *linear("early_proj", f"vision/exits/{exit}/proj", bias=False),
        rule("early_temp", f"exit_logit_scale/{exit}", SCALAR),
        dropped("temp_clamp", "the limit of 100 on the logit scale"),
    ]


def arch(source: Source, options: Options) -> ClipArch:
    """CLIP's architecture with the exit that the checkpoint's config names, or --exits for a bare state dict, or none.

    Raises ConvertError where neither names it, both do and differ, or the exit lies outside the tower.
    """
    config = _config(source)
    if options.no_exits:
        if options.exits:
            raise ConvertError(f"{source.path}: --exits takes none or numbers of blocks, not both")
        return open_clip_arch(source, options, prefix="clip.", activation=_activation(config))
    layer = config.content.get("early_exit_layer")
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 0):
        raise ConvertError(f"{config.where}: early_exit_layer must be a block number, counted from 0, found {layer!r}")
    if layer is None and len(options.exits) != 1:
        raise ConvertError(
            f"{source.path} does not say where its exit is; pass --exits BLOCKS, the number of blocks it runs "
            "(early_exit_layer + 1: 13 for early_exit_layer 12)"
        )
    exit = options.exits[0] if layer is None else layer + 1
    if options.exits and tuple(options.exits) != (exit,):
        raise ConvertError(
            f"{source.path} has one trained exit, after {exit} blocks (early_exit_layer {layer}); --exits "
            f"{' '.join(map(str, options.exits))} cannot be added to it"
        )
    base = open_clip_arch(source, options, prefix="clip.", activation=_activation(config))
    if not 1 <= exit < base.vision.depth:
        raise ConvertError(f"{source.path}: an exit after {exit} blocks lies outside the tower of {base.vision.depth} blocks")
    vision = dataclasses.replace(base.vision, exits=(exit,), pool="first_patch")
    return dataclasses.replace(base, vision=vision, temperature="own")


def _config(source: Source) -> Fields:
    """The training configuration that is stored beside the state dict."""
    return Fields(f"{source.path}: config", source.weights.extra).section("config")


def _activation(config: Fields) -> str:
    """OpenCLIP's rule for a model name: QuickGELU for OpenAI's weights and for names that contain it."""
    name, pretrained = config.get("model_name", str, ""), config.get("pretrained", str, "")
    if not name:
        return ""
    return "quick_gelu" if "quickgelu" in name.lower() or pretrained == "openai" else "gelu"


def _rules(source: Source, arch: ClipArch | None) -> list[Rule]:
    text = text_prefix(source, "clip.")
    if arch and not arch.vision.exits:
        early = ("early_ln.weight", "early_ln.bias", "early_proj.weight", "early_temp", "temp_clamp")
        return [*prefixed(open_clip_rules(text), "clip."), *(dropped(name, "the exit that was left out") for name in early)]
    return rules(arch.vision.exits[0] if arch else 0, text)


def _preprocess(source: Source, options: Options, arch: ClipArch) -> Preprocess:
    size = options.image_size or arch.vision.image_size
    return choose_preprocess(options.preprocess or "icar", None, size, str(source.path))


def _details(source: Source, options: Options) -> Details:
    config = source.weights.extra.get("config")
    stated = {key: config[key] for key in ("model_name", "pretrained") if key in config} if isinstance(config, dict) else {}
    groups = source.weights.extra.get(OPTIMIZER_GROUPS, ())
    notes = []
    if groups and _EXIT_GROUP not in groups and not options.no_exits:
        notes.append(
            f"the exit was not trained: this is a baseline, whose optimizer learned {', '.join(groups)} and not {_EXIT_GROUP}; "
            "pass --exits none to leave the exit out"
        )
    return Details(origin={key: None if value is None else str(value) for key, value in stated.items()}, notes=notes)


# --- export ----------------------------------------------------------------------------------------------------------------


def _export(source: ExportSource) -> ExportFiles:
    arch = source.arch
    _require_icar(arch)
    (exit,) = arch.vision.exits
    state: dict[str, Any] = dict(engine.export_weights(source.params, rules(exit), source.where))
    state["temp_clamp"] = np.array(100.0, np.float32)
    origin = source.description.get("source", {})
    config = {
        "model_name": origin.get("model_name") or published_name(arch),
        "pretrained": origin.get("pretrained", ""),  # None of a model that began with random weights
        "early_exit_layer": exit - 1,
    }
    content = {"epoch": 0, "global_step": 0, "model_state_dict": state, "metrics": {}, "config": config}
    words, notes = tokenizer_files(source, arch.text)
    return ExportFiles({"ICAR.pt": content, **words}, notes)


def _require_icar(arch: ClipArch) -> None:
    """Raises ConvertError unless the model has the parts of a released ICAR checkpoint: one exit that reads the first patch."""
    v = arch.vision
    refuse(
        "icar",
        {
            **beyond_clip(arch),
            f"it has {len(v.exits)} early exits, the layout holds exactly one": len(v.exits) != 1,
            f"its exits pool {v.pool!r}, the layout's read the first patch": v.pool != "first_patch",
            f"its exit head has a residual ({v.exit_head})": v.exit_head != "linear",
            "its exit shares the temperature of full depth": arch.temperature != "own",
            "it has a logit bias": arch.logit_bias,
        },
    )


LAYOUT = Layout(
    name="icar",
    kind="clip",
    detect=lambda source: source.has("early_proj.", "early_ln."),
    arch=arch,
    rules=_rules,
    preprocess=_preprocess,
    details=_details,
    export=Export("icar", _export, keeps_exits=True),
    options=frozenset({"activation", "preprocess", "exits", "no_exits", "heads", "image_size", "tokenizer"}),
    precedence=2,
)

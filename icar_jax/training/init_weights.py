"""Loads the initial weights of a run (config.train.init) from an icar_jax checkpoint and adapts them to the run's architecture.

Adapted are: exits missing in the checkpoint, which are copied from its full-depth head; exits missing in the run, which are
dropped; missing residuals of exit heads, which start at zero; position embeddings, which are interpolated to another image grid
or truncated to a shorter context; and an ImageNet backbone, which gets a new complexity head. Any other difference is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint, CheckpointError
from icar_jax.config import ConfigError, from_dict
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import read_weights
from icar_jax.convert.positions import resize_positions
from icar_jax.convert.rules import Leaf
from icar_jax.data.images import Preprocess
from icar_jax.models.clip import LOGIT_BIAS_START, SIGMOID_SCALE_START, ClipArch, exit_sources
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.token_router import ScorerArch, scorer_arch
from icar_jax.training import init_errors
from icar_jax.training.start import Start, describe, find, init_error, named

_OF_AN_EXIT = ("vision/exits", "exit_logit_scale", "exit_logit_bias")
_SUMMED = {False: "one head each", True: "summed heads (exit_sum)"}
_SHOWN = 20  # maximum number of differing parameters in an error message


def adopt(arch: Any, start: Start) -> Any:
    """Returns the run's architecture with the settings that no config field sets taken from the checkpoint `start`.

    These are the activation, the number of heads and so on, in which OpenAI's and SigLIP's weights differ from the variants
    in models/variants.py. Reads only icar.json. Raises ConfigError if the sizes of the towers differ.
    """
    if not isinstance(arch, ClipArch):
        return arch
    saved = saved_clip(start)
    lines = init_errors.size_differences(arch, saved)
    if lines:
        raise init_errors.refusal(named(start), lines, init_errors.size_hints(arch, saved))
    joined = isinstance(start, Checkpoint)  # its heads are drawn at random, so no trained embedding changes
    if arch.vision.exit_sum != saved.vision.exit_sum and not joined:
        raise ConfigError(
            f"{named(start)}: the checkpoint was trained with {_SUMMED[saved.vision.exit_sum]}; "
            f"config.clip.exit_sum={arch.vision.exit_sum} would change its full-depth embeddings. Set it to "
            f"{saved.vision.exit_sum}, or train without config.train.init"
        )
    vision = {name: getattr(saved.vision, name) for name in init_errors.MANNERS if hasattr(saved.vision, name)}
    if saved.vision.head in ("map", "cls_mean"):
        vision["pool"] = saved.vision.head  # required to copy its head to the exits
    text = {name: getattr(saved.text, name) for name in (*init_errors.MANNERS, "pool") if hasattr(saved.text, name)}
    if saved.text.pool != "end":
        text["end_id"] = saved.text.end_id  # unused by these pools
    if saved.text.pool == "last" and arch.text.vocabulary < saved.text.vocabulary:
        text["vocabulary"] = saved.text.vocabulary  # SigLIP's embedding table has rows that its tokenizer does not use
    try:
        return dataclasses.replace(
            arch, vision=dataclasses.replace(arch.vision, **vision), text=dataclasses.replace(arch.text, **text)
        )
    except ValueError as error:
        raise init_error(start, error) from error


def note_preprocessing(start: Start, kind: str, preprocess: Preprocess, note: Callable[[str], None]) -> None:
    """Calls `note` if the preprocessing differs from that of the checkpoint `start`, except in image size.

    Raises ConfigError if the checkpoint cannot be read.
    """
    theirs = describe(start, kind).get("preprocess", {})
    ours = {"resize_to": 0, **preprocess.to_dict()}
    shared = [name for name in theirs if name in ours and name != "image_size" and theirs[name] != ours[name]]
    differing = [f"{name} {theirs[name]!r} in the checkpoint, {ours[name]!r} in the run" for name in shared]
    if differing:
        note(f"{named(start)}: image preprocessing differs: {'; '.join(differing)} (config.data)")


def load_params(
    start: Start,
    kind: str,
    arch: Any,
    shapes: pytree.Tree,
    fresh: Callable[[], Mapping[str, Any]] | None = None,
    note: Callable[[str], None] = logging.info,
    exit_start: str = "final",
) -> pytree.Tree:
    """Returns parameters with the paths and shapes of `shapes`, read from `start`.

    Leaves are float32; those of files are read lazily.

    Args:
        kind: 'clip' or 'complexity'.
        arch: the run's ClipArch or ComplexityArch.
        fresh: returns randomly initialised parameters. Called only for parts the checkpoint lacks: a complexity head over an
            ImageNet backbone, the residual of an exit head, or with `exit_start` 'random' a whole exit head, which is
            otherwise copied from full depth. None makes such missing parts an error.
        note: receives one line for each adaptation.

    Raises ConfigError naming config.train.init and every difference that cannot be adapted.
    """
    description, leaves = _opened(start, kind)
    if kind == "clip":
        saved = _saved_arch(start, description, ClipArch)
        leaves = _fit_clip(start, arch, saved, leaves, shapes, fresh, note, exit_start)
        lines = init_errors.size_differences(arch, saved) + init_errors.manner_differences(arch, saved)
        hints = lambda: init_errors.clip_hints(arch, saved, leaves, shapes)
    elif description["kind"] == "convnext":
        saved = _saved_arch(start, description, ConvNeXtArch)
        leaves = _fit_backbone(leaves, fresh, note)
        lines, hints = [], lambda: [init_errors.backbone_variant(saved)]
    else:
        saved = _saved_arch(start, description, ScorerArch)
        lines, hints = [], lambda: init_errors.complexity_hints(arch, saved)
    found = pytree.unflatten(leaves)
    differing = pytree.differences(shapes, found)
    if lines or differing:
        more = [f"... and {len(differing) - _SHOWN} more parameters"] if len(differing) > _SHOWN else []
        raise init_errors.refusal(named(start), [*lines, *differing[:_SHOWN], *more], hints())
    return found


def place(params: Mapping[str, Any], shardings: Mapping[str, Any]) -> pytree.Tree:
    """Returns `params` (arrays or `Leaf`s) as device arrays with `shardings`; integers keep their dtype, others become float32.

    Only one full leaf at a time is in host memory, and each device receives only its shard. With several processes each one
    must call this with the same parameters.
    """
    layout = pytree.flatten(shardings)

    def put(path: str, leaf: Any) -> jax.Array:
        host = np.asarray(leaf)
        host = host if host.dtype.kind in "iu" else host.astype(np.float32, copy=False)
        parts = layout[path].addressable_devices_indices_map(host.shape)
        # One copy per device: on CPU a device array may alias the numpy array, and the step donates its state.
        pieces = [jax.device_put(np.array(host[index]), device) for device, index in parts.items()]
        return jax.make_array_from_single_device_arrays(host.shape, layout[path], pieces).block_until_ready()

    return pytree.map_with_path(put, params)


# --- reading -----------------------------------------------------------------------------------------------------------------


def _opened(start: Start, kind: str) -> tuple[dict[str, Any], dict[str, Leaf]]:
    """The description and the parameters of a start; the files of a checkpoint are checked against their hashes first."""
    if isinstance(start, Checkpoint):
        held = pytree.flatten(start.params)
        return start.description, {name: Leaf(value.shape, (name,), lambda value=value: value) for name, value in held.items()}
    folder, description = find(start, kind), describe(start, kind)
    try:
        checkpoint.require_undamaged(folder, description)
        tensors = read_weights(folder / checkpoint.WEIGHTS).tensors
    except (CheckpointError, ConvertError) as error:
        raise init_error(start, error) from error
    return description, {name: Leaf(tensor.shape, (name,), tensor.load) for name, tensor in tensors.items()}


def saved_clip(start: Start) -> ClipArch:
    """Returns the architecture of the CLIP `start`. Raises ConfigError naming it."""
    return _saved_arch(start, describe(start, "clip"), ClipArch)


def _saved_arch(start: Start, description: Mapping[str, Any], arch: type) -> Any:
    where = f"{named(start)}: arch"
    try:
        values = description["arch"]
        return scorer_arch(values, where) if arch is ScorerArch else from_dict(values, arch, where)
    except (KeyError, TypeError, ValueError) as error:
        raise init_error(start, error) from error


# --- adapting ----------------------------------------------------------------------------------------------------------------


def _fit_clip(
    start: Start,
    arch: ClipArch,
    saved: ClipArch,
    leaves: dict[str, Leaf],
    shapes: pytree.Tree,
    fresh: Callable[[], Mapping[str, Any]] | None,
    note: Callable,
    exit_start: str,
) -> dict[str, Any]:
    """`leaves` with position embeddings of the run's sizes, exactly the run's exits, and any logit biases the run needs."""
    wanted, old, new = pytree.flatten(shapes), saved.vision, arch.vision
    where = f"{named(start)}: "
    left = () if old.exit_sum else sorted({*old.exits} - {*new.exits})  # with exit_sum full depth needs every head
    theirs = tuple(f"{part}/{exit}/" for exit in left for part in _OF_AN_EXIT)
    leaves = {name: leaf for name, leaf in leaves.items() if not f"{name}/".startswith(theirs)}
    if left:
        note(f"{where}exits {', '.join(map(str, left))} are dropped, the run has {new.exits or 'none'} (config.clip.exits)")
    grid, positions = new.image_size // new.patch_size, leaves.get("vision/pos")
    if positions is not None and grid != old.image_size // old.patch_size and old.class_token == new.class_token:
        resize = lambda: resize_positions(np.asarray(positions), grid, new.class_token)
        leaves["vision/pos"] = Leaf((grid * grid + new.class_token, positions.shape[1]), positions.sources, resize)
        note(f"{where}position embeddings resized from {old.image_size} to {new.image_size} pixels")
    context, places = arch.text.context_length, leaves.get("text/pos")
    if places is not None and context < places.shape[0]:
        leaves["text/pos"] = Leaf((context, places.shape[1]), places.sources, lambda: np.asarray(places)[:context])
        note(f"{where}text position embeddings truncated from {places.shape[0]} to {context}")
    if "logit_bias" in wanted and "logit_bias" not in leaves:
        # A logit scale learnt with softmax, up to 100, outweighs SigLIP's initial bias: every pair would count as a match.
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith("exit_logit_scale/")}
        leaves["logit_scale"] = Leaf((), (), lambda: SIGMOID_SCALE_START)
        leaves["logit_bias"] = Leaf((), (), lambda: LOGIT_BIAS_START)
        note(f"{where}no logit bias; logit scales start at {math.exp(SIGMOID_SCALE_START):g} and biases at "
             f"{LOGIT_BIAS_START:g}, as in SigLIP")  # fmt: skip
    exits_of = lambda names: ", ".join(map(str, sorted({int(name.split("/")[2]) for name in names})))
    new_heads = [target for target in wanted if target not in leaves and target.startswith("vision/exits/")]
    residuals = [target for target in new_heads if init_errors.RESIDUAL.match(target)]
    random = [target for target in new_heads if target not in residuals] if exit_start == "random" else []
    copied = {t: s for t, s in exit_sources(shapes).items() if t not in leaves and s in leaves and t not in random}
    leaves |= {target: leaves[source] for target, source in copied.items()}
    if started := [target for target in copied if target in new_heads]:
        note(f"{where}exits {exits_of(started)} are initialised from the full-depth head")
    if fresh is not None:
        values = functools.cache(lambda: pytree.flatten(fresh()))
        leaves |= {t: Leaf(wanted[t].shape, (), functools.partial(lambda t: values()[t], t)) for t in (*random, *residuals)}
        if random:
            note(f"{where}exits {exits_of(random)} are initialised randomly (config.clip.exit_start)")
        if residuals:
            note(f"{where}exits {exits_of(residuals)} get a residual ({new.exit_head}), which starts at zero")
    for tower in ("vision", "text"):
        name = f"{tower}/cross"
        if name in leaves and name not in wanted:
            del leaves[name]
            note(f"{where}the cross tokens of its {tower} tower are dropped (config.clip.reduce)")
        elif name in wanted and name not in leaves:
            shape = wanted[name].shape
            leaves[name] = Leaf(shape, (), functools.partial(np.zeros, shape, np.float32))
            note(f"{where}the cross tokens of the {tower} tower start at zero (config.clip.reduce)")
    if (new.reduce, new.schedule) != (old.reduce, old.schedule):
        shown = lambda v: v.reduce if v.reduce == "none" else f"{v.reduce} {v.schedule}"
        note(f"{where}token reduction {shown(old)} in the checkpoint, {shown(new)} here (config.clip.reduce)")
    if new.merge != old.merge:
        note(f"{where}token merging {old.merge or 'none'} in the checkpoint, {new.merge or 'none'} here (config.clip.merge)")
    return leaves


def _fit_backbone(leaves: dict[str, Leaf], fresh: Callable[[], Mapping[str, Any]] | None, note: Callable) -> dict[str, Any]:
    """A ConvNeXt backbone without its classifier, with a new complexity head."""
    if fresh is None:
        raise ValueError("an ImageNet backbone needs `fresh` parameters for the complexity head")
    head = pytree.flatten(fresh()["head"], "head")
    note("the backbone is loaded without its classifier; the complexity head is initialised randomly")
    return {f"backbone/{name}": leaf for name, leaf in leaves.items() if not name.startswith("head/fc/")} | head

"""`icar convert`: weights of another library become a self-describing checkpoint.

The source is opened, its architecture read and its tensors matched before anything is written; values are then read and written
one parameter at a time, and the destination is replaced only by a complete checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint
from icar_jax.config import from_dict
from icar_jax.convert import rules as engine
from icar_jax.convert import vocabulary
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.layouts import hf, icar, open_clip, siglip, timm
from icar_jax.convert.parity import verify
from icar_jax.convert.positions import resize_positions
from icar_jax.convert.rules import Leaf, Rule
from icar_jax.convert.settings import choose_preprocess
from icar_jax.convert.source import Source, open_source
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch, exit_sources
from icar_jax.models.complexity import ComplexityModel
from icar_jax.models.convnext import ConvNeXt
from icar_jax.models.vision import POOLS


@dataclass(frozen=True)
class Options:
    """What the user says about a source; everything may stay empty where the source says it itself."""

    activation: str = ""  # gelu | gelu_tanh | quick_gelu
    preprocess: str = ""  # preset of settings.PRESETS, or a JSON file
    exits: tuple[int, ...] = ()  # executed blocks; for a plain CLIP exits are added, started from the final head
    pool: str = ""  # token of the added exits; empty: cls, or map for SigLIP
    heads: tuple[int, ...] = ()  # (vision, text) attention heads
    image_size: int = 0  # pixels; another than the source's resizes the position embeddings
    tokenizer: str = ""  # tokenizer.json or CLIP's merges file

    def given(self) -> set[str]:
        """Names of the fields that were set."""
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


# What a user may say of a source besides these makes no difference to it, and is refused rather than ignored.
_MEANT = {
    "timm": {"preprocess", "image_size"},
    "icc": {"preprocess", "image_size"},
    "icar": {"activation", "preprocess", "exits", "heads", "image_size", "tokenizer"},
}


@dataclass
class ConversionResult:
    """A source as this library sees it, not yet written: `params` has lazy leaves."""

    kind: str
    arch: Any
    params: pytree.Tree
    preprocess: Preprocess
    tokenizer: Tokenizer | None = None
    origin: dict[str, Any] = field(default_factory=dict)  # what the source says it was made from
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of icar.json
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What was written, for the user to read."""

    path: Path
    layout: str
    description: dict[str, Any]
    parameters: int
    differences: list[verify.Difference]
    notes: list[str]

    def summary(self) -> str:
        """What was read from the source, a line each, so that a person can see whether it is what they meant."""
        d, lines = self.description, [f"Source: {self.layout} layout, {self.parameters:,} parameters"]
        lines += [f"  {name}: {_line(part)}" for name, part in d["arch"].items() if isinstance(part, dict)]
        if not any(isinstance(part, dict) for part in d["arch"].values()):
            lines.append(f"  model: {_line(d['arch'])}")
        lines.append(f"  images: {_line(d['preprocess'])}")
        lines += [f"  {name}: {d[name]}" for name in ("tokenizer", "threshold") if name in d]
        return "\n".join(lines)


def convert(
    source: str | os.PathLike, dest: str | os.PathLike, options: Options = Options(), reference: str | os.PathLike = ""
) -> Report:
    """Converts `source` (a file or a folder of another library) into a checkpoint at `dest`.

    With `reference`, an .npz of `icar reference`, the converted model is compared with it first. Raises ConvertError for
    anything that does not fit, and CheckpointError where `dest` holds something else; nothing is written then.
    """
    if checkpoint.is_own(source):
        return _retokenize(Path(source), Path(dest), options, reference)
    opened = open_source(source)
    made = read(opened, options)
    checkpoint.require_replaceable(dest, made.kind)
    differences, description = [], _description(opened, made)
    if reference:
        made.params = pytree.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), made.params)
        loaded = verify.read_reference(reference)
        differences = verify.compare(made.kind, made.arch, made.params, loaded, source_sha256=description["source"]["sha256"])
        verify.require_equal(differences)
        if opened.layout != "icar" and options.exits:
            made.notes.append("the added exits have no counterpart in the source, so the comparison does not cover them")
    leaves = pytree.flatten(made.params)
    with tqdm(total=len(leaves), desc="convert", unit="tensor", leave=False) as bar:
        _write(dest, made, description, lambda name: bar.update())
    path = Path(dest)
    return Report(path, opened.layout, checkpoint.describe(path), pytree.count(made.params), differences, made.notes)


def in_memory(source: str | os.PathLike, options: Options = Options()) -> Checkpoint:
    """The checkpoint that `convert` would write, without writing it; parameters are float32 numpy arrays.

    Raises ConvertError for anything that does not fit.
    """
    opened = open_source(source)
    made = read(opened, options)
    for note in made.notes:
        logging.warning("%s: %s", source, note)
    params = pytree.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), made.params)
    bad = [path for path, leaf in pytree.flatten(params).items() if not np.isfinite(leaf).all()]
    if bad:
        raise _not_finite(made, bad)
    description = {"format": checkpoint.FORMAT, "kind": made.kind, **_description(opened, made)}
    given = {name: getattr(options, name) for name in sorted(options.given())}
    description["hashes"] = {checkpoint.WEIGHTS: f"{description['source']['sha256']} {given}"}
    tokenizer = made.tokenizer.to_json() if made.tokenizer else None
    return Checkpoint(Path(source), made.kind, description, params, tokenizer)


def _description(opened: Source, made: ConversionResult) -> dict[str, Any]:
    file = opened.weights.path
    described = {"layout": opened.layout, "file": file.name, "sha256": verify.weights_sha256(file)}
    return {
        "arch": dataclasses.asdict(made.arch),
        "preprocess": made.preprocess.to_dict(),
        "source": described | made.origin,
        **made.extra,
    }


def _line(part: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in part.items())


def _write(
    dest: str | os.PathLike, made: ConversionResult, description: dict[str, Any], on_leaf: Callable[[str], None]
) -> None:
    tokenizer = made.tokenizer.to_json() if made.tokenizer else None
    try:
        checkpoint.write(dest, made.kind, description, made.params, tokenizer, on_leaf)
    except checkpoint.NotFinite as error:
        raise _not_finite(made, error.names) from error


def _not_finite(made: ConversionResult, paths: Sequence[str]) -> ConvertError:
    leaves = pytree.flatten(made.params)
    names = [name for path in paths for name in getattr(leaves[path], "sources", (path,))]
    return ConvertError(
        "the source holds NaN, infinity or numbers beyond float32, nothing was written: "
        f"{', '.join(names[:10])} ({len(names)} tensors)"
    )


def read(source: Source, options: Options = Options()) -> ConversionResult:
    """Everything about a source but its values. Raises ConvertError listing what does not fit."""
    idle = options.given() - _MEANT.get(source.layout, options.given())
    if idle:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(idle))
        raise ConvertError(f"{source.path} ({source.layout} layout) has no use for {flags}; leave it out")
    if options.pool and not options.exits:
        raise ConvertError(f"--pool={options.pool} says what added exits read; pass --exits with it, or leave it out")
    if options.image_size < 0:
        raise ConvertError(f"--image-size={options.image_size} must be a positive number of pixels")
    if source.layout == "timm":
        return _read_convnext(source, options)
    if source.layout == "icc":
        return _read_classifier(source, options)
    return _read_clip(source, options)


def _read_clip(source: Source, options: Options) -> ConversionResult:
    if source.layout == "icar":
        arch = _architecture(source, options, icar.arch, icar.rules(0, open_clip.text_prefix(source, "clip.")))
        rules = icar.source_rules(source, arch)
    elif source.layout == "siglip":
        arch = _architecture(source, options, siglip.arch, rules := siglip.rules())
    elif source.layout == "hf_clip":
        arch = _architecture(source, options, hf.clip_arch, rules := hf.clip_rules())
    else:
        activation = "quick_gelu" if source.layout == "openai" else ""
        rules = open_clip.open_clip_rules(open_clip.text_prefix(source))
        arch = _architecture(source, options, partial(open_clip.open_clip_arch, activation=activation), rules)
    preprocess = _clip_preprocess(source, options, arch)
    leaves = engine.import_weights(source.tensors, rules, Clip.graph(arch).shapes, str(source.path))
    arch, leaves = _resize(arch, leaves, options.image_size)
    arch, leaves = _add_exits(source, arch, leaves, options)
    tokenizer, origin = vocabulary.find_tokenizer(source, options.tokenizer, arch.text)
    made = ConversionResult("clip", arch, pytree.unflatten(leaves), preprocess, tokenizer)
    config = source.weights.extra.get("config") if source.layout == "icar" else None
    if isinstance(config, dict):
        made.origin = {key: str(config[key]) for key in ("model_name", "pretrained") if key in config}
    if tokenizer is None:
        made.notes.append(origin)
    else:
        made.extra["tokenizer"] = origin
    return made


def _architecture(source: Source, options: Options, read_arch: Callable, rules: Sequence[Rule]) -> Any:
    """The architecture; where it cannot be read, the error also lists the names that no rule knows (a renamed tensor, say)."""
    try:
        return read_arch(source, options)
    except ConvertError as error:
        lines = engine.unknown_keys(source.tensors, rules)
        if lines:
            raise ConvertError("\n  ".join([str(error), *lines[:10]])) from error
        raise


def _clip_preprocess(source: Source, options: Options, arch: ClipArch) -> Preprocess:
    size, where = options.image_size or arch.vision.image_size, str(source.path)
    if source.layout == "icar":
        return choose_preprocess(options.preprocess or "icar", None, size, where)
    if source.layout in ("hf_clip", "siglip"):
        pixels = hf.stated_pixels(source)
        if pixels and not options.image_size:
            size = pixels  # SigLIP at 384 pixels with patches of 14: the convolution leaves the last 6 out
        find = hf.found_preprocess
    else:
        find = partial(open_clip.found_preprocess, image_size=size)
    # A preparation that cannot be expressed here must not stand in the way of --preprocess.
    return choose_preprocess(options.preprocess, None if options.preprocess else find(source), size, where)


def _resize(arch: ClipArch, leaves: dict[str, Leaf], image_size: int) -> tuple[ClipArch, dict[str, Leaf]]:
    vision = arch.vision
    if not image_size or image_size == vision.image_size:
        return arch, leaves
    if image_size < vision.patch_size or image_size % vision.patch_size:
        raise ConvertError(f"--image-size={image_size} is not a multiple of the patch size {vision.patch_size}")
    grid = image_size // vision.patch_size
    old = leaves["vision/pos"]
    new = Leaf(
        (grid * grid + vision.class_token, vision.width),
        old.sources,
        lambda: resize_positions(np.asarray(old), grid, vision.class_token),
    )
    return dataclasses.replace(arch, vision=dataclasses.replace(vision, image_size=image_size)), {**leaves, "vision/pos": new}


def _add_exits(source: Source, arch: ClipArch, leaves: dict[str, Leaf], options: Options) -> tuple[ClipArch, dict[str, Leaf]]:
    """Exit heads that start from the head of the full tower, each with a temperature of its own."""
    if source.layout == "icar" or not options.exits:
        return arch, leaves
    pool = options.pool or ("map" if arch.vision.head == "map" else "cls")
    if pool not in POOLS:
        raise ConvertError(f"--pool={pool} must be one of {', '.join(POOLS)}")
    try:
        vision = dataclasses.replace(arch.vision, exits=tuple(sorted(options.exits)), pool=pool)
    except ValueError as error:
        raise ConvertError(f"--exits {' '.join(map(str, options.exits))}: {error}") from error
    arch = dataclasses.replace(arch, vision=vision)
    sources = exit_sources(Clip.graph(arch).shapes)
    return arch, {**leaves, **{path: leaves[full] for path, full in sources.items()}}


def _read_convnext(source: Source, options: Options) -> ConversionResult:
    arch = timm.arch(source)
    timm.require_supported(source)
    shapes = ConvNeXt.graph(arch).shapes
    leaves = engine.import_weights(source.tensors, timm.rules(timm.has_conv_mlp(source)), shapes, str(source.path))
    found = None if options.preprocess else timm.found_preprocess(source)
    size = options.image_size or (found.image_size if found else timm.INPUT_SIZE)
    preprocess = choose_preprocess(options.preprocess, found, size, str(source.path))
    extra = {"conv_mlp": timm.has_conv_mlp(source)}
    notes = [] if options.preprocess else timm.notes(source)
    return ConversionResult("convnext", arch, pytree.unflatten(leaves), preprocess, extra=extra, notes=notes)


def _read_classifier(source: Source, options: Options) -> ConversionResult:
    arch = timm.classifier_arch(source, options)
    conv_mlp = timm.has_conv_mlp(source, "backbone.")
    leaves = engine.import_weights(
        source.tensors, timm.classifier_rules(conv_mlp), ComplexityModel.graph(arch).shapes, str(source.path)
    )
    made = ConversionResult("complexity", arch, pytree.unflatten(leaves), timm.classifier_preprocess(source, options))
    made.extra["conv_mlp"] = conv_mlp
    hparams = Fields(str(source.path), source.weights.extra).section("hparams")
    threshold = hparams.get("threshold", float)
    if threshold is None:
        made.notes.append("the classifier brings no threshold; name one with `icar bundle --thresholds`")
    elif not 0 <= threshold <= 1:
        raise ConvertError(f"{hparams.where}: threshold must lie in [0, 1], found {threshold}")
    else:
        made.extra["threshold"] = threshold
    return made


def _retokenize(source: Path, dest: Path, options: Options, reference: str | os.PathLike) -> Report:
    """A checkpoint of this library with another tokenizer; everything else stays."""
    if options.given() != {"tokenizer"} or reference:
        raise ConvertError(f"{source} is an icar_jax checkpoint already; only --tokenizer can be given to it")
    folder = checkpoint.find(source)
    if folder.resolve() != source.resolve() or checkpoint.describe(folder)["kind"] == "bundle":
        inner = folder / "clip" if checkpoint.describe(folder)["kind"] == "bundle" else folder
        raise ConvertError(f"{source} holds its CLIP in {inner}; name that folder, as source and as destination")
    loaded = checkpoint.read(folder, "clip")
    arch = from_dict(loaded.description["arch"], ClipArch, f"{source}: arch")
    tokenizer = vocabulary.open_tokenizer(Path(options.tokenizer), arch.text)
    kept = {k: v for k, v in loaded.description.items() if k not in ("format", "kind", "hashes")}
    description = {**kept, "tokenizer": options.tokenizer}
    checkpoint.write(dest, "clip", description, loaded.params, tokenizer.to_json())
    return Report(dest, "icar_jax", checkpoint.describe(dest), pytree.count(loaded.params), [], [])

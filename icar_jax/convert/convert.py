"""`icar convert`: converts weights of another library to a self-describing checkpoint.

The architecture is read and all tensors are matched before anything is written. Values are then read and written one parameter
at a time, and the destination is replaced only by a complete checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint
from icar_jax.config import from_dict
from icar_jax.convert import rules as engine
from icar_jax.convert import towers, vocabulary
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import EMA_KEYS, PLAIN_KEYS
from icar_jax.convert.hub import download as hub
from icar_jax.convert.layouts import registry
from icar_jax.convert.layouts.base import OF_SOURCES, Details, Layout, Options, Source
from icar_jax.convert.parity import verify
from icar_jax.convert.source import open_source
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.complexity import ComplexityModel
from icar_jax.models.convnext import ConvNeXt
from icar_jax.models.text import TextArch, TextTower

_MODULES: dict[str, type[ComplexityModel] | type[ConvNeXt]] = {"complexity": ComplexityModel, "convnext": ConvNeXt}


@dataclass
class ConversionResult:
    """A converted model before it is written; leaves of `params` are lazy."""

    kind: str  # of the checkpoint
    arch: Any  # ClipArch, VisionArch, TextArch, ComplexityArch or ConvNeXtArch
    params: pytree.Tree
    preprocess: Preprocess | None  # None for a text tower
    tokenizer: Tokenizer | None = None
    adds_exits: bool = False  # that the source does not have
    origin: dict[str, Any] = field(default_factory=dict)  # what the source was made from, as it states
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of icar.json
    notes: list[str] = field(default_factory=list)  # warnings


@dataclass(frozen=True)
class Report:
    """The result of `convert`: the checkpoint that was written, and what the user should know of it."""

    path: Path
    layout: str  # of the source
    description: dict[str, Any]  # content of icar.json
    parameters: int  # number of values
    differences: list[verify.Difference]  # from the reference; empty without one
    notes: list[str]  # warnings

    def summary(self) -> str:
        """What was read from the source, one line per part, for the user to check."""
        d, lines = self.description, [f"Source: {self.layout} layout, {self.parameters:,} parameters"]
        lines += [f"  {name}: {_line(part)}" for name, part in d["arch"].items() if isinstance(part, dict)]
        if not any(isinstance(part, dict) for part in d["arch"].values()):
            lines.append(f"  model: {_line(d['arch'])}")
        if "preprocess" in d:
            lines.append(f"  images: {_line(d['preprocess'])}")
        lines += [f"  {name}: {d[name]}" for name in ("tokenizer", "threshold") if name in d]
        return "\n".join(lines)


def convert(
    source: str | os.PathLike, dest: str | os.PathLike, options: Options = Options(), reference: str | os.PathLike = ""
) -> Report:
    """Converts `source` (a file or a folder of another library) to a checkpoint of float32 parameters at `dest`.

    `source` may be a name on the Hugging Face hub (owner/name, hf://owner/name@revision), which is downloaded first. It may
    also be a checkpoint of this library, to give it another `options.tokenizer`. With `reference`, an .npz file of `icar
    reference`, the outputs of the converted model are compared with it before anything is written. Raises ConvertError for
    anything that does not fit, and CheckpointError where `dest` holds something else; nothing is written then.
    """
    source = hub.local(source)
    if checkpoint.is_own(source):
        return _retokenize(Path(source), Path(dest), options, reference)
    opened = open_source(source, options.base, options.weights)
    made = read(opened, options)
    checkpoint.require_replaceable(dest, made.kind)
    differences, description = [], _description(opened, made)
    if reference:
        made.params = pytree.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), made.params)
        loaded = verify.read_reference(reference)
        differences = verify.compare(made.kind, made.arch, made.params, loaded, source_sha256=description["source"]["sha256"])
        verify.require_equal(differences)
        if made.adds_exits:
            made.notes.append("the added exits have no counterpart in the source, so the comparison does not cover them")
    leaves = pytree.flatten(made.params)
    with tqdm(total=len(leaves), desc="convert", unit="tensor", leave=False) as bar:
        _write(dest, made, description, lambda name: bar.update())
    path = Path(dest)
    return Report(path, opened.layout, checkpoint.describe(path), pytree.count(made.params), differences, made.notes)


def in_memory(source: str | os.PathLike, options: Options = Options()) -> Checkpoint:
    """The checkpoint that `convert` would write, in memory; parameters are float32 numpy arrays.

    Raises ConvertError for anything that does not fit.
    """
    opened = open_source(source, options.base, options.weights)
    made = read(opened, options)
    for note in made.notes:
        logging.warning("%s: %s", source, note)
    params = pytree.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), made.params)
    bad = [path for path, leaf in pytree.flatten(params).items() if not np.isfinite(leaf).all()]
    if bad:
        raise _not_finite(made, bad)
    description = {"format": checkpoint.FORMAT, "kind": made.kind, **_description(opened, made)}
    given = {name: getattr(options, name) for name in sorted(options.given())}
    read_from = [part["sha256"] for part in (description["source"], description["source"].get("adapter")) if part]
    description["hashes"] = {checkpoint.WEIGHTS: f"{' '.join(read_from)} {given}"}
    tokenizer = made.tokenizer.to_json() if made.tokenizer else None
    return Checkpoint(Path(source), made.kind, description, params, tokenizer)


def _description(opened: Source, made: ConversionResult) -> dict[str, Any]:
    file = opened.weights.path
    described = {"layout": opened.layout, "file": file.name, "sha256": verify.weights_sha256(file), **hub.origin_of(file)}
    pixels = {} if made.preprocess is None else {"preprocess": made.preprocess.to_dict()}
    return {
        "arch": dataclasses.asdict(made.arch),
        **pixels,
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
    """The source converted without its values: leaves of `params` are read when used.

    Raises ConvertError for options without effect and for weights that do not fit the architecture, listing all faults.
    """
    layout = registry.named(source.layout)
    idle = options.given() - layout.options - OF_SOURCES
    if idle:
        flags = ", ".join("--exits none" if name == "no_exits" else f"--{name.replace('_', '-')}" for name in sorted(idle))
        raise ConvertError(f"{source.path} ({source.layout} layout) has no use for {flags}; leave it out")
    if options.pool and not options.exits:
        raise ConvertError(f"--pool={options.pool} says what added exits read; pass --exits with it, or leave it out")
    if options.image_size < 0:
        raise ConvertError(f"--image-size={options.image_size} must be a positive number of pixels")
    if wanted := {"clip": 2, "vision": 1}.get(layout.kind, 0):
        if options.heads and len(options.heads) != wanted:
            need = "two numbers, VISION TEXT" if wanted == 2 else "one number, for there is one tower"
            raise ConvertError(f"{source.path} ({source.layout} layout): --heads takes {need}; found {len(options.heads)}")
    made = {"clip": _read_clip, "vision": _read_vision, "text": _read_text}.get(layout.kind, _read_convnext)(
        source, layout, options
    )
    return _with_details(_with_details(made, _of_files(source)), layout.details(source, options))


def _of_files(source: Source) -> Details:
    """What was read of several state dicts, and the adapter that was merged."""
    weights, adapter, notes, origin = source.weights, source.adapter, [], {}
    if weights.others:
        origin["state_dict"] = weights.key
        kinds = {"--weights ema": EMA_KEYS, "--weights plain": PLAIN_KEYS}
        other = [flag for flag, keys in kinds.items() if weights.key not in keys and set(keys) & set(weights.others)]
        how = f" ({other[0]} takes the others)" if other else ""
        notes.append(
            f"{weights.path.name} holds several state dicts: {weights.key} was taken, not {', '.join(weights.others)}{how}"
        )
    if adapter is not None:
        origin["adapter"] = {
            "file": adapter.path.name, "sha256": verify.weights_sha256(adapter.path), "rank": adapter.rank,
            **hub.origin_of(adapter.path),
        }  # fmt: skip
        notes.append(f"merged the LoRA adapter {adapter.path.name} of rank {adapter.rank} into {adapter.changed} tensors")
    return Details(origin=origin, notes=notes)


def _read_clip(source: Source, layout: Layout, options: Options) -> ConversionResult:
    made = _read_vision(source, layout, options)
    return _with_tokenizer(made, source, layout, options, made.arch.text)


def _read_text(source: Source, layout: Layout, options: Options) -> ConversionResult:
    arch = _architecture(source, layout, options)
    shapes = {"text": TextTower.graph(arch).shapes}
    leaves = engine.import_weights(source.tensors, layout.rules(source, arch), shapes, str(source.path))
    made = ConversionResult(layout.kind, arch, pytree.unflatten(leaves), None)
    return _with_tokenizer(made, source, layout, options, arch)


def _with_tokenizer(
    made: ConversionResult, source: Source, layout: Layout, options: Options, text: TextArch
) -> ConversionResult:
    find_tokenizer = layout.tokenizer or vocabulary.find_tokenizer
    made.tokenizer, origin = find_tokenizer(source, options.tokenizer, text)
    if made.tokenizer is None:
        made.notes.append(origin)
        if cleaning := vocabulary.stated_cleaning(source):  # for the tokenizer that is added later
            made.origin["cleaning"] = cleaning
    else:
        made.extra["tokenizer"] = origin
    return made


def _read_vision(source: Source, layout: Layout, options: Options) -> ConversionResult:
    """A vision tower, alone or with the rest of its CLIP."""
    arch = _architecture(source, layout, options)
    preprocess = layout.preprocess(source, options, arch)
    leaves = engine.import_weights(source.tensors, layout.rules(source, arch), towers.shapes_of(arch), str(source.path))
    arch, leaves, origin = towers.resize(arch, leaves, options.image_size, layout.antialiased(arch))
    adds_exits = bool(options.exits) and not towers.vision_of(arch).exits
    if adds_exits:
        arch, leaves = towers.add_exits(arch, leaves, options.exits, options.pool)
    return ConversionResult(
        layout.kind, arch, pytree.unflatten(leaves), preprocess, adds_exits=adds_exits, origin=dict(origin)
    )  # fmt: skip


def _read_convnext(source: Source, layout: Layout, options: Options) -> ConversionResult:
    arch = layout.arch(source, options)
    shapes = _MODULES[layout.kind].graph(arch).shapes
    leaves = engine.import_weights(source.tensors, layout.rules(source, arch), shapes, str(source.path))
    return ConversionResult(layout.kind, arch, pytree.unflatten(leaves), layout.preprocess(source, options, arch))


def _with_details(made: ConversionResult, details: Details) -> ConversionResult:
    made.origin |= details.origin
    made.extra |= details.extra
    made.notes += details.notes
    return made


def _architecture(source: Source, layout: Layout, options: Options) -> Any:
    """The architecture; where it cannot be read, the error also lists names that no rule matches, such as renamed tensors."""
    try:
        return layout.arch(source, options)
    except ConvertError as error:
        lines = engine.unknown_keys(source.tensors, layout.rules(source, None))
        if lines:
            raise ConvertError("\n  ".join([str(error), *lines[:10]])) from error
        raise


def _retokenize(source: Path, dest: Path, options: Options, reference: str | os.PathLike) -> Report:
    """Writes a checkpoint of this library with another tokenizer and nothing else changed."""
    if options.given() != {"tokenizer"} or reference:
        raise ConvertError(f"{source} is an icar_jax checkpoint already and used as it is; only --tokenizer can be given to it")
    folder = checkpoint.find(source)
    if folder.resolve() != source.resolve() or checkpoint.describe(folder)["kind"] == "bundle":
        inner = folder / "clip" if checkpoint.describe(folder)["kind"] == "bundle" else folder
        raise ConvertError(f"{source} holds its CLIP in {inner}; name that folder, as source and as destination")
    kind = checkpoint.describe(folder)["kind"]
    loaded = checkpoint.read(folder, "text" if kind == "text" else "clip")
    arch = loaded.description["arch"]["text"] if kind == "clip" else loaded.description["arch"]
    text = from_dict(arch, TextArch, f"{source}: arch")
    cleaning = loaded.description.get("source", {}).get("cleaning")
    tokenizer = vocabulary.open_tokenizer(Path(options.tokenizer), text, cleaning)
    kept = {k: v for k, v in loaded.description.items() if k not in ("format", "kind", "hashes")}
    description = {**kept, "tokenizer": options.tokenizer}
    checkpoint.write(dest, loaded.kind, description, loaded.params, tokenizer.to_json())
    return Report(dest, "icar_jax", checkpoint.describe(dest), pytree.count(loaded.params), [], [])

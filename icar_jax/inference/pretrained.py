"""The public `icar_jax.Clip` module: reads checkpoints of several libraries and writes icar_jax checkpoints."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint, CheckpointError
from icar_jax.config import from_dict
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import clip as clip_module
from icar_jax.models.clip import ClipArch
from icar_jax.models.encoders import LoneArch, TextModel, VisionModel
from icar_jax.models.functional import Graph
from icar_jax.models.sizes import require_depths
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch


class Clip(clip_module.Clip):
    __doc__ = clip_module.Clip.__doc__

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, dtype: Any = "float32", **options: Any) -> Self:
        """Loads a CLIP from an icar_jax checkpoint, bundle or workdir, or from Hugging Face, OpenCLIP or OpenAI weights.

        `path` may be the name of either on the Hugging Face hub (owner/name, hf://owner/name@revision). Weights of other
        libraries are converted in memory; nothing is written. `dtype` is the dtype of activations. `options` give what such
        weights do not specify, as the flags of `icar convert`: activation, exits, heads, image_size, pool, preprocess.
        `icar_jax.load(path)` also loads the preprocessing and the tokenizer.

        Raises CheckpointError or ConvertError, which name what was expected at `path` and what was found.
        """
        loaded = read_pretrained(path, ("clip",), **options)
        return clip_graph(loaded, dtype, cls).merge(jax.device_put(loaded.params))

    def save(
        self, path: str | os.PathLike, *, preprocess: Preprocess, tokenizer: Tokenizer | None = None, **description: Any
    ) -> Path:
        """Writes a checkpoint for `load`, `from_pretrained`, `icar bundle` and `icar export`; returns its folder.

        `preprocess` is the preprocessing of the training images. `description` adds JSON entries to icar.json.
        Raises ValueError for parameters that `arch` does not have, such as unmerged LoRA weights; CheckpointError for a
        structure that a checkpoint cannot describe (a different activation in one block), for another image size, and for a
        folder that contains something else; NotFinite for NaN and infinity.
        """
        graph, params = self.split()
        params = pytree.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), params)
        pytree.require_same(Clip.graph(self.arch).shapes, params, "the parameters of this module")
        vision = self.vision
        types = {"dtype": vision.dtype, "param_dtype": vision.patch.param_dtype, "execution": vision.execution}
        if graph != type(self).graph(self.arch, **types):
            raise CheckpointError(
                "this module differs from its `arch` (another activation, attention, block or dtype), and a checkpoint "
                "describes only the `arch`; pickle the module instead, or save its parameters"
            )
        if preprocess.image_size != self.arch.vision.image_size:
            raise CheckpointError(
                f"preprocess makes images of {preprocess.image_size} pixels, but this tower takes {self.arch.vision.image_size}"
            )
        about = {**description, "arch": dataclasses.asdict(self.arch), "preprocess": preprocess.to_dict()}
        return checkpoint.write(path, "clip", about, params, tokenizer.to_json() if tokenizer is not None else None)


def read_pretrained(path: str | os.PathLike, kinds: tuple[str, ...], **options: Any) -> Checkpoint:
    """Reads a checkpoint of one of `kinds`; a bundle gives its part of kinds[0], other libraries' weights are converted.

    Raises CheckpointError, and ConvertError for weights of other libraries.
    """
    path = local(path)
    if path.exists() and not checkpoint.is_own(path):
        from icar_jax.convert import convert

        loaded = convert.in_memory(path, _options(options))
        if loaded.kind not in kinds:
            join = "; convert it, and `icar join` makes a CLIP of two towers" if loaded.kind in ("vision", "text") else ""
            raise CheckpointError(f"{path} is a {loaded.kind} model, expected {' or '.join(kinds)}{join}")
        return loaded
    if options:
        raise CheckpointError(f"{path} is an icar_jax checkpoint and needs no options; leave out {', '.join(options)}")
    folder = checkpoint.find(path, (*kinds, "bundle"))
    kind = checkpoint.describe(folder)["kind"]
    return checkpoint.read(folder / kinds[0], kinds[0]) if kind == "bundle" else checkpoint.read(folder, kind)


def local(path: str | os.PathLike) -> Path:
    """As `icar_jax.convert.hub.download.local`: `path`, or what was downloaded of the repository that it names."""
    if os.path.exists(path):  # then there is nothing to import, which would take time at every start
        return Path(path)
    from icar_jax.convert.hub import download

    return download.local(path)


def _options(given: dict[str, Any]) -> Any:
    from icar_jax.convert import convert

    known = {field.name for field in dataclasses.fields(convert.Options)}
    if unknown := sorted(set(given) - known):
        raise TypeError(f"unknown options {', '.join(unknown)}; expected {', '.join(sorted(known))}")
    return convert.Options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def clip_graph(loaded: Checkpoint, dtype: Any, module: type[Clip] = Clip) -> Graph[Clip]:
    """The structure that a checkpoint describes. Raises CheckpointError if its parameters do not match."""
    return _checked(module, from_dict(loaded.description["arch"], ClipArch, f"{loaded.path}: arch"), dtype, loaded)


def tower_graph(loaded: Checkpoint, dtype: Any) -> Graph:
    """As `clip_graph`, also for a tower alone."""
    if loaded.kind == "clip":
        return clip_graph(loaded, dtype)
    kind = {"vision": VisionArch, "text": TextArch}[loaded.kind]
    arch = LoneArch(**{loaded.kind: from_dict(loaded.description["arch"], kind, f"{loaded.path}: arch")})
    return _checked(MODULES[loaded.kind], arch, dtype, loaded)


def _checked(module: Any, arch: Any, dtype: Any, loaded: Checkpoint) -> Graph:
    require_depths(arch, loaded.params, str(loaded.path))
    graph = module.graph(arch, dtype=dtype)
    pytree.require_same(graph.shapes, loaded.params, str(loaded.path))
    return graph


MODULES: dict[str, type[Clip] | type[VisionModel] | type[TextModel]] = {"clip": Clip, "vision": VisionModel, "text": TextModel}

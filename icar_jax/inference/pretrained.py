"""The CLIP that `icar_jax` exports: the module, read from any checkpoint and written as one of ours."""

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
from icar_jax.models.functional import Graph


class Clip(clip_module.Clip):
    __doc__ = clip_module.Clip.__doc__

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, *, dtype: Any = "float32", **options: Any) -> Self:
        """The CLIP at `path`: a checkpoint, bundle or workdir of ours, or a folder or file of Hugging Face, OpenCLIP or OpenAI.

        What is not ours is converted in memory; nothing is written. `dtype` is that of activations. `options` say what such a
        source leaves open, as the flags of `icar convert` do: activation, exits, heads, image_size, pool, preprocess.
        `icar_jax.load(path)` gives the preprocessing and the tokenizer as well.

        Raises CheckpointError or ConvertError saying what was expected at `path` and what was found.
        """
        loaded = read(path, ("clip",), **options)
        return clip_graph(loaded, dtype, cls).merge(jax.device_put(loaded.params))

    def save(
        self, path: str | os.PathLike, *, preprocess: Preprocess, tokenizer: Tokenizer | None = None, **description: Any
    ) -> Path:
        """Writes a checkpoint that `load`, `from_pretrained`, `icar bundle` and `icar export` read; returns its folder.

        `preprocess` is how the images were prepared that this model learnt from. `description` adds JSON entries to icar.json.
        Raises ValueError for parameters that are not those of `arch`, such as LoRA's, which have to be merged first;
        CheckpointError for a structure that a checkpoint cannot describe, such as another activation in one block, for images
        of another size, and for a folder that holds something else; NotFinite for NaN and infinity.
        """
        graph, params = self.split()
        params = pytree.map_with_path(lambda _, leaf: np.asarray(leaf, np.float32), params)
        pytree.require_same(Clip.graph(self.arch).shapes, params, "the parameters of this module")
        vision = self.vision
        types = {"dtype": vision.dtype, "param_dtype": vision.patch.param_dtype, "execution": vision.execution}
        if graph != type(self).graph(self.arch, **types):
            raise CheckpointError(
                "this module computes otherwise than its `arch` says (another activation, attention, block or dtype), "
                "and a checkpoint describes the `arch` alone; pickle the module instead, or save its parameters"
            )
        if preprocess.image_size != self.arch.vision.image_size:
            raise CheckpointError(
                f"preprocess makes images of {preprocess.image_size} pixels, and this tower takes {self.arch.vision.image_size}"
            )
        about = {**description, "arch": dataclasses.asdict(self.arch), "preprocess": preprocess.to_dict()}
        return checkpoint.write(path, "clip", about, params, tokenizer.to_json() if tokenizer is not None else None)


def read(path: str | os.PathLike, kinds: tuple[str, ...], **options: Any) -> Checkpoint:
    """The checkpoint of one of `kinds` at `path`, whose CLIP is meant where it is a bundle; others' are converted in memory.

    Raises CheckpointError, and ConvertError for what is not ours.
    """
    if Path(path).exists() and not checkpoint.is_own(path):
        from icar_jax.convert import convert

        loaded = convert.in_memory(path, _options(options))
        if loaded.kind not in kinds:
            raise CheckpointError(f"{path} holds a {loaded.kind} model, expected {' or '.join(kinds)}")
        return loaded
    if options:
        raise CheckpointError(f"{path} is icar_jax's own and says everything itself; leave out {', '.join(options)}")
    folder = checkpoint.find(path, (*kinds, "bundle"))
    kind = checkpoint.describe(folder)["kind"]
    return checkpoint.read(folder / kinds[0], kinds[0]) if kind == "bundle" else checkpoint.read(folder, kind)


def _options(given: dict[str, Any]) -> Any:
    from icar_jax.convert import convert

    known = {field.name for field in dataclasses.fields(convert.Options)}
    if unknown := sorted(set(given) - known):
        raise TypeError(f"unknown options {', '.join(unknown)}; a source takes {', '.join(sorted(known))}")
    return convert.Options(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def clip_graph(loaded: Checkpoint, dtype: Any, module: type[Clip] = Clip) -> Graph[Clip]:
    """The structure that a checkpoint describes. Raises CheckpointError where its parameters are others."""
    graph = module.graph(from_dict(loaded.description["arch"], ClipArch, f"{loaded.path}: arch"), dtype=dtype)
    pytree.require_same(graph.shapes, loaded.params, str(loaded.path))
    return graph

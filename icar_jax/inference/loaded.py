"""The modules and weights behind `Model`: loading, user modifications and pickling of a CLIP and a complexity model."""

from __future__ import annotations

import dataclasses
import os
import threading
import uuid
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint, CheckpointError
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.inference import pretrained
from icar_jax.inference.ahead import Programs
from icar_jax.inference.forward import Forward, Placement, bucket_sizes
from icar_jax.inference.pretrained import Clip
from icar_jax.inference.scorer import Scorer, require_compatible
from icar_jax.models.clip import LOGIT_SCALE_START, ClipArch
from icar_jax.models.complexity import ComplexityModel
from icar_jax.models.encoders import LoneArch, TextModel, VisionModel, unit_norm
from icar_jax.models.functional import Graph, Module
from icar_jax.models.ops import normalise
from icar_jax.models.token_router import BlocksArch, TokenRouter, scorer_arch, scorer_class


class LoadedModel:
    """Base of `Model`: loads its modules and weights, applies user modifications, and supports pickling."""

    def __init__(
        self,
        clip: Checkpoint | None,
        complexity: Checkpoint | None,
        description: dict[str, Any],
        batch_size: int = 64,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        programs: Programs = Programs(),
    ):
        self.description, self._programs = description, programs
        self._process = os.getpid()
        self._placement = Placement(mesh)
        parts = [part for part in (clip, complexity) if part is not None]
        self.identity = {checkpoint.role(part.kind): checkpoint.identity(part.description) for part in parts}
        self.batch_size = batch_size
        self._dtype = jnp.dtype(dtype)
        self.exits: tuple[int, ...] = ()
        self.thresholds: tuple[float, ...] | None = None
        self.arch: ClipArch | LoneArch | None = None
        self.tokenizer: Tokenizer | None = None
        self._lock = threading.RLock()
        self._applied: dict[str, tuple[Graph, pytree.Tree]] = {}
        self._modules: dict[str, Module] = {}  # returned by `clip` and `complexity`; users may modify them
        self._sources = [None if part is None else dataclasses.replace(part, params={}) for part in (clip, complexity)]
        if clip is not None:
            self._open_towers(clip)
        self.scorer: Scorer | None = None
        if complexity is not None:
            arch = scorer_arch(complexity.description["arch"], f"{complexity.path}: arch")
            if clip is not None:
                require_compatible(clip, self.arch, complexity, arch)
            shares = clip is not None and isinstance(arch, BlocksArch)
            self.scorer = Scorer(
                complexity, batch_size, self._dtype, self.params if shares else None, self._placement, programs
            )
            if clip is None:
                self.preprocess = self.scorer.preprocess
        if clip is not None and complexity is not None:
            self.thresholds = tuple(description["routing"]["thresholds"])
            exits = tuple(description["routing"]["exits"])
            if exits != self.exits:
                raise CheckpointError(f"the bundle routes to exits {exits}, but its CLIP has {self.exits}; bundle it again")

    def _open_towers(self, loaded: Checkpoint) -> None:
        graph = pretrained.tower_graph(loaded, self._dtype)
        self.arch = arch = graph.arch
        self.path = loaded.path
        if arch.vision is not None:
            self.preprocess = Preprocess.from_dict(loaded.description["preprocess"], f"{loaded.path}: preprocess")
            self.exits = arch.vision.all_exits
        self.tokenizer = Tokenizer.from_json(loaded.tokenizer) if loaded.tokenizer is not None else None
        self.embed_dim = (arch.vision or arch.text).embed_dim
        self._set_towers(graph, self._placement.params(loaded.params), self._programs)

    def _set_towers(self, graph: Graph, params: pytree.Tree, programs: Programs) -> None:
        self._graph, self._params = graph, params
        self.temperature = float(np.exp(jax.device_get(params.get("logit_scale", LOGIT_SCALE_START))))
        self.towers = {}
        if graph.arch.vision is not None:
            self.towers = {exit: self._image_forward(graph, params, programs, exit) for exit in self.exits}
        if graph.arch.text is not None:
            tokens = jax.ShapeDtypeStruct((graph.arch.text.context_length,), jnp.int32)
            # With the text tower's parameters alone, so that a search need not load the others (text_model.py).
            own = {"text": params["text"]}
            encode_text = programs.use(
                "text", lambda params, tokens: unit_norm(graph.text(params["text"], tokens)), own, tokens
            )
            self._text = Forward(encode_text, own, self._buckets, self._placement)
        self.__dict__.pop("_router", None)

    def _image_forward(self, graph: Graph, params: pytree.Tree, programs: Programs, exit: int) -> Forward:
        p = self.preprocess
        run = lambda params, images: graph.encode_image(params, normalise(images, p.mean, p.std), exit)
        run = programs.use(f"image_{exit}", run, params, jax.ShapeDtypeStruct((p.image_size, p.image_size, 3), jnp.uint8))
        return Forward(run, params, self._buckets, self._placement)

    @property
    def graph(self) -> Graph | None:
        """The structure of the CLIP or of its only tower without weights, as from `clip.split()`; None without one."""
        return getattr(self, "_graph", None)

    @property
    def params(self) -> pytree.Tree | None:
        """Parameters of `graph` as a nested dict; None without one. Change them with nnx.update(model.clip, ...)."""
        return getattr(self, "_params", None)

    @property
    def clip(self) -> Clip | VisionModel | TextModel | None:
        """The CLIP, or a tower alone, as a module with weights; None without one.

        Changes to it apply from the next call of this model.
        """
        if self.arch is None:
            return None
        return self._module("clip")

    @property
    def complexity(self) -> ComplexityModel | TokenRouter | None:
        """The complexity model as a module; None without one. Changes to it apply from the next call of this model."""
        if self.scorer is None:
            return None
        return self._module("complexity")

    def _module(self, name: str) -> Module:
        with self._lock:
            if name not in self._modules:
                graph, params = self._current(name)
                self._modules[name] = graph.merge(params)
            return self._modules[name]

    def apply_changes(self) -> None:
        """Applies changes made to the modules of `clip` and `complexity`. Raises RuntimeError in a forked process."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this model was loaded before the process was forked; a call would hang, since JAX's threads are not forked; "
                "start workers with multiprocessing.get_context('spawn'), or load the model in each of them"
            )
        if not self._modules:
            return
        with self._lock:
            for name in tuple(self._modules):
                self._apply_changes_of(name)

    def _current(self, name: str) -> tuple[Graph, pytree.Tree]:
        return (self.graph, self.params) if name == "clip" else (self.scorer.complexity, self.scorer.forward.params)

    def _apply_changes_of(self, name: str) -> None:
        graph, params = self._modules[name].split()
        was, held = self._applied.get(name) or self._current(name)
        if graph == was and all(a is b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(held), strict=True)):
            return
        if self._shares_tower:
            raise ValueError(
                f"model.{name} was modified, but the router of this bundle shares the first blocks of the CLIP, and changing "
                "one would not change the other; call the modules directly, or bundle the modified CLIP"
            )
        if name == "clip":
            towers = {name: getattr(graph, name).arch for name in ("vision", "text") if getattr(self.arch, name) is not None}
            if graph.arch != self.arch or any(arch != getattr(self.arch, name) for name, arch in towers.items()):
                raise ValueError("model.clip has a tower of a different shape; save it as a new checkpoint and load that")
            self._set_towers(graph, self._placement.params(params), Programs())
        else:
            self.scorer.set_weights(graph, self._placement.params(params))
            self.__dict__.pop("_router", None)
        self._applied[name] = graph, params  # before placement, which may copy the arrays
        # A new identity: stores made with the original model refuse this one.
        self.identity = {**self.identity, name: f"{self.identity[name]}, changed {uuid.uuid4()}"}

    def __reduce__(self):
        if self._placement.mesh is not None:
            raise TypeError("a model on a mesh cannot be pickled, since devices belong to one process; load it there instead")
        self.apply_changes()
        parts = []
        for name, source in zip(("clip", "complexity"), self._sources):
            if source is None:
                parts.append(None)
                continue
            graph, params = self._current(name)
            module = pretrained.MODULES[source.kind] if name == "clip" else scorer_class(graph.arch)
            if graph != module.graph(graph.arch, dtype=self._dtype):
                raise TypeError(f"model.{name} no longer has the structure of its checkpoint; pickle model.{name} itself")
            parts.append(dataclasses.replace(source, params=jax.tree.map(np.asarray, params)))
        return _unpickled, (type(self), *parts, self.description, self.batch_size, self.dtype, self.identity)

    @property
    def dtype(self) -> str:
        """dtype of activations: 'float32' or 'bfloat16'."""
        return self._dtype.name

    @property
    def _buckets(self) -> tuple[int, ...]:
        return bucket_sizes(self.batch_size, self._placement.shards)

    @property
    def _shares_tower(self) -> bool:
        return self.arch is not None and self.scorer is not None and isinstance(self.scorer.complexity.arch, BlocksArch)


def _unpickled(
    kind: type[LoadedModel],
    clip: Checkpoint | None,
    complexity: Checkpoint | None,
    description: dict,
    batch_size: int,
    dtype: str,
    identity: dict,
) -> LoadedModel:
    """Rebuilds a model from a pickle."""
    made = kind(clip, complexity, description, batch_size, dtype)
    made.identity = identity
    return made

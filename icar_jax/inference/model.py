"""The loaded model of the public API: encodes text and images into unit-norm float32 numpy arrays."""

from __future__ import annotations

import dataclasses
import os
import shlex
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from PIL import Image

from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import Checkpoint, CheckpointError
from icar_jax.data.images import ImageLike, Preprocess, decode
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.inference import pretrained
from icar_jax.inference.budgets import counted_costs, thresholds_for_budget, unpack_quantiles
from icar_jax.inference.forward import Forward, Placement, bucket_sizes
from icar_jax.inference.pretrained import Clip
from icar_jax.inference.reading import map_ordered
from icar_jax.inference.router import OneExit, Router, RoutingResult
from icar_jax.inference.scorer import Scorer, require_fits
from icar_jax.inference.shared_router import SharedRouter, SharedTower
from icar_jax.models.clip import ClipArch
from icar_jax.models.complexity import ComplexityModel
from icar_jax.models.functional import Graph, Module
from icar_jax.models.ops import normalise
from icar_jax.models.token_router import BlocksArch, TokenRouter, scorer_arch, scorer_class


class Model:
    """A CLIP, a complexity model, or a bundle of both; created by `load`.

    Attributes:
        exits: depths of image embeddings in executed blocks, ascending, full depth last; empty without a CLIP.
        thresholds: an image runs past exits[i] if its complexity exceeds thresholds[i]; None without calibration.
        embed_dim: embedding width D.
        arch: ClipArch of the CLIP; None without one.
        preprocess: image preprocessing of the CLIP, or of the complexity model without a CLIP.
        tokenizer: of the CLIP; None if the checkpoint has none.
        temperature: exp(logit_scale) of the CLIP, the factor applied to cosines before the softmax.
        description: contents of the checkpoint's icar.json.
        identity: {'clip', 'complexity': SHA-256 of weights, architecture and preprocessing}; models with the same identity
            give the same embeddings and scores.
    """

    def __init__(
        self,
        clip: Checkpoint | None,
        complexity: Checkpoint | None,
        description: dict[str, Any],
        batch_size: int = 64,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ):
        self.description = description
        self._process = os.getpid()
        self._placement = Placement(mesh)
        self.identity = {part.kind: checkpoint.identity(part.description) for part in (clip, complexity) if part is not None}
        self.batch_size = batch_size
        self._dtype = jnp.dtype(dtype)
        self.exits: tuple[int, ...] = ()
        self.thresholds: tuple[float, ...] | None = None
        self.arch: ClipArch | None = None
        self.tokenizer: Tokenizer | None = None
        self._lock = threading.RLock()
        self._applied: dict[str, tuple[Graph, pytree.Tree]] = {}
        self._modules: dict[str, Module] = {}  # returned by `clip` and `complexity`; users may modify them
        self._sources = [None if part is None else dataclasses.replace(part, params={}) for part in (clip, complexity)]
        if clip is not None:
            self._open_clip(clip)
        self.scorer: Scorer | None = None
        if complexity is not None:
            arch = scorer_arch(complexity.description["arch"], f"{complexity.path}: arch")
            if clip is not None:
                require_fits(clip, self.arch, complexity, arch)
            shares = clip is not None and isinstance(arch, BlocksArch)
            self.scorer = Scorer(complexity, batch_size, self._dtype, self.params if shares else None, self._placement)
            if clip is None:
                self.preprocess = self.scorer.preprocess
        if clip is not None and complexity is not None:
            self.thresholds = tuple(description["routing"]["thresholds"])
            exits = tuple(description["routing"]["exits"])
            if exits != self.exits:
                raise CheckpointError(f"the bundle routes to exits {exits}, but its CLIP has {self.exits}; bundle it again")

    def _open_clip(self, loaded: Checkpoint) -> None:
        graph = pretrained.clip_graph(loaded, self._dtype)
        self.arch = arch = graph.arch
        self.path = loaded.path
        self.preprocess = Preprocess.from_dict(loaded.description["preprocess"])
        self.tokenizer = Tokenizer.from_json(loaded.tokenizer) if loaded.tokenizer is not None else None
        self.exits = arch.vision.all_exits
        self.embed_dim = arch.vision.embed_dim
        self._set_clip(graph, self._placement.params(loaded.params))

    def _set_clip(self, graph: Graph[Clip], params: pytree.Tree) -> None:
        p, self._graph, self._params = self.preprocess, graph, params
        self.temperature = float(np.exp(jax.device_get(params["logit_scale"])))

        def tower(exit: int) -> Forward:
            run = lambda params, images: graph.encode_image(params, normalise(images, p.mean, p.std), exit)
            return Forward(run, params, self._buckets, self._placement)

        self.towers = {exit: tower(exit) for exit in self.exits}
        self._text = Forward(graph.encode_text, params, self._buckets, self._placement)
        self.__dict__.pop("_router", None)

    @property
    def graph(self) -> Graph[Clip] | None:
        """The CLIP's structure without weights, as from `clip.split()`; None without a CLIP."""
        return getattr(self, "_graph", None)

    @property
    def params(self) -> pytree.Tree | None:
        """The CLIP's parameters as a nested dict; None without a CLIP. Change them with nnx.update(model.clip, ...)."""
        return getattr(self, "_params", None)

    @property
    def clip(self) -> Clip | None:
        """The CLIP as a module with weights; None without one. Changes to it apply from the next call of this model."""
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
            if (graph.arch, graph.vision.arch, graph.text.arch) != (self.arch, self.arch.vision, self.arch.text):
                raise ValueError("model.clip has a tower of a different shape; save it as a new checkpoint and load that")
            self._set_clip(graph, self._placement.params(params))
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
            module = Clip if name == "clip" else scorer_class(graph.arch)
            if graph != module.graph(graph.arch, dtype=self._dtype):
                raise TypeError(f"model.{name} no longer has the structure of its checkpoint; pickle model.{name} itself")
            parts.append(dataclasses.replace(source, params=jax.tree.map(np.asarray, params)))
        return _unpickled, (*parts, self.description, self.batch_size, self.dtype, self.identity)

    @property
    def _buckets(self) -> tuple[int, ...]:
        return bucket_sizes(self.batch_size, self._placement.shards)

    def encode_text(self, texts: Sequence[str], warn: bool = True) -> np.ndarray:
        """Text embeddings float32 [N, D], unit norm, of N strings. Long texts are truncated, with a warning if `warn`."""
        self._require_clip("encode_text")
        if isinstance(texts, str):
            raise TypeError("encode_text expects a list of strings; call encode_text([text])")
        if self.tokenizer is None:
            path = shlex.quote(str(self.path))
            raise CheckpointError(
                f"{self.path} has no tokenizer, so it cannot encode text; add one with "
                f"`icar convert {path} {path} --tokenizer FILE` (a tokenizer.json, or CLIP's merges file)"
            )
        length = self.arch.text.context_length
        tokens, truncated = self.tokenizer.encode(texts, length)
        if warn and truncated.any():
            logging.warning("%d of %d texts exceed %d tokens and were truncated.", truncated.sum(), len(texts), length)
        return self._text(tokens) if len(tokens) else np.zeros((0, self.embed_dim), np.float32)

    def encode_image(self, images: Sequence[ImageLike], exit: int | None = None, budget: float | None = None) -> np.ndarray:
        """Image embeddings float32 [N, D], unit norm, of N paths, PIL images or uint8 arrays [H, W, 3], in order.

        `exit` is the number of executed blocks. Without it, a bundle routes each image by its complexity and a plain CLIP
        checkpoint runs full depth. `budget` routes with `thresholds_for(budget)` instead of the bundle's thresholds.
        Raises ValueError if both are given, ConfigError for a budget that cannot be met, and CheckpointError without a CLIP.
        """
        self._require_clip("encode_image")
        if exit is not None and budget is not None:
            raise ValueError("exit and budget exclude each other: a budget routes images, an exit applies to every image")
        if budget is not None:
            return self.route(images, budget).embeddings
        depth = self.fixed_exit(exit)
        preprocesses = self.preprocesses if depth is None else {"clip": self.preprocess}
        return self.embed(self._prepare(images, preprocesses), depth).embeddings

    def score(self, images: Sequence[ImageLike]) -> np.ndarray:
        """Complexity float32 [N] in [0, 1], higher is more complex, of N paths, PIL images or uint8 arrays.

        Raises CheckpointError without a complexity model.
        """
        if self.scorer is None:
            raise CheckpointError("this checkpoint has no complexity model; `icar bundle` adds one")
        self.apply_changes()
        batches = self._prepare(images, {"complexity": self.scorer.preprocess})
        parts = [self.scorer.forward.submit(batch["complexity"]) for batch in batches]
        return np.concatenate([p.result() for p in parts]) if parts else np.zeros(0, np.float32)

    @property
    def dtype(self) -> str:
        """dtype of activations: 'float32' or 'bfloat16'."""
        return self._dtype.name

    def fixed_exit(self, exit: int | None) -> int | None:
        """The depth of every image: `exit` after validation, or full depth without a router; None if images are routed."""
        self._require_clip("embedding images")
        return None if exit is None and self.thresholds is not None else self.arch.vision.check_exit(exit)

    def route(self, images: Sequence[ImageLike], budget: float | None = None) -> RoutingResult:
        """Routes N images and returns embeddings, scores and exits; needs a bundle. `budget` as for `encode_image`."""
        self._require_bundle()
        thresholds = None if budget is None else self.thresholds_for(budget)
        return self.embed(self._prepare(images, self.preprocesses), thresholds=thresholds)

    def thresholds_for(self, budget: float) -> tuple[float, ...]:
        """Thresholds at which the calibration images cost `budget` times full depth in counted FLOPs, router included.

        The budget holds on average over similar images; a single batch may cost more or less. Raises ConfigError for a budget
        that cannot be met, naming the lowest one, and CheckpointError for a bundle without calibration scores.
        """
        self._require_bundle()
        if "scores" not in self.description["routing"]:
            raise CheckpointError(
                "a budget needs the scores of calibration images, and this bundle has none; add them with "
                f"`icar calibrate BUNDLE --images FOLDER --budget {budget:g}`"
            )
        costs = counted_costs(self.arch, self.scorer.complexity.arch)
        return thresholds_for_budget(unpack_quantiles(self.description["routing"]["scores"]), budget, costs)

    def embed(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        exit: int | None = None,
        thresholds: Sequence[float] | None = None,
    ) -> RoutingResult:
        """RoutingResult over all batches, in order; each batch maps names of `preprocesses` to uint8 [n, S, S, 3].

        Without `exit`, images are routed by `thresholds` (default: the bundle's). With `exit`, only 'clip' is used and scores
        are nan. Raises CheckpointError if the model cannot do this.
        """
        if exit is not None:
            self._require_clip("embed")
            exit = self.arch.vision.check_exit(exit)
            return OneExit(exit, self.towers[exit]).embed_batches(((b["clip"], None) for b in batches), self.embed_dim)
        self._require_bundle()
        router = self.router if thresholds is None else self.router.at(thresholds)
        return router.embed_batches(((b["clip"], b[self.scored_on]) for b in batches), self.embed_dim)

    def embed_known(self, batches: Iterable[tuple[np.ndarray, np.ndarray]], thresholds: Sequence[float]) -> RoutingResult:
        """RoutingResult of batches (pixels of 'clip' uint8 [n, S, S, 3], complexity float32 [n]), routed by these scores."""
        self._require_bundle()
        return Router(self.towers, lambda scores: scores, thresholds, self.batch_size).embed_batches(batches, self.embed_dim)

    @property
    def scored_on(self) -> str | None:
        """Name in `preprocesses` of the complexity model's input: 'complexity', or 'clip' for a head on the CLIP's blocks."""
        if self.scorer is None:
            return None
        return "clip" if self._shares_tower else "complexity"

    @property
    def preprocesses(self) -> dict[str, Preprocess]:
        """Preprocessing per input: 'clip', and 'complexity' if the complexity model needs separate pixels."""
        made = {"clip": self.preprocess} if self.arch is not None else {}
        return made | ({"complexity": self.scorer.preprocess} if self.scored_on == "complexity" else {})

    @property
    def _shares_tower(self) -> bool:
        return self.arch is not None and self.scorer is not None and isinstance(self.scorer.complexity.arch, BlocksArch)

    @property
    def router(self) -> Router | SharedRouter:
        """The router over this bundle's towers. Raises CheckpointError if this is not a bundle."""
        self._require_bundle()
        with self._lock:
            return self._router

    @cached_property
    def _router(self) -> Router | SharedRouter:
        if self._shares_tower:
            scorer = self.scorer
            return SharedRouter(
                SharedTower(
                    self.graph,
                    scorer.complexity,
                    self.params,
                    scorer.forward.params,
                    self.preprocess,
                    self._buckets,
                    self._dtype,
                    self._placement,
                ),  # fmt: skip
                self.thresholds,
            )
        return Router(self.towers, self.scorer.forward, self.thresholds, self.batch_size)

    def warm_up(self) -> None:
        """Compiles every forward pass at every batch shape, so that nothing compiles later."""
        self.apply_changes()
        for exit in self.exits:
            self.warm_up_embed(exit)
        if self.thresholds is not None:
            self.warm_up_embed()
        if self.scorer is not None:
            self.scorer.warm_up()
        if self.arch is not None:
            self._text.warm_up((self.arch.text.context_length,), np.int32)

    def warm_up_embed(self, exit: int | None = None) -> None:
        """Compiles only what `embed` runs with this `exit`."""
        self.apply_changes()
        side = self.preprocess.image_size
        if exit is not None:
            self.towers[self.arch.vision.check_exit(exit)].warm_up((side, side, 3), np.uint8)
            return
        self.router.warm_up()
        if not self._shares_tower:
            for tower in self.towers.values():
                tower.warm_up((side, side, 3), np.uint8)
            self.scorer.warm_up()

    def _require_bundle(self) -> None:
        if self.thresholds is None:
            raise CheckpointError("routing needs thresholds; make a bundle with `icar bundle` and load that")
        self.apply_changes()

    def _require_clip(self, what: str) -> None:
        if self.arch is None:
            raise CheckpointError(f"{what} needs a CLIP; this is a complexity checkpoint, which can only score")
        self.apply_changes()

    def _prepare(self, images: Iterable[ImageLike], preprocess: dict[str, Preprocess]) -> Iterator[dict[str, np.ndarray]]:
        single_array = isinstance(images, np.ndarray) and images.ndim != 4
        if single_array or isinstance(images, (str, os.PathLike, Image.Image)):
            raise TypeError("expected a list of images, got a single image; wrap it in a list")
        images = list(images)

        def one(image: ImageLike) -> dict[str, np.ndarray]:
            picture = decode(image)
            return {key: p.resize(picture) for key, p in preprocess.items()}

        with closing(map_ordered(one, images, ahead=2 * self.batch_size)) as prepared:
            while rows := list(islice(prepared, self.batch_size)):
                yield {key: np.stack([row[key] for row in rows]) for key in preprocess}


def _unpickled(
    clip: Checkpoint | None, complexity: Checkpoint | None, description: dict, batch_size: int, dtype: str, identity: dict
) -> Model:
    """Rebuilds a Model from a pickle."""
    made = Model(clip, complexity, description, batch_size, dtype)
    made.identity = identity
    return made

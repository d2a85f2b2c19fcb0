"""The loaded model of the public API: encodes text and images into unit-norm float32 numpy arrays."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property
from itertools import islice

import numpy as np
from PIL import Image

from icar_jax.checkpoint import CheckpointError
from icar_jax.data.images import ImageLike, Preprocess, decode
from icar_jax.errors import require_list
from icar_jax.inference.budgets import counted_costs, thresholds_for_budget, unpack_quantiles
from icar_jax.inference.loaded import LoadedModel
from icar_jax.inference.reading import map_ordered
from icar_jax.inference.router import OneExit, Router, RoutingResult
from icar_jax.inference.shared_router import SharedRouter, SharedTower
from icar_jax.inference.text_model import tokens_of


class Model(LoadedModel):
    """A CLIP or one of its towers, a complexity model, or a bundle of both; created by `load`.

    Attributes:
        exits: depths of image embeddings in executed blocks, ascending, full depth last; empty without a vision tower.
        thresholds: an image runs past exits[i] if its complexity exceeds thresholds[i]; None without calibration.
        embed_dim: embedding width D.
        arch: ClipArch of the CLIP, LoneArch of a tower alone; None without one.
        preprocess: image preprocessing of the CLIP, or of the complexity model without a CLIP.
        tokenizer: of the CLIP; None if the checkpoint has none.
        temperature: exp(logit_scale) of the CLIP, the factor applied to cosines before the softmax; of a tower alone, which has
            learned none, the 1 / 0.07 with which CLIP starts.
        description: contents of the checkpoint's icar.json.
        identity: {'clip', 'complexity': SHA-256 of weights, architecture and preprocessing}; models with the same identity
            give the same embeddings and scores.
    """

    def encode_text(self, texts: Sequence[str], warn: bool = True) -> np.ndarray:
        """Text embeddings float32 [N, D], unit norm, of N strings. Long texts are truncated, with a warning if `warn`."""
        self._require("text", "encode_text")
        require_list("texts of encode_text", texts)
        if self.tokenizer is None:
            path = shlex.quote(str(self.path))
            raise CheckpointError(
                f"{self.path} has no tokenizer, so it cannot encode text; add one with "
                f"`icar convert {path} {path} --tokenizer FILE` (a tokenizer.json, or CLIP's merges file)"
            )
        tokens = tokens_of(self.tokenizer, texts, self.arch.text.context_length, warn)
        return self._text(tokens) if len(tokens) else np.zeros((0, self.embed_dim), np.float32)

    def is_too_long(self, text: str) -> bool:
        """Whether `encode_text` truncates a text."""
        return bool(self.tokenizer.encode([text], self.arch.text.context_length)[1][0])

    def encode_image(self, images: Sequence[ImageLike], exit: int | None = None, budget: float | None = None) -> np.ndarray:
        """Image embeddings float32 [N, D], unit norm, of N paths, PIL images or uint8 arrays [H, W, 3], in order.

        `exit` is the number of executed blocks. Without it, a bundle routes each image by its complexity and a plain CLIP
        checkpoint runs full depth. `budget` routes with `thresholds_for(budget)` instead of the bundle's thresholds.
        Raises ValueError if both are given, ConfigError for a budget that cannot be met, and CheckpointError without a CLIP.
        """
        self._require("vision", "encode_image")
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

    def fixed_exit(self, exit: int | None) -> int | None:
        """The depth of every image: `exit` after validation, or full depth without a router; None if images are routed."""
        self._require("vision", "embedding images")
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
            self._require("vision", "embed")
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
        made = {"clip": self.preprocess} if self.exits else {}
        return made | ({"complexity": self.scorer.preprocess} if self.scored_on == "complexity" else {})

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
                    self._programs,
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
        if self.encodes_text:
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

    @property
    def encodes_text(self) -> bool:
        """Whether there is a text tower."""
        return self.arch is not None and self.arch.text is not None

    def _require(self, tower: str, what: str) -> None:
        if self.arch is None:
            raise CheckpointError(f"{what} needs a CLIP; this is a complexity checkpoint, which can only score")
        if getattr(self.arch, tower) is None:
            there, lacking = ("a text", "an image") if tower == "vision" else ("an image", "a text")
            raise CheckpointError(
                f"{what} needs {lacking} tower, and {self.path} is {there} tower alone; `icar join` makes a CLIP of two towers"
            )
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

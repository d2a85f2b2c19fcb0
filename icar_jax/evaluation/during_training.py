"""Evaluators that run during training on sharded weights: recall at 5 for CLIP, agreement with ratings for complexity models.

Each process embeds its part of the images and captions; embeddings and scores are then gathered on all processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from icar_jax import checkpoint
from icar_jax.architectures import routed_clip
from icar_jax.config import ConfigError, ExperimentConfig, from_dict
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.records import Source, Subset
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.errors import DataError
from icar_jax.evaluation.complexity import regret
from icar_jax.evaluation.metrics import ratings
from icar_jax.evaluation.metrics.retrieval import ranks, recall
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.complexity import log_odds
from icar_jax.models.ops import normalise
from icar_jax.models.token_router import scorer_arch, scorer_class

AT = 5
_SAMPLED = 100  # scenes read before the run to check that ratings vary


def evaluator(config: ExperimentConfig) -> type[RetrievalEvaluator] | type[RatingsEvaluator]:
    """Returns the evaluator class that config.train.eval_every runs for this task."""
    if config.task == "clip":
        return RetrievalEvaluator
    return RegretEvaluator if config.complexity.target == "regret" else RatingsEvaluator


class _Gallery:
    """The images of a split; each image is read by one process."""

    def __init__(self, trained: Any, source: Source):
        config = trained.config
        self.source, self._sharding, self._data = source, trained.batch_sharding, config.data
        self.preprocess = Preprocess.from_dict(trained.description["preprocess"])
        part, self._parts = trained.part
        self.rows = -(-config.eval.batch_size // trained.batch_shards) * trained.batch_shards // self._parts
        self._own = np.arange(len(source))[part :: self._parts]
        self.bad = BadFiles()  # kept for the whole run, so that each file is reported once

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yields this process's batches from `eval_batches`, with 'id' (index + 1) and 'pixels' added.

        Every process yields the same number of batches; the last ones may be empty.
        """
        side = self.preprocess.image_size
        count = -(-len(self.source) // (self.rows * self._parts))
        if len(self._own):
            own = Subset(self.source, self._own, self.source.name)
            reading = configured.loading(self._data)
            with eval_batches(own, {"model": self.preprocess}, batch_size=self.rows, **reading) as batches:
                for batch in batches:
                    self.bad.add(batch)
                    count -= 1
                    ids = self._own[batch["index"]].astype(np.int32) + 1
                    yield {**batch, "id": ids, "pixels": batch["images"]["model"]}
        nothing = {"id": np.zeros(0, np.int32), "pixels": np.zeros((0, side, side, 3), np.uint8)}
        for _ in range(count):
            yield {**nothing, "captions": [], "complexity": np.zeros(0, np.float32)}

    def put(self, values: np.ndarray) -> jax.Array:
        """Joins the [n, ...] rows of all processes into one sharded array; padding rows and their ids are zero."""
        padded = np.zeros((self.rows, *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        return jax.make_array_from_process_local_data(self._sharding, padded)

    def require_some(self, ids: list[np.ndarray]) -> None:
        """Raises DataError if no image could be read."""
        if not any(i.any() for i in ids):
            raise DataError(f"no image of {self.source.name} could be read:\n{self.bad.summary()}")

    @property
    def everywhere(self) -> NamedSharding:
        """Replicated on every device."""
        return NamedSharding(self._sharding.mesh, PartitionSpec())


class RetrievalEvaluator:
    """Evaluator of a CLIP run: params -> {'eval/full_r5': ..., 'eval/exit_K_r5': ...}.

    Values are in percent, averaged over text-to-image and image-to-text. trained: a `training.evaluator.TrainedModel`.
    Raises ConfigError if the evaluation split cannot be read or is not held out.
    """

    def __init__(self, trained: Any):
        self._tokenizer = trained.tokenizer
        self.gallery = gallery = _Gallery(trained, configured.validation_source(trained.config))
        arch = from_dict(trained.description["arch"], ClipArch, "arch")
        self.clip = clip = Clip.graph(arch, dtype=trained.config.eval.dtype)
        preprocess = gallery.preprocess

        def images(params, ids, pixels):
            pixels = normalise(pixels, preprocess.mean, preprocess.std)
            return ids, clip.encode_image_exits(params, pixels)

        def texts(params, ids, tokens):
            return ids, clip.encode_text(params, tokens)

        self._embed_images = jax.jit(images, out_shardings=gallery.everywhere)
        self._embed_texts = jax.jit(texts, out_shardings=gallery.everywhere)

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Called by every process with sharded parameters; the values are the same on all of them."""
        return self._recalls(*self.embeddings(params))

    def embeddings(self, params: Mapping[str, Any]) -> tuple[list, list]:
        """Returns image batches [(ids, {exit: [n, D]})] and caption batches [(image ids, [m, D])]; id 0 marks padding."""
        images: list[tuple[np.ndarray, dict[int, np.ndarray]]] = []
        captions: list[str] = []
        owners: list[int] = []
        put, rows = self.gallery.put, self.gallery.rows
        for batch in self.gallery:
            ids, groups = batch["id"], batch["captions"]
            images.append(_on_host(self._embed_images(params, put(ids), put(batch["pixels"]))))
            captions += [caption for group in groups for caption in group]
            owners += [i for i, group in zip(ids.tolist(), groups, strict=True) for _ in group]
        length = self.clip.arch.text.context_length
        tokens = self._tokenizer(captions, length) if captions else np.zeros((0, length), np.int32)
        texts: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, _longest(len(captions)), rows):
            piece = slice(start, start + rows)
            ids = np.array(owners[piece], np.int32)
            texts.append(_on_host(self._embed_texts(params, put(ids), put(tokens[piece]))))
        self.gallery.require_some([ids for ids, _ in images])
        return images, texts

    def _recalls(self, images: list, texts: list) -> dict[str, float]:
        _, by_exit, text, owner = sort_by_index(images, texts)
        exits = self.clip.arch.vision.all_exits
        values = {}
        for e in reversed(exits):
            found = recall(ranks(by_exit[e], text, owner), AT)
            values["eval/full_r5" if e == exits[-1] else f"eval/exit_{e}_r5"] = fmean(found.values())
        return values


def sort_by_index(images: list, texts: list) -> tuple[np.ndarray, dict[int, np.ndarray], np.ndarray, np.ndarray]:
    """Joins the batches of `RetrievalEvaluator.embeddings` in index order, without padding.

    Returns (indices [N], {exit: [N, D]}, texts [M, D], image of each text [M]).
    """
    image_ids = np.concatenate([ids for ids, _ in images])
    order = np.argsort(image_ids, kind="stable")[np.count_nonzero(image_ids == 0) :]
    text_ids = np.concatenate([ids for ids, _ in texts])
    text_order = np.argsort(text_ids, kind="stable")[np.count_nonzero(text_ids == 0) :]
    by_exit = {e: np.concatenate([found[e] for _, found in images])[order] for e in images[0][1]}
    owner = np.searchsorted(image_ids[order], text_ids[text_order])
    return image_ids[order] - 1, by_exit, np.concatenate([z for _, z in texts])[text_order], owner


class RatingsEvaluator:
    """Evaluator of a complexity run: params -> values whose names begin with 'eval/'.

    Regression: loss (mean squared error), pcc, srcc, rmse, rmae; the correlations are 0 while all scores are equal.
    Classification: loss (cross-entropy without class weights), accuracy and F1 of the argmax decisions. trained: a
    `training.evaluator.TrainedModel`. Raises ConfigError if the split cannot be read, is not held out, or all ratings in it
    are equal.
    """

    def __init__(self, trained: Any):
        config = trained.config
        self._head, self._threshold = config.complexity.head, config.complexity.threshold
        source, known = self._eval_source(trained)
        if self._head == "regression" and np.ptp(known) == 0:
            raise ConfigError(
                f"{source.name}: all {len(known)} ratings are {known[0]:g}, so correlation is undefined; choose another "
                "config.train.eval_split, or set config.train.eval_every=0"
            )
        self._gallery = gallery = _Gallery(trained, source)
        arch = scorer_arch(trained.description["arch"], "arch")
        model, preprocess = scorer_class(arch).graph(arch, dtype=config.eval.dtype), gallery.preprocess

        def score(params, ids, pixels, rated):
            pixels = normalise(pixels, preprocess.mean, preprocess.std)
            return ids, log_odds(model.logits(params, pixels), arch.head), rated

        self._score = jax.jit(score, out_shardings=gallery.everywhere)

    def _eval_source(self, trained: Any) -> tuple[Source, np.ndarray]:
        """Returns the source whose records hold the target complexity, and some of these targets."""
        source = configured.validation_source(trained.config)
        return source, configured.scores(source, _SAMPLED)

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Called by every process with sharded parameters; the values are the same on all of them."""
        put, found = self._gallery.put, []
        for batch in self._gallery:
            found.append(_on_host(self._score(params, put(batch["id"]), put(batch["pixels"]), put(batch["complexity"]))))
        ids, odds, rated = (np.concatenate(parts) for parts in zip(*found, strict=True))
        self._gallery.require_some([ids])
        order = np.argsort(ids, kind="stable")[np.count_nonzero(ids == 0) :]
        odds, rated = odds[order].astype(np.float64), rated[order].astype(np.float64)
        if self._head == "regression":
            values = _agreement(1 / (1 + np.exp(-odds)), rated)
        else:
            values = _decisions(odds, rated > np.float32(self._threshold))
        return {f"eval/{name}": value for name, value in values.items()}


class RegretEvaluator(RatingsEvaluator):
    """Evaluator of a run that learns regret: compares scores with the ranks of the regrets among all images.

    The CLIP is frozen, so its regrets are measured once, before the run. Raises ConfigError as `RatingsEvaluator` does.
    """

    def _eval_source(self, trained: Any) -> tuple[Source, np.ndarray]:
        config, spec = trained.config, trained.description["regret"]
        found = checkpoint.read(routed_clip(config.complexity), "clip")
        if not found.tokenizer:
            raise ConfigError(
                f"config.complexity.clip={config.complexity.clip} has no tokenizer, which is needed to embed captions for the "
                "regret evaluation: convert it with a tokenizer, or set config.train.eval_every=0"
            )
        tokenizer = Tokenizer.from_json(found.tokenizer, str(found.path))
        whole = RetrievalEvaluator(dataclasses.replace(trained, description=found.description, tokenizer=tokenizer))
        params = jax.tree.map(lambda leaf: _everywhere(leaf, whole.gallery.everywhere), found.params)
        index, by_exit, texts, owner = sort_by_index(*whole.embeddings(params))
        full = whole.clip.arch.vision.depth
        scale = float(whole.clip.logit_scales(found.params)[full])
        values = regret.regrets(by_exit[spec["exit"]], by_exit[full], texts, owner, scale, spec["kind"])
        source = regret.Regrets(whole.gallery.source, index, values).as_source()
        return source, np.array(list(source.targets.values()), np.float32)


def _everywhere(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Replicates a host array, identical on every process, on every device."""
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: np.asarray(np.asarray(leaf, np.float32)[index]))


def _agreement(scores: np.ndarray, rated: np.ndarray) -> dict[str, float]:
    values = {name: getattr(ratings, name)(scores, rated) for name in ("rmse", "rmae")}
    try:
        values |= {name: getattr(ratings, name)(scores, rated) for name in ("pcc", "srcc")}
    except ratings.MetricError:  # all scores equal, as with a newly initialised head
        values |= {"pcc": 0.0, "srcc": 0.0}
    return {"loss": values["rmse"] ** 2, **values}


def _decisions(odds: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Loss (softmax cross-entropy over both classes), accuracy and F1 from log odds [n] of the class 'complex'."""
    loss = float(np.mean(np.logaddexp(0, np.where(labels, -odds, odds))))
    decided = odds > 0
    return {"loss": loss, **{name: getattr(ratings, name)(decided, labels) for name in ("accuracy", "f1")}}


def _on_host(tree: Any) -> Any:
    """Copies replicated arrays to numpy; works when some devices belong to other processes."""
    return jax.tree.map(np.asarray, tree)


def _longest(count: int) -> int:
    """Returns the largest count over all processes."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(count)).max())

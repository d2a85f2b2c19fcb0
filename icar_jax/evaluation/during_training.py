"""Recall at 5 of the evaluation split, for weights that are still being trained and lie on a mesh.

Every process embeds its part of the images and captions; the embeddings come together on all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from icar_jax.config import from_dict
from icar_jax.data import sources
from icar_jax.data.images import Preprocess
from icar_jax.data.pipeline import BadFiles, eval_batches
from icar_jax.data.splits import Subset
from icar_jax.evaluation.metrics import ranks, recall
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.pixels import normalise

AT = 5


class Retrieval:
    """The evaluator of a CLIP run: params -> {'eval/full_r5': ..., 'eval/exit_K_r5': ...}.

    Values are percent, the mean of text-to-image and image-to-text. `trained` is a `training.evaluator.Trained`. Raises
    ConfigError where config.eval.split cannot be read or is not held out.
    """

    def __init__(self, trained: Any):
        config = trained.config
        self._data, self._tokenizer, self._sharding = config.data, trained.tokenizer, trained.batch_sharding
        self._source = sources.eval_source(config.data, config.eval)
        self._clip = Clip(from_dict(trained.description["arch"], ClipArch, "arch"))
        self._preprocess = Preprocess.from_dict(trained.description["preprocess"])
        part, self._parts = trained.part
        self._rows = -(-config.eval.batch_size // trained.batch_shards) * trained.batch_shards // self._parts
        self._own = np.arange(len(self._source))[part :: self._parts]
        self._bad = BadFiles()  # lives as long as the run, so that a file is named once
        clip, preprocess, dtype = self._clip, self._preprocess, jnp.dtype(config.eval.dtype)

        def images(params, ids, pixels):
            pixels = normalise(pixels, preprocess.mean, preprocess.std)
            return ids, clip.encode_image_exits(params, pixels, dtype=dtype)

        def texts(params, ids, tokens):
            return ids, clip.encode_text(params, tokens, dtype)

        everywhere = NamedSharding(self._sharding.mesh, PartitionSpec())
        self._embed_images = jax.jit(images, out_shardings=everywhere)
        self._embed_texts = jax.jit(texts, out_shardings=everywhere)

    def __call__(self, params: Mapping[str, Any]) -> dict[str, float]:
        """Called by every process with sharded parameters; the values are the same on all of them."""
        images: list[tuple[np.ndarray, dict[int, np.ndarray]]] = []
        captions: list[str] = []
        owners: list[int] = []
        for ids, pixels, groups in self._pictures():
            images.append(_on_host(self._embed_images(params, self._put(ids), self._put(pixels))))
            captions += [caption for group in groups for caption in group]
            owners += [i for i, group in zip(ids.tolist(), groups, strict=True) for _ in group]
        length = self._clip.arch.text.context_length
        tokens = self._tokenizer(captions, length) if captions else np.zeros((0, length), np.int32)
        texts: list[tuple[np.ndarray, np.ndarray]] = []
        for start in range(0, _longest(len(captions)), self._rows):
            piece = slice(start, start + self._rows)
            ids = np.array(owners[piece], np.int32)
            texts.append(_on_host(self._embed_texts(params, self._put(ids), self._put(tokens[piece]))))
        if not any(ids.any() for ids, _ in images):
            raise ValueError(f"no image of {self._source.name} could be read:\n{self._bad.summary()}")
        return self._recalls(images, texts)

    def _pictures(self) -> Iterator[tuple[np.ndarray, np.ndarray, list[tuple[str, ...]]]]:
        """(index + 1, pixels, captions) of this process's batches; as many as on any other, the last perhaps empty."""
        side = self._preprocess.image_size
        count = -(-len(self._source) // (self._rows * self._parts))
        if len(self._own):
            own = Subset(self._source, self._own, self._source.name)
            reading = sources.loading(self._data)
            with eval_batches(own, {"clip": self._preprocess}, batch_size=self._rows, **reading) as batches:
                for batch in batches:
                    self._bad.add(batch)
                    count -= 1
                    ids = self._own[batch["index"]].astype(np.int32) + 1
                    yield ids, batch["images"]["clip"], list(batch["captions"])
        for _ in range(count):
            yield np.zeros(0, np.int32), np.zeros((0, side, side, 3), np.uint8), []

    def _put(self, values: np.ndarray) -> jax.Array:
        """[n, ...] of every process as one sharded array; missing rows are zero, and so is their index."""
        padded = np.zeros((self._rows, *values.shape[1:]), values.dtype)
        padded[: len(values)] = values
        return jax.make_array_from_process_local_data(self._sharding, padded)

    def _recalls(self, images: list, texts: list) -> dict[str, float]:
        image_ids = np.concatenate([ids for ids, _ in images])
        order = np.argsort(image_ids, kind="stable")[np.count_nonzero(image_ids == 0) :]
        text_ids = np.concatenate([ids for ids, _ in texts])
        text_order = np.argsort(text_ids, kind="stable")[np.count_nonzero(text_ids == 0) :]
        text = np.concatenate([z for _, z in texts])[text_order]
        owner = np.searchsorted(image_ids[order], text_ids[text_order])
        exits = self._clip.arch.vision.all_exits
        values = {}
        for e in reversed(exits):
            image = np.concatenate([by_exit[e] for _, by_exit in images])[order]
            found = recall(ranks(image, text, owner), AT)
            values["eval/full_r5" if e == exits[-1] else f"eval/exit_{e}_r5"] = fmean(found.values())
        return values


def _on_host(tree: Any) -> Any:
    """Replicated arrays as numpy, also where some of the devices belong to other processes."""
    return jax.tree.map(np.asarray, tree)


def _longest(count: int) -> int:
    """The greatest count of any process."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(count)).max())

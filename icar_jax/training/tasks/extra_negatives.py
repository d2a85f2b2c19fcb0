"""Extra negatives of a regret run: a memory bank of thousands of training pairs, embedded once by the frozen CLIP.

In a batch of 64 nearly every image retrieves its caption at either depth. The regret of an early exit in a gallery of thousands
only shows with thousands of negatives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import pytree
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.loader.order import examples_at
from icar_jax.data.records import Source, Subset
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.xla_options import jit_for_host
from icar_jax.parallel import distributed
from icar_jax.training.preemption import StopRequest

# Entry of the frozen arrays: {'image', 'text': float32 [M, D], unit norm; 'index': int32 [M], indices into the training set}.
NEGATIVES = "negatives"
_BATCH = 64


def require_enough(config: ExperimentConfig, images: int) -> None:
    """Raises ConfigError if a training set of `images` images is smaller than config.complexity.rivals."""
    if images < config.complexity.rivals:
        raise _error(config, f"the training set has {images} images")


def embed(
    config: ExperimentConfig,
    clip: Graph[Clip],
    preprocess: Preprocess,
    source: Source,
    tokenizer: Tokenizer,
    params: Mapping[str, Any],
    request: StopRequest,
) -> pytree.Tree | None:
    """Returns NEGATIVES: config.complexity.rivals training pairs embedded by `clip`; None if a stop signal arrived.

    Pairs are drawn with config.train.seed and use the first caption of each image. Every process computes the same embeddings
    with the whole CLIP on one of its devices. Raises ConfigError if too few pairs can be read.
    """
    count, p = config.complexity.rivals, preprocess
    params = jax.device_put(params)

    @jit_for_host
    def both(params, pixels, tokens):
        image = clip.encode_image(params, normalise(pixels, p.mean, p.std))
        return image, clip.encode_text(params, tokens)

    tried = min(len(source), 2 * count + _BATCH)  # more than needed: some are unreadable or have no caption
    _, order = examples_at(np.arange(tried), len(source), config.train.seed + 1)  # another order than that of training
    images, texts, found, bad = [], [], [], BadFiles()
    reading = {"batch_size": _BATCH, **configured.loading(config.data)}
    with (
        eval_batches(Subset(source, order, f"{source.name}/extra negatives"), {"clip": p}, **reading) as batches,
        tqdm(total=count, desc="embed extra negatives", unit="pair", disable=not distributed.is_main()) as bar,
    ):
        for batch in batches:
            if request.name and jax.process_count() == 1:
                return None
            bad.add(batch)
            rows = [row for row, captions in enumerate(batch["captions"]) if captions][: count - len(found)]
            if rows:
                tokens, _ = tokenizer.encode([batch["captions"][row][0] for row in rows], clip.arch.text.context_length)
                pixels, tokens = (_filled(each) for each in (batch["images"]["clip"][rows], tokens))
                for whole, part in zip((images, texts), both(params, pixels, tokens), strict=True):
                    whole.append(np.asarray(part, np.float32)[: len(rows)])
                found += order[batch["index"][rows]].tolist()
                bar.update(len(rows))
            if len(found) == count:
                break
    if bad:
        logging.warning("%s", bad.summary())
    if len(found) < count:
        raise _error(config, f"only {len(found)} of {tried} training images can be read and have a caption")
    return {"image": np.concatenate(images), "text": np.concatenate(texts), "index": np.array(found, np.int32)}


def _filled(rows: np.ndarray) -> np.ndarray:
    """The rows, padded with zeros to a full batch so that one compiled program serves all batches."""
    return np.concatenate([rows, np.zeros((_BATCH - len(rows), *rows.shape[1:]), rows.dtype)])


def _error(config: ExperimentConfig, found: str) -> ConfigError:
    return ConfigError(
        f"config.complexity.rivals={config.complexity.rivals} extra negatives, but {found}; set fewer, or 0 to use only the "
        "pairs of the batch"
    )

"""Embeds a source once: every image at every exit, the routed embeddings, and every caption."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import eval_batches
from icar_jax.data.ratings.labels import Labels, merge_labels
from icar_jax.data.records import Source
from icar_jax.errors import DataError
from icar_jax.evaluation.metrics.retrieval import Ranks
from icar_jax.evaluation.routing import timing
from icar_jax.inference.model import Model
from icar_jax.models.clip import LOGIT_SCALE_MAX


@dataclass(frozen=True)
class Gallery:
    """Embeddings of N images and M captions of a source.

    by_exit: exit -> [N, D]; texts: [M, D]; caption_image: [M] image of each caption; routed: [N, D]; scores: [N] complexity;
    exits: [N] executed blocks under routing (all three None without routing); sample: images for timing; names and index
    identify the images in the source; labels: category labels of each image, () for none.
    """

    by_exit: dict[int, np.ndarray]
    texts: np.ndarray
    caption_image: np.ndarray
    routed: np.ndarray | None
    scores: np.ndarray | None
    exits: np.ndarray | None
    sample: timing.Sample
    captions: list[tuple[str, ...]]
    bad: BadFiles
    names: list[str]
    index: np.ndarray
    labels: list[tuple[str, ...]]


def embed_source(
    model: Model, source: Source, loading: Mapping[str, Any] | None = None, *, exits: Sequence[int] | None = None,
    timed: int = timing.SAMPLE,
) -> Gallery:  # fmt: skip
    """Embeds every readable image of a source at every exit and by routing, and every caption, in one pass.

    loading: keyword arguments of `eval_batches` (workers, retries, ...). exits: only these exits, without routing.
    timed: number of images of the gallery's `sample`, whose encoding is timed.
    Raises DataError if no image can be read.
    """
    towers = {exit: [] for exit in exits or model.exits}
    kept: dict[str, list[np.ndarray]] = {key: [] for key in model.preprocesses}
    captions: list[tuple[str, ...]] = []
    names: list[str] = []
    labels: list[tuple[str, ...]] = []
    index: list[np.ndarray] = []
    bad = BadFiles()
    routing = model.thresholds is not None and exits is None

    def prepared():
        batches = eval_batches(
            source,
            model.preprocesses,
            batch_size=model.batch_size,
            **(loading or {}),
        )
        with batches:
            for batch in tqdm(batches, total=-(-len(source) // model.batch_size), desc="embed images", unit="batch"):
                bad.add(batch)
                if not len(batch["index"]):
                    continue
                captions.extend(batch["captions"])
                names.extend(batch["name"])
                labels.extend(batch["labels"])
                index.append(batch["index"])
                for key, pixels in batch["images"].items():
                    if sum(map(len, kept[key])) < timed:
                        kept[key].append(pixels)
                for exit, parts in towers.items():
                    parts.append(model.towers[exit].submit(batch["images"]["clip"]).result())
                yield batch["images"]["clip"], batch["images"].get(model.scored_on)

    if routing:
        routed = model.router.embed_batches(prepared(), model.embed_dim)
    else:
        for _ in prepared():
            pass
    if not captions:
        raise DataError(f"no image of {source.name} could be read:\n{bad.summary()}")
    flat = [caption for group in captions for caption in group]
    sample = {key: np.concatenate(parts)[:timed] for key, parts in kept.items()}
    return Gallery(
        by_exit={exit: np.concatenate(parts) for exit, parts in towers.items()},
        texts=model.encode_text(flat),
        caption_image=np.repeat(np.arange(len(captions)), [len(group) for group in captions]),
        routed=routed.embeddings if routing else None,
        scores=routed.scores if routing else None,
        exits=routed.exits if routing else None,
        sample=timing.Sample(sample["clip"], sample.get(model.scored_on)),
        captions=captions,
        bad=bad,
        names=names,
        index=np.concatenate(index),
        labels=labels,
    )


def full_scale(model: Model) -> float:
    """Returns the logit scale of full depth, clipped at 100 for CLIP and unclipped for SigLIP."""
    return model.temperature if model.arch.logit_bias else min(model.temperature, LOGIT_SCALE_MAX)


def labelled(
    gallery: Gallery, urls: list[str | None] | None, table: dict[str, Labels] | None, file: str, notes: list[str]
) -> Gallery:
    """Returns the gallery with labels from `table`, the result of `read_labels(file)`; adds a note on their coverage.

    Without a table the gallery is returned unchanged.
    """
    if table is None:
        return gallery
    own_urls = [urls[i] for i in gallery.index.tolist()] if urls is not None else None
    labels, note = merge_labels(gallery.names, own_urls, table, file)
    notes.append(note)
    return dataclasses.replace(gallery, labels=labels)


@dataclass
class Evidence:
    """Per-image results shown in the report. ranks: run -> `Ranks`, for runs with one assignment; exits: run -> [N]."""

    gallery: Gallery
    ranks: dict[str, Ranks] = field(default_factory=dict)
    exits: dict[str, np.ndarray] = field(default_factory=dict)

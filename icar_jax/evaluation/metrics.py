"""Instance-level image-text retrieval with several captions an image: ranks and recall, in numpy.

Each caption belongs to one image. Text-to-image has one query per caption and one right image. Image-to-text has
one query per image and takes the best rank over the image's captions, as is usual for COCO and Flickr30k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Ranks:
    """1-based ranks of the right answers in one gallery of N images and M captions, int64.

    text_to_image: [M] rank of each caption's own image among the N images.
    image_to_text: [N] best rank of the image's own captions among the M captions.
    caption_image: [M] index of the image of each caption, as given to `ranks`.
    """

    text_to_image: np.ndarray
    image_to_text: np.ndarray
    caption_image: np.ndarray


def ranks(
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    caption_image: np.ndarray,
    *,
    query_chunk: int = 1024,
) -> Ranks:
    """Ranks every query against the whole gallery by dot product (give unit-norm embeddings for cosine).

    image_embed: [N, D]; text_embed: [M, D]; both are cast to float32 and multiplied in float32.
    caption_image: [M] integers in [0, N); every image needs at least one caption.
    query_chunk: queries scored at a time; peak memory is about 5 bytes x query_chunk x max(N, M).

    The rank of an item is 1 + the number of items with a higher score, or with an equal score and a lower index. So
    exact ties are deterministic, and an encoder that maps everything to one point gains nothing over chance.

    Raises ValueError for wrong shapes, an empty gallery, embeddings that are not finite, `caption_image` out of
    range, and images without a caption.
    """
    images = _embeddings("image_embed", image_embed)
    texts = _embeddings("text_embed", text_embed)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"image_embed has {images.shape[1]} dimensions and text_embed {texts.shape[1]}: both must come from the "
            "same checkpoint's shared embedding space"
        )
    if query_chunk < 1:
        raise ValueError(f"query_chunk must be at least 1, found {query_chunk}")
    owner = _owners(caption_image, n_images=len(images), n_captions=len(texts))
    return Ranks(
        text_to_image=_text_to_image(images, texts, owner, query_chunk),
        image_to_text=_image_to_text(images, texts, owner, query_chunk),
        caption_image=owner,
    )


def recall(ranks: Ranks, k: int) -> dict[str, float]:
    """Recall at k of both directions, in percent of the queries: {'text_to_image': ..., 'image_to_text': ...}."""
    if k < 1:
        raise ValueError(f"recall needs k >= 1, found {k}")
    return {name: 100.0 * float(np.mean(getattr(ranks, name) <= k)) for name in DIRECTIONS}


def summarise(ranks: Ranks) -> dict[str, dict[str, float]]:
    """Per direction: 'r1', 'r5', 'r10' in percent, 'median_rank' and 'mean_rank' (1 is perfect)."""
    summary = {
        name: {
            "median_rank": float(np.median(getattr(ranks, name))),
            "mean_rank": float(np.mean(getattr(ranks, name))),
        }
        for name in DIRECTIONS
    }
    recalls = {k: recall(ranks, k) for k in RECALL_AT}
    return {name: {f"r{k}": recalls[k][name] for k in RECALL_AT} | summary[name] for name in DIRECTIONS}


def mean_summary(summaries: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Mean of several results of `summarise`, as for several draws of random routing."""
    if not summaries:
        raise ValueError("mean_summary needs at least one summary, found none")
    return {
        name: {key: float(np.mean([s[name][key] for s in summaries])) for key in summaries[0][name]}
        for name in DIRECTIONS
    }


def chance_recall(n_images: int, n_captions: int, k: int) -> dict[str, float]:
    """Recall at k of a random order, in percent, for a gallery with equally many captions an image.

    Text-to-image is k / N. Image-to-text is the chance that k draws without replacement from M captions hit one of
    c = M / N: 1 - prod_{j<k} (M - c - j) / (M - j).
    """
    if n_images < 1 or n_captions < n_images:
        raise ValueError(
            f"a gallery needs an image and at least one caption an image, found {n_images} images and "
            f"{n_captions} captions"
        )
    miss, own = 1.0, n_captions / n_images
    for drawn in range(min(k, n_captions)):
        miss *= max(n_captions - own - drawn, 0.0) / (n_captions - drawn)
    return {"text_to_image": 100.0 * min(k / n_images, 1.0), "image_to_text": 100.0 * (1.0 - miss)}


def _text_to_image(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, chunk: int) -> np.ndarray:
    result = np.empty(len(texts), np.int64)
    buffer = np.empty((min(chunk, len(texts)), len(images)), np.float32)
    for start in range(0, len(texts), chunk):
        rows = slice(start, min(start + chunk, len(texts)))
        scores = np.matmul(texts[rows], images.T, out=buffer[: rows.stop - start])
        result[rows] = _rank_of(scores, owner[rows])
    return result


def _image_to_text(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, chunk: int) -> np.ndarray:
    # Captions grouped by image: those of image i are grouped[begin[i]:begin[i + 1]].
    grouped = np.argsort(owner, kind="stable")
    begin = np.searchsorted(owner[grouped], np.arange(len(images) + 1))
    result = np.empty(len(images), np.int64)
    buffer = np.empty((min(chunk, len(images)), len(texts)), np.float32)
    for start in range(0, len(images), chunk):
        rows = slice(start, min(start + chunk, len(images)))
        scores = np.matmul(images[rows], texts.T, out=buffer[: rows.stop - start])
        own = grouped[begin[start] : begin[rows.stop]]
        own_row = owner[own] - start
        groups = begin[rows] - begin[start]
        own_score = scores[own_row, own]
        best = np.maximum.reduceat(own_score, groups)
        # Of equally good captions the lowest index ranks first.
        target = np.minimum.reduceat(np.where(own_score == best[own_row], own, len(texts)), groups)
        result[rows] = _rank_of(scores, target)
    return result


def _rank_of(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rank of item target[q] in scores[q]; scores: [Q, G] float32, target: [Q]; returns [Q] int64.

    The target's score is read from the same product as its rivals', so rounding never separates equal vectors that
    the product treats alike. Counting replaces sorting: O(G) a query.
    """
    own = np.take_along_axis(scores, target[:, None], axis=1)
    higher = np.count_nonzero(scores > own, axis=1)
    tied = np.count_nonzero(scores == own, axis=1) > 1
    if tied.any():
        before = np.arange(scores.shape[1]) < target[tied, None]
        higher[tied] += np.count_nonzero((scores[tied] == own[tied]) & before, axis=1)
    return higher + 1


def _embeddings(name: str, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(values, np.float32)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [items, dimensions], found {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty (shape {list(array.shape)}): a gallery needs images and captions")
    # A finite squared norm proves at once: no NaN, no inf, and no dot product that can overflow.
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(np.einsum("nd,nd->n", array, array))
    if not finite.all():
        bad = np.flatnonzero(~finite)
        raise ValueError(
            f"{name}: {len(bad)} of {len(array)} rows hold NaN, inf or values too large for float32 (first: row "
            f"{bad[0]}). Check the checkpoint and the inputs of these rows; a rank over them would mean nothing"
        )
    return array


def _owners(caption_image: np.ndarray, *, n_images: int, n_captions: int) -> np.ndarray:
    owner = np.asarray(caption_image)
    if owner.shape != (n_captions,) or not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(
            f"caption_image must be [{n_captions}] integers, one for each row of text_embed; found shape "
            f"{list(owner.shape)} of {owner.dtype}"
        )
    owner = owner.astype(np.int64)
    outside = np.flatnonzero((owner < 0) | (owner >= n_images))
    if outside.size:
        raise ValueError(
            f"caption_image: {outside.size} of {n_captions} entries lie outside [0, {n_images}), the rows of "
            f"image_embed (first: caption {outside[0]} names image {owner[outside[0]]})"
        )
    bare = np.flatnonzero(np.bincount(owner, minlength=n_images) == 0)
    if bare.size:
        raise ValueError(
            f"{bare.size} of {n_images} images have no caption (first: image {bare[0]}), so their image-to-text rank "
            "is undefined: leave them out of image_embed or give them captions"
        )
    return owner

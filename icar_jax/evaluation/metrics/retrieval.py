"""Instance-level image-text retrieval with several captions per image: ranks and recall.

Each caption belongs to one image. Text-to-image has one query per caption and one target image. Image-to-text has
one query per image and takes the best rank over the image's captions, as is standard for COCO and Flickr30k. Distractors are
in both galleries and are never queries or targets. The ranking itself is in evaluation/metrics/ranking.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jax.sharding import Mesh

RECALL_AT = (1, 5, 10)
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Ranks:
    """1-based ranks of the targets for N images and M captions, int64. Distractors are in the galleries only.

    text_to_image: [M] rank of each caption's image among the N images and the distractors.
    image_to_text: [N] best rank of the image's captions among the M captions and the distractors' captions.
    caption_image: [M] image index of each caption, as passed to `ranks`.
    """

    text_to_image: np.ndarray
    image_to_text: np.ndarray
    caption_image: np.ndarray


@dataclass(frozen=True)
class Distractors:
    """A additional images with B captions that enlarge the galleries and are never queries or targets.

    image_embed: [A, D]; text_embed: [B, D]; caption_image: [B] integers in [0, A).
    labels: category labels of each image, () for none; an empty sequence if no image has labels.
    """

    image_embed: np.ndarray
    text_embed: np.ndarray
    caption_image: np.ndarray
    labels: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class Pairs:
    """Validated embeddings for ranking; the distractor arrays may be empty.

    images: [N, D], texts: [M, D], owner: [M] int64; far_images: [A, D], far_texts: [B, D], far_owner: [B] int64.
    """

    images: np.ndarray
    texts: np.ndarray
    owner: np.ndarray
    far_images: np.ndarray
    far_texts: np.ndarray
    far_owner: np.ndarray


def ranks(
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    caption_image: np.ndarray,
    *,
    distractors: Distractors | None = None,
    query_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Ranks:
    """Ranks every query against the full gallery by dot product (cosine for unit-norm embeddings) and returns `Ranks`.

    image_embed: [N, D]; text_embed: [M, D]; all bfloat16, or cast to float32; scores are float32.
    caption_image: [M] integers in [0, N); every image needs at least one caption.
    distractors: additional images and captions in both galleries; none of them is a query.
    query_chunk: queries scored at a time; None uses as many as `ranking.SCORE_BYTES` allow.
    mesh: devices the gallery is sharded over; None uses one device.

    The rank of an item is 1 + the number of items with a higher score, or with an equal score and an earlier position.
    Distractors come before images and captions, and lower indices before higher ones. So ties are deterministic, and an
    encoder that maps everything to one point does no better than chance.

    Raises ValueError for wrong shapes, an empty gallery, `caption_image` out of range and images without a caption, and
    ModelError for embeddings that are not finite.
    """
    from icar_jax.evaluation.metrics.ranking import Ranker  # imported here, so that reading or writing metrics needs no JAX

    pairs = checked(image_embed, text_embed, caption_image, distractors)
    place = {"mesh": mesh, "query_chunk": query_chunk}
    images = Ranker((pairs.far_images, pairs.images), **place)
    text_to_image = images.ranks(pairs.texts, len(pairs.far_images) + pairs.owner[:, None])
    del images  # keep one gallery on the devices at a time
    own = own_captions(pairs.owner, len(pairs.images))
    texts = Ranker((pairs.far_texts, pairs.texts), **place)
    image_to_text = texts.ranks(pairs.images, np.where(own < 0, -1, own + len(pairs.far_texts)))
    return Ranks(text_to_image, image_to_text, pairs.owner)


def own_captions(caption_image: np.ndarray, n_images: int) -> np.ndarray:
    """Returns int64 [N, C]: caption indices of each image, ascending, padded with -1; C is the most captions of any image."""
    counts = np.bincount(caption_image, minlength=n_images)
    grouped = np.argsort(caption_image, kind="stable")
    rows = caption_image[grouped]
    table = np.full((n_images, counts.max()), -1, np.int64)
    table[rows, np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]] = grouped
    return table


def recall(ranks: Ranks, k: int) -> dict[str, float]:
    """Returns recall at k in percent: {'text_to_image': ..., 'image_to_text': ...}. Raises ValueError for k < 1."""
    if k < 1:
        raise ValueError(f"recall needs k >= 1, found {k}")
    return {name: 100.0 * float(np.mean(getattr(ranks, name) <= k)) for name in DIRECTIONS}


def summarise(ranks: Ranks) -> dict[str, dict[str, float]]:
    """Returns, per direction, 'r1', 'r5', 'r10' in percent, 'median_rank' and 'mean_rank' (1 is perfect)."""
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
    """Averages results of `summarise`, such as draws of random routing; each metric over the results that contain it."""
    if not summaries:
        raise ValueError("mean_summary needs at least one summary, found none")
    return {
        name: {key: float(np.mean([s[name][key] for s in summaries if key in s[name]])) for key in summaries[0][name]}
        for name in DIRECTIONS
    }


def chance_recall(n_images: int, n_captions: int, k: int, own: float | None = None) -> dict[str, float]:
    """Returns recall at k of a random ranking, in percent, for a gallery with equally many captions per image.

    own: captions c of each query image; None uses the gallery's mean, M / N.
    Text-to-image is k / N. Image-to-text is the probability that k draws without replacement from M captions hit one of
    the c: 1 - prod_{j<k} (M - c - j) / (M - j). Raises ValueError for an empty gallery or fewer captions than images.
    """
    if n_images < 1 or n_captions < n_images:
        raise ValueError(
            f"a gallery needs an image and at least one caption an image, found {n_images} images and {n_captions} captions"
        )
    miss, own = 1.0, n_captions / n_images if own is None else own
    for drawn in range(min(k, n_captions)):
        miss *= max(n_captions - own - drawn, 0.0) / (n_captions - drawn)
    return {"text_to_image": 100.0 * min(k / n_images, 1.0), "image_to_text": 100.0 * (1.0 - miss)}


def checked(
    image_embed: np.ndarray, text_embed: np.ndarray, caption_image: np.ndarray, distractors: Distractors | None = None
) -> Pairs:
    """Validates the arguments of `ranks` and returns them as arrays. Raises as `ranks` does."""
    images, texts = _embeddings("image_embed", image_embed), _embeddings("text_embed", text_embed)
    far_images, far_texts = images[:0], texts[:0]
    if distractors is not None:
        far_images = _embeddings("distractors.image_embed", distractors.image_embed)
        far_texts = _embeddings("distractors.text_embed", distractors.text_embed)
    for name, array in (("text_embed", texts), ("distractors.image_embed", far_images), ("distractors.text_embed", far_texts)):
        if array.shape[1] != images.shape[1]:
            raise ValueError(
                f"image_embed has {images.shape[1]} dimensions and {name} {array.shape[1]}: both must come from the "
                "same checkpoint's shared embedding space"
            )
    owner = _owners("", caption_image, n_images=len(images), n_captions=len(texts))
    bare = np.flatnonzero(np.bincount(owner, minlength=len(images)) == 0)
    if bare.size:
        raise ValueError(
            f"{bare.size} of {len(images)} images have no caption (first: image {bare[0]}), so their image-to-text rank "
            "is undefined: leave them out of image_embed or give them captions"
        )
    far_owner = owner[:0]
    if distractors is not None:
        names = "distractors.", distractors.caption_image
        far_owner = _owners(*names, n_images=len(far_images), n_captions=len(far_texts))
    return Pairs(images, texts, owner, far_images, far_texts, far_owner)


def _embeddings(name: str, values: np.ndarray) -> np.ndarray:
    """Returns [items, D] as float32; bfloat16 is left unchanged."""
    from icar_jax.evaluation.metrics.ranking import require_finite

    array = np.asarray(values)
    if array.ndim != 2:
        raise ValueError(f"{name} must have shape [items, dimensions], found {list(array.shape)}")
    if 0 in array.shape:
        raise ValueError(f"{name} is empty (shape {list(array.shape)}): a gallery needs images and captions")
    if array.dtype.name != "bfloat16":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32, copy=False)
    require_finite(name, array)
    return array


def _owners(prefix: str, caption_image: np.ndarray, *, n_images: int, n_captions: int) -> np.ndarray:
    owner = np.asarray(caption_image)
    if owner.shape != (n_captions,) or not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(
            f"{prefix}caption_image must be [{n_captions}] integers, one for each row of {prefix}text_embed; found shape "
            f"{list(owner.shape)} of {owner.dtype}"
        )
    owner = owner.astype(np.int64)
    outside = np.flatnonzero((owner < 0) | (owner >= n_images))
    if outside.size:
        raise ValueError(
            f"{prefix}caption_image: {outside.size} of {n_captions} entries lie outside [0, {n_images}), the rows of "
            f"{prefix}image_embed (first: caption {outside[0]} names image {owner[outside[0]]})"
        )
    return owner

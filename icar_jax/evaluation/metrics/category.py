"""Category-level retrieval: average precision at K, where an item is relevant to a query if they share at least one label.

Queries are the base images and the first caption of each. A caption has the labels of its image. The query's own image or
caption is in the gallery and counts like any other item. AP@K is the sum of precision@r over the ranks r <= K of relevant
items, divided by one of two denominators:

- official (github MikelWL/ICAR, scripts/evaluate_mixed_preprocessed.py): the number of relevant items *retrieved* up to rank
  K; AP is 0 if there are none. One relevant item at rank 1 gives a perfect AP@100 even if all others are missed;
- standard (as in TREC and deep hashing): min(K, R), where R is the number of relevant items in the full gallery.

A query without labels has no relevant items: its official AP is 0 and enters the mean; its standard AP is undefined (nan) and
is excluded from the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from icar_jax.errors import DataError, require_list
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, Distractors, checked, own_captions

if TYPE_CHECKING:
    from jax.sharding import Mesh

PRECISION_AT = (10, 50, 100)
DENOMINATORS = ("official", "standard")
_CHUNK_ELEMENTS = 4_000_000  # label-set comparisons in memory at a time


@dataclass(frozen=True)
class Precisions:
    """AP@K of N queries per direction: `values[direction][denominator][K]` is float64 [N], in image order."""

    values: dict[str, dict[str, dict[int, np.ndarray]]]


def precisions(
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    caption_image: np.ndarray,
    labels: Sequence[Sequence[str]],
    *,
    distractors: Distractors | None = None,
    at: Sequence[int] = PRECISION_AT,
    query_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> Precisions:
    """Returns AP@K with every image, and every image's first caption, as queries against all captions and images.

    image_embed: [N, D]; text_embed: [M, D]; caption_image: [M]. Ties and other arguments are as for `retrieval.ranks`.
    labels: labels of each of the N images, () for none. Distractors without labels are never relevant.

    Raises errors as `retrieval.ranks` does, TypeError for labels of an image that are one text, DataError for a wrong number of
    labels or no label at all, and ValueError for K < 1.
    """
    from icar_jax.evaluation.metrics.ranking import Ranker

    pairs = checked(image_embed, text_embed, caption_image, distractors)
    far = distractors.labels if distractors is not None else ()
    far = far or [()] * len(pairs.far_images)
    for name, given, images in (("labels", labels, pairs.images), ("distractors.labels", far, pairs.far_images)):
        require_list(name, given)
        for item, each in enumerate(given):
            require_list(f"{name}[{item}]", each)
        if len(given) != len(images):
            raise DataError(f"{name} must have one entry per image ({len(images)}), () for no labels; found {len(given)}")
    if not any(labels):
        raise DataError("no image has a label, so no item is relevant to any query: category-level retrieval needs labels")
    if not at or min(at) < 1:
        raise ValueError(f"average precision needs K >= 1, found {tuple(at)}")
    place = {"mesh": mesh, "query_chunk": query_chunk}
    sets = LabelSets([*far, *labels])
    n_far = len(pairs.far_images)
    query = sets.of[n_far:]
    found = {}
    gallery, queries = (pairs.far_images, pairs.images), pairs.texts[own_captions(pairs.owner, len(pairs.images))[:, 0]]
    for direction in DIRECTIONS:
        items = sets.of if direction == "text_to_image" else sets.of[np.concatenate([pairs.far_owner, n_far + pairs.owner])]
        best = Ranker(gallery, **place).best(queries, max(at))
        relevant = sets.share(query[:, None], items[best])
        found[direction] = average_precision(relevant, sets.relevant_in(query, items), at)
        gallery, queries = (pairs.far_texts, pairs.texts), pairs.images
    return Precisions(found)


def average_precision(
    relevant: np.ndarray, total: np.ndarray, at: Sequence[int] = PRECISION_AT
) -> dict[str, dict[int, np.ndarray]]:
    """Returns {'official': {K: AP@K [Q]}, 'standard': {K: AP@K [Q]}}, float64, for the two denominators described above.

    relevant: bool [Q, K'] relevance of the top K' items, where K' is at least the largest K, or the gallery size.
    total: [Q] number of relevant items in the full gallery.
    """
    hits = np.cumsum(relevant, axis=1, dtype=np.float64)
    ranks = np.arange(1, relevant.shape[1] + 1)
    summed = np.cumsum(np.where(relevant, hits / ranks, 0.0), axis=1)
    found: dict[str, dict[int, np.ndarray]] = {name: {} for name in DENOMINATORS}
    for k in at:
        last = min(k, relevant.shape[1]) - 1
        retrieved, possible = hits[:, last], np.minimum(k, total)
        found["official"][k] = np.where(retrieved > 0, summed[:, last] / np.maximum(retrieved, 1), 0.0)
        found["standard"][k] = np.where(possible > 0, summed[:, last] / np.maximum(possible, 1), np.nan)
    return found


def summarise(precisions: Precisions) -> dict[str, dict[str, float]]:
    """Returns mAP in percent per direction: 'map10', 'map50', ... (official), 'map10_standard', ... (standard)."""
    return {
        direction: {
            f"map{k}{'' if name == 'official' else '_standard'}": 100.0 * float(np.nanmean(values))
            for name, by_k in by_name.items()
            for k, values in by_k.items()
        }
        for direction, by_name in precisions.values.items()
    }


class LabelSets:
    """Label sets of many items, deduplicated and stored as bit masks.

    of: int64 [items], the set index of each item.
    """

    def __init__(self, labels: Sequence[Sequence[str]]):
        require_list("labels", labels)
        for item, each in enumerate(labels):
            require_list(f"the labels of item {item}", each)
        numbers: dict[frozenset[str], int] = {}
        self.of = np.array([numbers.setdefault(frozenset(each), len(numbers)) for each in labels], np.int64)
        known = {label: i for i, label in enumerate(sorted(set().union(*numbers)))}
        self._bits = np.zeros((len(numbers), -(-len(known) // 64)), np.uint64)
        for row, each in enumerate(numbers):
            for label in each:
                word, bit = divmod(known[label], 64)
                self._bits[row, word] |= np.uint64(1 << bit)

    def share(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Returns whether sets a and b (indices, broadcast) share a label."""
        shared = np.zeros(np.broadcast_shapes(a.shape, b.shape), bool)
        for word in self._bits.T:  # one word at a time, to limit memory
            shared |= (word[a] & word[b]) != 0
        return shared

    def relevant_in(self, query: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Returns int64 [Q]: the number of items that share a label with each query; both are given as set indices."""
        wanted, place = np.unique(query, return_inverse=True)
        sets, count = np.unique(items, return_counts=True)
        rows = max(1, _CHUNK_ELEMENTS // len(sets))
        starts = range(0, len(wanted), rows)
        return np.concatenate([self.share(wanted[i : i + rows, None], sets[None]) @ count for i in starts])[place]

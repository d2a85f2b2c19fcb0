"""Category-level retrieval: an item is relevant to a query if they share at least one label; average precision at K.

Queries are the base images, and the first caption of each. A caption has the labels of its image. The query's own image or
caption is in the gallery and counts as any other. Two denominators are in use for AP@K, the mean of precision@r over the
ranks r <= K of relevant items:

- official (github MikelWL/ICAR, scripts/evaluate_mixed_preprocessed.py): the relevant items *retrieved*, those up to K; 0
  where there are none. One relevant item at rank 1 is a perfect AP@100, whatever else was missed;
- standard (as TREC and Deep Hashing write it): min(K, R), with R the relevant items in the whole gallery.

A query without labels has no relevant item: the official AP is 0 and counts, the standard AP is undefined (nan) and is left
out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from icar_jax.errors import DataError
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, Distractors, checked, own_captions

if TYPE_CHECKING:
    from jax.sharding import Mesh

PRECISION_AT = (10, 50, 100)
DENOMINATORS = ("official", "standard")
_CHUNK_ELEMENTS = 4_000_000  # comparisons of label sets held at a time


@dataclass(frozen=True)
class Precisions:
    """AP@K of N queries a direction, float64: `values[direction][denominator][K]` is [N], in the order of the images."""

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
    """AP@K of every image and of every image's first caption, in galleries of all captions and images, with distractors.

    image_embed: [N, D]; text_embed: [M, D]; caption_image: [M] as for `metrics.ranks`, as are ties and the other arguments.
    labels: for each of the N images its labels, () where it has none. Distractors without labels are irrelevant.

    Raises ValueError as `metrics.ranks` does, and for a wrong number of labels, no label at all, or a K below 1.
    """
    from icar_jax.evaluation.metrics.ranking import Ranker

    pairs = checked(image_embed, text_embed, caption_image, distractors)
    far = distractors.labels if distractors is not None else ()
    far = far or [()] * len(pairs.far_images)
    for name, given, images in (("labels", labels, pairs.images), ("distractors.labels", far, pairs.far_images)):
        if len(given) != len(images):
            raise DataError(f"{name} must hold the labels of {len(images)} images, () for one without; found {len(given)}")
    if not any(labels):
        raise DataError("no image has a label, so nothing is relevant to any query: category-level retrieval needs labels")
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
    """{'official': {K: AP@K [Q]}, 'standard': {K: AP@K [Q]}}, float64, for the denominators explained above.

    relevant: bool [Q, K'] of the first K' items in order, where K' is at least the greatest K or the whole gallery.
    total: [Q] relevant items in the whole gallery.
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
    """Per direction, in percent: 'map10', 'map50', ... (official denominator), 'map10_standard', ... (standard)."""
    return {
        direction: {
            f"map{k}{'' if name == 'official' else '_standard'}": 100.0 * float(np.nanmean(values))
            for name, by_k in by_name.items()
            for k, values in by_k.items()
        }
        for direction, by_name in precisions.values.items()
    }


class LabelSets:
    """Sets of labels of many items: equal sets are kept once, as bits.

    of: int64 [items], the number of each item's set.
    """

    def __init__(self, labels: Sequence[Sequence[str]]):
        numbers: dict[frozenset[str], int] = {}
        self.of = np.array([numbers.setdefault(frozenset(each), len(numbers)) for each in labels], np.int64)
        known = {label: i for i, label in enumerate(sorted(set().union(*numbers)))}
        self._bits = np.zeros((len(numbers), -(-len(known) // 64)), np.uint64)
        for row, each in enumerate(numbers):
            for label in each:
                word, bit = divmod(known[label], 64)
                self._bits[row, word] |= np.uint64(1 << bit)

    def share(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Whether the sets of these numbers have a label in common; broadcasts."""
        shared = np.zeros(np.broadcast_shapes(a.shape, b.shape), bool)
        for word in self._bits.T:  # one at a time: no array of all words of all pairs
            shared |= (word[a] & word[b]) != 0
        return shared

    def relevant_in(self, query: np.ndarray, items: np.ndarray) -> np.ndarray:
        """int64 [Q]: how many of the items share a label with each query, both given as numbers of their sets."""
        wanted, place = np.unique(query, return_inverse=True)
        sets, count = np.unique(items, return_counts=True)
        rows = max(1, _CHUNK_ELEMENTS // len(sets))
        starts = range(0, len(wanted), rows)
        return np.concatenate([self.share(wanted[i : i + rows, None], sets[None]) @ count for i in starts])[place]

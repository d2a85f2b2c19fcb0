"""Random and oracle assignments of images to exits, and ranks in the resulting mixed galleries.

The effect of an exit on an image is measured with only that image at the exit and all others at full depth (`ranks_alone`).
An oracle defined on the mixed gallery would be circular, since each rank there depends on the exits of all other images. So
the oracle decides on `ranks_alone`, and its mixed gallery is then ranked like any other. Image-to-text ranks are the same in
both, because captions have no exits; text-to-image ranks may differ slightly when other images leave early too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from icar_jax.evaluation.metrics.retrieval import Distractors, Ranks, checked, own_captions
from icar_jax.models.reduction.routes import in_cost_order

if TYPE_CHECKING:
    from jax.sharding import Mesh

_ROWS = 4096


def take_exits(by_exit: Mapping[int, np.ndarray], exits: np.ndarray) -> np.ndarray:
    """Selects each image's embedding [N, D] from the exit [N] it takes. Raises ValueError for an exit without embeddings."""
    if unknown := set(np.unique(exits).tolist()) - set(by_exit):
        raise ValueError(f"no embeddings for exits {sorted(unknown)}; available exits: {sorted(by_exit)}")
    rows = by_exit[max(by_exit)].copy()
    for exit, embeddings in by_exit.items():
        rows[exits == exit] = embeddings[exits == exit]
    return rows


def random_exits(exits: np.ndarray, seed: int) -> np.ndarray:
    """Returns a random permutation of exits [N], so each exit keeps its number of images."""
    return np.random.default_rng(seed).permutation(exits)


def ranks_alone(
    by_exit: Mapping[int, np.ndarray],
    text_embed: np.ndarray,
    caption_image: np.ndarray,
    *,
    distractors: Distractors | None = None,
    query_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> dict[int, Ranks]:
    """Returns exit -> `Ranks` if only the target or query image uses that exit and all other images are at full depth.

    by_exit: exit (executed blocks) -> [N, D]; the largest exit is full depth. Other arguments as for `retrieval.ranks`;
    distractors are at full depth. text_to_image: rank of the image at this exit, for each of its captions, among the other
    images at full depth. image_to_text: best rank of the image's captions, with the image at this exit as query.
    """
    from icar_jax.evaluation.metrics.ranking import Ranker

    full = max(by_exit)
    pairs = {exit: checked(embeddings, text_embed, caption_image, distractors) for exit, embeddings in by_exit.items()}
    whole = pairs[full]
    place = {"mesh": mesh, "query_chunk": query_chunk}
    position = len(whole.far_images) + whole.owner
    images = Ranker((whole.far_images, whole.images), **place)
    text_to_image = {full: images.ranks(whole.texts, position[:, None])}
    for exit in sorted(set(by_exit) - {full}):
        rows = pairs[exit].images
        found = images.ranks_of_scores(whole.texts, _own_scores(whole.texts, rows, whole.owner), position)
        same = (rows == whole.images).all(axis=1)  # equal rows may still differ in the last bit between the two products
        text_to_image[exit] = np.where(same[whole.owner], text_to_image[full], found)
    del images
    own = own_captions(whole.owner, len(whole.images))
    own = np.where(own < 0, -1, own + len(whole.far_texts))
    texts = Ranker((whole.far_texts, whole.texts), **place)
    return {e: Ranks(text_to_image[e], texts.ranks(pairs[e].images, own), whole.owner) for e in sorted(by_exit)}


def ranks_mixed(
    by_exit: Mapping[int, np.ndarray],
    text_embed: np.ndarray,
    caption_image: np.ndarray,
    exits: np.ndarray,
    *,
    far_by_exit: Mapping[int, np.ndarray] | None = None,
    distractors: Distractors | None = None,
    query_chunk: int | None = None,
    mesh: Mesh | None = None,
) -> list[Ranks]:
    """Ranks S assignments at once; equals S calls of `retrieval.ranks` on `take_exits`, but is much cheaper.

    by_exit: exit -> [N, D]; exits: [S, N], or [S, N + A] with distractors last, the exit of each image.
    far_by_exit: exit -> [A, D] of the distractors; replaces `distractors.image_embed`. Other arguments as for
    `retrieval.ranks`. Raises ValueError as it does, and for an exit without embeddings.
    """
    from icar_jax.evaluation.metrics.ranking import Ranker, mixed_ranks

    order, far_exits = sorted(by_exit), set(far_by_exit or by_exit)
    if unknown := (set(np.unique(exits).tolist()) | far_exits) - set(order):
        raise ValueError(f"no embeddings for exits {sorted(unknown)}; available exits: {order}")
    if unknown := set(order) - far_exits:
        raise ValueError(f"no distractor embeddings for exits {sorted(unknown)}; available exits: {sorted(far_exits)}")
    pairs = {}
    for exit, embeddings in by_exit.items():
        far = dataclasses.replace(distractors, image_embed=far_by_exit[exit]) if distractors is not None else None
        pairs[exit] = checked(embeddings, text_embed, caption_image, far)
    some = pairs[order[0]]
    n, n_far = len(some.images), len(some.far_images)
    place = {"mesh": mesh, "query_chunk": query_chunk}
    own = own_captions(some.owner, n)
    texts = Ranker((some.far_texts, some.texts), **place)
    # Captions have no exits, so an image's image-to-text rank depends only on its own exit.
    alone = np.stack([texts.ranks(pairs[e].images, np.where(own < 0, -1, own + len(some.far_texts))) for e in order])
    del texts
    choice = np.searchsorted(order, np.concatenate([exits[:, n:], exits[:, :n]], axis=1))
    rankers = [Ranker((pairs[e].far_images, pairs[e].images), **place) for e in order]
    text_to_image = mixed_ranks(rankers, some.texts, n_far + some.owner, choice)
    image_to_text = np.take_along_axis(alone, choice[:, n_far:], axis=0)
    return [Ranks(t, i, some.owner) for t, i in zip(np.ascontiguousarray(text_to_image.T), image_to_text)]


def oracle_exits(alone: Mapping[int, Ranks]) -> np.ndarray:
    """Returns int64 [N]: lossless oracle, the cheapest exit of each image at which none of its ranks is worse than at full
    depth.

    alone: from `ranks_alone`. The image's own rank and those of all its captions count. At these exits no instance-level
    metric drops, except through other images that leave early too (see above).
    """
    order = in_cost_order(alone)
    full = order[-1]
    n = len(alone[full].image_to_text)
    exits = np.full(n, full, np.int64)
    for exit in reversed(order):
        worse = alone[exit].image_to_text > alone[full].image_to_text
        falls = alone[exit].text_to_image > alone[full].text_to_image
        worse |= np.bincount(alone[full].caption_image, weights=falls, minlength=n) > 0
        exits[~worse] = exit
    return exits


def oracle_exits_at_share(alone: Mapping[int, Ranks], counts: Mapping[int, int], k: int | Sequence[int] = 5) -> np.ndarray:
    """Returns int64 [N]: oracle, the assignment with `counts[exit]` images at each exit that maximises recall at k.

    Recall is the mean over both directions and over all given k, computed from `alone`; reciprocal ranks break ties in hits.
    The solution is exact: a transportation problem, whose linear program has an integral optimum (Dantzig 1951). It is an
    upper bound for any router with the same counts that scores images independently, up to the effect of other images'
    exits on the ranks.

    Raises ValueError if the counts do not sum to N images or name an exit without ranks.
    """
    exits = sorted(alone)
    n = len(alone[exits[0]].image_to_text)
    if set(counts) - set(exits) or sum(counts.values()) != n or min(counts.values()) < 0:
        raise ValueError(f"counts={dict(counts)} must assign all {n} images to the exits {exits}")
    used = [exit for exit in exits if counts.get(exit)]
    gain = np.stack([_gain(alone[exit], np.atleast_1d(k)) for exit in used], axis=1)
    return np.array(used, np.int64)[_transport(gain, [counts[exit] for exit in used])]


def _gain(ranks: Ranks, ks: np.ndarray) -> np.ndarray:
    """Returns [N]: each image's contribution to mean recall at `ks` over both directions, plus a tie-break by rank."""
    n, m = len(ranks.image_to_text), len(ranks.caption_image)
    little = 1 / (4 * len(ks) * max(n, m))  # weight of reciprocal ranks; in total below the smallest hit

    def worth(found: np.ndarray) -> np.ndarray:
        return np.mean([found <= k for k in ks], axis=0) + little / found

    of_captions = np.bincount(ranks.caption_image, weights=worth(ranks.text_to_image), minlength=n)
    return (of_captions / m + worth(ranks.image_to_text) / n) / 2


def _transport(gain: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Returns [N]: the column of gain [N, E] chosen per row to maximise the sum, with column e used counts[e] times."""
    n, e = gain.shape
    if e == 1:
        return np.zeros(n, np.int64)
    if e == 2:  # images that lose the least take the first column
        columns = np.ones(n, np.int64)
        columns[np.argsort(gain[:, 1] - gain[:, 0], kind="stable")[: counts[0]]] = 0
        return columns
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron, vstack

    one_each = kron(eye_array(n), np.ones((1, e)))
    per_column = kron(np.ones((1, n)), eye_array(e))
    limits = np.concatenate([np.ones(n), counts])
    # Scaled, since HiGHS uses absolute tolerances. The dual simplex ends in a vertex, and all vertices are integral.
    cost = -gain.ravel() / max(np.abs(gain).max(), np.finfo(np.float64).tiny)
    solved = linprog(cost, A_eq=csr_array(vstack([one_each, per_column])), b_eq=limits, bounds=(0, 1), method="highs-ds")
    if solved.x is None:
        raise RuntimeError(f"could not solve the assignment of {n} images to {e} exits: {solved.message}")
    return solved.x.reshape(n, e).argmax(axis=1)


def _own_scores(texts: np.ndarray, images: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Returns float32 [M]: the score of each caption with its own image."""
    scores = np.empty(len(texts), np.float32)
    for start in range(0, len(texts), _ROWS):
        rows = slice(start, start + _ROWS)
        a, b = texts[rows].astype(np.float32), images[owner[rows]].astype(np.float32)
        scores[rows] = np.einsum("md,md->m", a, b)
    return scores

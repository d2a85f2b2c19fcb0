"""Per-exit affine score calibration: s' = a_e s + b_e for each early exit e, where s is the cosine similarity.

In a mixed gallery, images from different exits are ranked against each other. If the cosines of one exit are lower or less
spread than those of full depth, its images rank too low regardless of content. One slope and one offset per exit are fitted
on calibration images, never on evaluated ones; full depth stays at (1, 0). The objective is the text-to-image InfoNCE in the
mixed gallery at full depth's temperature, which is convex in (a, b). Image-to-text ranks do not change, because all captions of
an image share its a > 0 and b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from icar_jax.evaluation.routing.assignments import take_exits
from icar_jax.models.reduction.routes import in_cost_order

_ROWS = 512  # captions scored at a time
_LEAST_SLOPE = 0.05  # keeps slopes positive: a slope <= 0 would reverse the order of an exit's captions


@dataclass(frozen=True)
class Affine:
    """The calibrated score of a cosine s is slope s + offset; by default s itself."""

    slope: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Bias:
    """Mean cosine of captions with their own image, and with all other images."""

    matching: float
    other: float


@dataclass(frozen=True)
class ScoreCalibration:
    """Calibration of cosines.

    exits: exit (executed blocks), shallow to deep -> its map; full depth keeps its cosines.
    loss_before, loss_after: InfoNCE in nats on the calibration images, without and with the calibration.
    """

    kind: str = field(default="affine", init=False)
    exits: dict[int, Affine]
    loss_before: float
    loss_after: float

    def map_images(self, embeddings: np.ndarray, exits: np.ndarray) -> np.ndarray:
        """Maps embeddings [N, D] from `exits` [N] to float32 [N, D + 1] whose products with `map_texts` are calibrated scores.

        Raises ValueError for an exit without calibration.
        """
        slopes, offsets = self._of(exits)
        return np.concatenate([embeddings.astype(np.float32) * slopes[:, None], offsets[:, None]], axis=1)

    @staticmethod
    def map_texts(embeddings: np.ndarray) -> np.ndarray:
        """Appends a column of ones to text embeddings: [M, D] -> float32 [M, D + 1]."""
        return np.concatenate([embeddings.astype(np.float32), np.ones((len(embeddings), 1), np.float32)], axis=1)

    def _of(self, exits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if unknown := set(np.unique(exits).tolist()) - set(self.exits):
            raise ValueError(f"no score calibration for exits {sorted(unknown)}; calibrated exits: {sorted(self.exits)}")
        pairs = np.zeros((len(exits), 2), np.float32)
        for exit, affine in self.exits.items():
            pairs[exits == exit] = affine.slope, affine.offset
        return pairs[:, 0], pairs[:, 1]


def bias(by_exit: Mapping[int, np.ndarray], texts: np.ndarray, caption_image: np.ndarray) -> dict[int, Bias]:
    """Returns the bias of each exit.

    by_exit: exit -> [N, D]; texts: [M, D], unit norm; caption_image: [M]. `other` is nan for a single image.
    """
    owner = np.asarray(caption_image)
    whole, found = texts.sum(axis=0, dtype=np.float64), {}
    for exit, images in sorted(by_exit.items()):
        own = np.einsum("md,md->m", images[owner], texts, dtype=np.float64)
        others = (len(images) - 1) * len(texts)
        rest = images.sum(axis=0, dtype=np.float64) @ whole - own.sum()
        found[exit] = Bias(float(own.mean()), float(rest / others) if others else float("nan"))
    return found


def fit(
    by_exit: Mapping[int, np.ndarray], texts: np.ndarray, caption_image: np.ndarray, exits: np.ndarray, scale: float
) -> ScoreCalibration:
    """Fits the slopes and offsets that minimise the loss for a gallery whose images leave at `exits` [N].

    by_exit: exit -> [N, D] of calibration images; texts: [M, D], unit norm; caption_image: [M]; scale: logit scale of full
    depth. Full depth and unused exits stay at (1, 0), as does a single exit that all images share, since nothing is mixed.
    Raises ValueError for an exit without embeddings.
    """
    full, owner = in_cost_order(by_exit)[-1], np.asarray(caption_image)
    rows = take_exits(by_exit, exits).astype(np.float32)
    fitted = [e for e in sorted(by_exit) if e != full and np.any(exits == e)]
    affine = {e: Affine() for e in sorted(by_exit)}
    if not fitted or len(np.unique(exits)) == 1:
        before = _loss(np.zeros(2 * len(fitted)), rows, texts, owner, exits, fitted, scale, [(0.0, 1.0)] * len(fitted))[0]
        return ScoreCalibration(affine, before, before)
    # Standardise cosines, so that steps in slope and in offset move the logits equally.
    spread = [_spread(rows[exits == e], texts) for e in fitted]
    arguments = (rows, texts, owner, exits, fitted, scale, spread)
    start = np.zeros(2 * len(fitted))
    lowest = [(scale * deviation * (_LEAST_SLOPE - 1), None) for _, deviation in spread]
    bounds = [bound for low in lowest for bound in (low, (None, None))]

    from scipy.optimize import minimize

    solved = minimize(_loss, start, arguments, method="L-BFGS-B", jac=True, bounds=bounds)
    before = _loss(start, *arguments)[0]
    for e, (u, v), (mean, deviation) in zip(fitted, solved.x.reshape(-1, 2), spread):
        slope = u / (scale * deviation)
        affine[e] = Affine(float(1 + slope), float(v / scale - slope * mean))
    return ScoreCalibration(affine, before, float(solved.fun))


def _spread(images: np.ndarray, texts: np.ndarray) -> tuple[float, float]:
    """Returns mean and standard deviation of the cosines between images and texts."""
    scores = images[:_ROWS] @ texts[: 4 * _ROWS].T.astype(np.float32)
    return float(scores.mean()), max(float(scores.std()), 1e-3)


def _loss(
    x: np.ndarray, rows: np.ndarray, texts: np.ndarray, owner: np.ndarray, exits: np.ndarray, fitted: list[int], scale: float,
    spread: list[tuple[float, float]],
) -> tuple[float, np.ndarray]:  # fmt: skip
    """Returns mean InfoNCE and its gradient in x = (u, v) per exit; logits are T s + u (s - mean) / deviation + v."""
    members = [exits == e for e in fitted]
    total, gradient = 0.0, np.zeros(2 * len(fitted))
    for start in range(0, len(texts), _ROWS):
        piece = slice(start, start + _ROWS)
        cosines = (texts[piece].astype(np.float32) @ rows.T).astype(np.float64)
        logits, features = scale * cosines, []
        for i, (member, (mean, deviation)) in enumerate(zip(members, spread)):
            centred = (cosines[:, member] - mean) / deviation
            logits[:, member] += x[2 * i] * centred + x[2 * i + 1]
            features.append(centred)
        own = (np.arange(len(logits)), owner[piece])
        top = logits.max(axis=1, keepdims=True)
        weights = np.exp(logits - top)
        sums = weights.sum(axis=1, keepdims=True)
        total += float(np.sum(np.log(sums[:, 0]) + top[:, 0] - logits[own]))
        weights /= sums
        weights[own] -= 1
        for i, (member, centred) in enumerate(zip(members, features)):
            gradient[2 * i] += np.sum(weights[:, member] * centred)
            gradient[2 * i + 1] += np.sum(weights[:, member])
    return total / len(texts), gradient / len(texts)

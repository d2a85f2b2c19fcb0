"""Deletion test of complexity maps on scenes, whose objects are known.

Deletion (Petsiuk et al. 2018, RISE): if a map is faithful, replacing its highest-ranked pixels lowers the score more than
replacing as many other pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from icar_jax.data.scenes import Scene, Scenes
from icar_jax.data.scenes.draw import draw_scene
from icar_jax.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, Interval, resample_indices
from icar_jax.inference.explain import Explainer, enlarge
from icar_jax.inference.model import Model

ORDERS = ("highest", "random_cells", "random_pixels", "lowest")
FILLS = ("background", "blur")
_BLUR = 0.08  # standard deviation as a fraction of the image side
Score = Callable[[np.ndarray], np.ndarray]


def object_mask(scene: Scene, side: int, confetti: bool = True) -> np.ndarray:
    """Returns bool [side, side]: bounding boxes of a scene's items and, unless disabled, its confetti."""
    circles = [(item.x, item.y, item.radius) for item in scene.items]
    if confetti:
        circles += [(x, y, length + width) for x, y, _, length, width, *_ in scene.confetti]
    mask = np.zeros((side, side), bool)
    for x, y, radius in circles:
        left, top = (max(0, int((centre - radius) * side)) for centre in (x, y))
        mask[top : int((y + radius) * side) + 1, left : int((x + radius) * side) + 1] = True
    return mask


def fills(scenes: Sequence[Scene], pictures: np.ndarray, kind: str) -> np.ndarray:
    """Returns replacement pixels uint8 [N, S, S, 3]: the scene without items and confetti, or the blurred image.

    Raises ValueError unless kind is one of FILLS.
    """
    side = pictures.shape[1]
    if kind == "background":
        return np.stack([draw_scene(dataclasses.replace(s, items=(), confetti=()), side) for s in scenes])
    if kind == "blur":
        blur = ImageFilter.GaussianBlur(_BLUR * side)
        return np.stack([np.asarray(Image.fromarray(picture).filter(blur)) for picture in pictures])
    raise ValueError(f"fill {kind!r} must be one of {FILLS}")


def replace(pictures: np.ndarray, filling: np.ndarray, ranks: np.ndarray, share: float) -> np.ndarray:
    """Replaces the fraction `share` of pixels ranked highest by `ranks` [N, S, S] with those of `filling` [N, S, S, 3]."""
    n, side = pictures.shape[:2]
    count = round(share * side * side)
    out = pictures.copy().reshape(n, side * side, 3)
    chosen = np.argsort(-ranks.reshape(n, -1), axis=1, kind="stable")[:, :count]
    rows = np.arange(n)[:, None]
    out[rows, chosen] = filling.reshape(n, side * side, 3)[rows, chosen]
    return out.reshape(pictures.shape)


def rankings(maps: np.ndarray, side: int, seed: int) -> dict[str, np.ndarray]:
    """Returns a ranking [N, side, side] for each of ORDERS from maps [N, h, w].

    'random_cells' shuffles the cells of the map, so it deletes patches of the same size; 'random_pixels' deletes single
    pixels.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(maps.reshape(len(maps), -1), axis=1).reshape(maps.shape)
    large, other = (np.stack([enlarge(each, side) for each in group]) for group in (maps, shuffled))
    return dict(zip(ORDERS, (large, other, rng.random(large.shape), -large), strict=True))


def drops(score: Score, pictures: np.ndarray, filling: np.ndarray, ranks: np.ndarray, share: float) -> np.ndarray:
    """Returns the drop in score [N] when a fraction of the pixels is deleted; score: uint8 [N, S, S, 3] -> [N]."""
    return score(pictures) - score(replace(pictures, filling, ranks, share))


def mass_inside(large: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the fraction [N] of each map's positive mass inside its mask, and the masks' area fraction [N].

    large: maps [N, S, S]; masks: bool [N, S, S].
    """
    positive = np.maximum(large, 0)
    total = positive.sum(axis=(1, 2))
    inside = (positive * masks).sum(axis=(1, 2)) / np.where(total > 0, total, 1)
    return inside, masks.mean(axis=(1, 2))


def mean_interval(values: np.ndarray, n: int = RESAMPLES, seed: int = 0) -> Interval:
    """Returns the mean of values [N] with its bootstrap percentile interval over images; of differences, a paired interval."""
    values = np.asarray(values, np.float64)
    means = np.concatenate([values[indices].mean(axis=1) for indices in resample_indices(len(values), n, seed)])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def deletion_test(
    model: Model,
    *,
    images: int = 128,
    stages: Sequence[int | None] = (2, 3, 4),
    shares: Sequence[float] = (0.2,),
    seed: int = 0,
) -> dict[str, Any]:
    """Runs the deletion test and measures map mass inside objects, on scenes of split 'val' at the model's input size.

    stages: map stages, as in `Explainer`; (None,) for a head on the blocks of a vision tower. shares: fractions of pixels
    to delete. Returns a JSON-ready dict: 'images', 'pcc' (of scores with the known complexity), and 'stages' with, per stage:
        deletion: fill -> share -> order -> interval of the drop in score, and highest_minus_<order> with paired intervals;
        mass: 'objects' and 'items' (without confetti) -> intervals of inside, area and their difference.
    """
    side = model.scorer.preprocess.image_size
    source = Scenes("val", images, image_size=side)
    scenes = [source.scene(i) for i in range(images)]
    pictures = np.stack([draw_scene(scene, side) for scene in scenes])
    score = model.scorer.forward
    filled = {kind: fills(scenes, pictures, kind) for kind in FILLS}
    masks = {
        "objects": np.stack([object_mask(scene, side) for scene in scenes]),
        "items": np.stack([object_mask(scene, side, confetti=False) for scene in scenes]),
    }
    scores = score(pictures)
    known = np.array([scene.complexity for scene in scenes])
    record: dict[str, Any] = {
        "images": images,
        "pixels": side,
        "pcc": float(np.corrcoef(scores, known)[0, 1]),
        "mean_score": float(scores.mean()),
        "mean_score_filled": {kind: float(score(filling).mean()) for kind, filling in filled.items()},
        "stages": {},
    }
    for stage in stages:
        _, maps = Explainer(model, stage).maps(pictures)
        ranks = rankings(maps, side, seed)
        record["stages"][str(stage)] = {
            "deletion": {
                kind: {f"{share:g}": _compared(score, pictures, filling, ranks, share) for share in shares}
                for kind, filling in filled.items()
            },
            "mass": {name: _mass(ranks["highest"], mask) for name, mask in masks.items()},
        }
    return record


def _compared(score: Score, pictures: np.ndarray, filling: np.ndarray, ranks: dict, share: float) -> dict[str, Any]:
    fallen = {order: drops(score, pictures, filling, each, share) for order, each in ranks.items()}
    found: dict[str, Any] = {order: dataclasses.asdict(mean_interval(values)) for order, values in fallen.items()}
    for order in ORDERS[1:]:
        found[f"highest_minus_{order}"] = dataclasses.asdict(mean_interval(fallen["highest"] - fallen[order]))
    found["highest_falls_more_than_random_cells"] = float(np.mean(fallen["highest"] > fallen["random_cells"]))
    return found


def _mass(large: np.ndarray, masks: np.ndarray) -> dict[str, Any]:
    inside, area = mass_inside(large, masks)
    pairs = {"inside": inside, "area": area, "inside_minus_area": inside - area}
    return {name: dataclasses.asdict(mean_interval(values)) for name, values in pairs.items()}

"""Classical measures of image complexity, a few lines each: what a learnt one must beat to be worth its cost.

All see the picture squashed to SIZE x SIZE pixels; edges and gradients are those of its luma (ITU-R BT.601), by Sobel's
operator. Their scale is their own: a line, fitted on calibration images, makes a prediction of them. Size and edge threshold
are those at which they do best on scenes: at 64 pixels noise is averaged out (all together PCC 0.82, at 128 pixels 0.73).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from icar_jax.data.images import Preprocess
from icar_jax.errors import DataError

SIZE = 64  # pixels
PREPROCESS = Preprocess(SIZE, "squash", "bicubic")
QUALITY = 75  # of the JPEG
EDGE = 0.05  # gradient above which a pixel lies on an edge; a step from black to white has 1
BINS = 33  # of each component of the gradient over [-1, 1]; odd, so that the middle one is around zero


def jpeg_bytes(image: np.ndarray) -> float:
    """Bytes per pixel of the picture as a JPEG of quality 75 (4:2:0), header included; uint8 [H, W, 3]."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "JPEG", quality=QUALITY)
    return stream.tell() / (image.shape[0] * image.shape[1])


def edge_density(image: np.ndarray) -> float:
    """Share of the pixels whose gradient is above 0.05, in [0, 1]; uint8 [H, W, 3]."""
    return float(np.mean(np.hypot(*_gradient(image)) > EDGE))


def gradient_entropy(image: np.ndarray) -> float:
    """Entropy of the gradient vectors, magnitude and orientation at once, in bits; uint8 [H, W, 3].

    Of the joint histogram of both components in 33 x 33 bins ("delentropy", Larkin 2016, without its factor 1/2).
    """
    bins = [np.minimum((g + 1) / 2 * BINS, BINS - 1).astype(int) for g in _gradient(image)]
    share = np.bincount((bins[0] * BINS + bins[1]).ravel()) / bins[0].size
    share = share[share > 0]
    return float(abs(share @ np.log2(share)))  # abs: the entropy of one full bin is 0, not -0


def _gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H, W, 3] -> Sobel's two components float64 [H - 2, W - 2], in [-1, 1]."""
    y = image @ np.array([0.299, 0.587, 0.114]) / 255
    down, across = y[:-2] + 2 * y[1:-1] + y[2:], y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]
    return (down[:, 2:] - down[:, :-2]) / 4, (across[2:] - across[:-2]) / 4


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "jpeg_bytes": jpeg_bytes,
    "edge_density": edge_density,
    "gradient_entropy": gradient_entropy,
}
COMBINED = "all_classical"  # one linear fit of all of them


def measure(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3] -> float64 [N, 3], the measures in the order of MEASURES."""
    return np.array([[function(image) for function in MEASURES.values()] for image in images]).reshape(-1, len(MEASURES))


@dataclass(frozen=True)
class Fit:
    """A linear prediction of complexity from `columns` of the measures; least squares."""

    columns: tuple[int, ...]
    weights: np.ndarray  # of the columns, and the constant

    def __call__(self, measures: np.ndarray) -> np.ndarray:
        """[N, 3] measures -> complexity [N], cut to [0, 1] as ratings are."""
        return np.clip(measures[:, self.columns] @ self.weights[:-1] + self.weights[-1], 0.0, 1.0)


def fit(measures: np.ndarray, complexity: np.ndarray) -> dict[str, Fit]:
    """Fits of each measure alone and of all together: measures [N, 3], known complexity [N].

    Raises DataError where there are fewer images than weights.
    """
    if len(measures) <= measures.shape[1]:
        raise DataError(f"fitting the classical measures needs more than {measures.shape[1]} images, found {len(measures)}")
    columns = {name: (i,) for i, name in enumerate(MEASURES)} | {COMBINED: tuple(range(len(MEASURES)))}
    fits = {}
    for name, chosen in columns.items():
        design = np.column_stack([measures[:, chosen], np.ones(len(measures))])
        fits[name] = Fit(chosen, np.linalg.lstsq(design, complexity, rcond=None)[0])
    return fits

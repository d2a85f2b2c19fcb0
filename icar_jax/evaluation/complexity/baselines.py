"""Classical measures of image complexity, the baselines for learned complexity models.

All use the image squashed to SIZE x SIZE pixels; edges and gradients are Sobel gradients of its luma (ITU-R BT.601). Each
measure has its own scale; a linear fit on calibration images turns it into a prediction. Size and edge threshold are the best
ones for scenes: 64 pixels average out noise (PCC of the combined fit 0.82, at 128 pixels 0.73).
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
QUALITY = 75  # JPEG quality
EDGE = 0.05  # gradient magnitude above which a pixel is an edge; a step from black to white has 1
BINS = 33  # histogram bins per gradient component over [-1, 1]; odd, so that the middle bin is centred on zero


def jpeg_bytes(image: np.ndarray) -> float:
    """Bytes per pixel of uint8 [H, W, 3] encoded as a JPEG of quality 75 (4:2:0), header included."""
    return encoded_bytes(Image.fromarray(image), "JPEG", quality=QUALITY)


def encoded_bytes(picture: Image.Image, format: str, **options: int) -> float:
    """Bytes per pixel of a picture saved in a format of Pillow."""
    stream = io.BytesIO()
    picture.save(stream, format, **options)
    return stream.tell() / (picture.width * picture.height)


def edge_density(image: np.ndarray) -> float:
    """Fraction of pixels of uint8 [H, W, 3] whose gradient magnitude exceeds 0.05, in [0, 1]."""
    return float(np.mean(np.hypot(*_gradient(image)) > EDGE))


def gradient_entropy(image: np.ndarray) -> float:
    """Entropy in bits of the gradient vectors of uint8 [H, W, 3], from the joint histogram of both components.

    Uses 33 x 33 bins ("delentropy", Larkin 2016, without its factor 1/2).
    """
    bins = [np.minimum((g + 1) / 2 * BINS, BINS - 1).astype(int) for g in _gradient(image)]
    share = np.bincount((bins[0] * BINS + bins[1]).ravel()) / bins[0].size
    share = share[share > 0]
    return float(abs(share @ np.log2(share)))  # abs: the entropy of one full bin is 0, not -0


def _gradient(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [H, W, 3] -> the two Sobel components, float64 [H - 2, W - 2], in [-1, 1]."""
    y = image @ np.array([0.299, 0.587, 0.114]) / 255
    down, across = y[:-2] + 2 * y[1:-1] + y[2:], y[:, :-2] + 2 * y[:, 1:-1] + y[:, 2:]
    return (down[:, 2:] - down[:, :-2]) / 4, (across[2:] - across[:-2]) / 4


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "jpeg_bytes": jpeg_bytes,
    "edge_density": edge_density,
    "gradient_entropy": gradient_entropy,
}
COMBINED = "all_classical"  # one linear fit of all measures


def classical_measures(images: np.ndarray) -> np.ndarray:
    """Computes all measures: uint8 [N, H, W, 3] -> float64 [N, 3], in the order of MEASURES."""
    return np.array([[function(image) for function in MEASURES.values()] for image in images]).reshape(-1, len(MEASURES))


@dataclass(frozen=True)
class Fit:
    """Linear least-squares prediction of complexity from `columns` of the measures."""

    columns: tuple[int, ...]
    weights: np.ndarray  # one per column, then the constant

    def __call__(self, measures: np.ndarray) -> np.ndarray:
        """Predicts complexity [N], clipped to [0, 1], from measures [N, 3]."""
        return np.clip(measures[:, self.columns] @ self.weights[:-1] + self.weights[-1], 0.0, 1.0)


def fit_baselines(measures: np.ndarray, complexity: np.ndarray) -> dict[str, Fit]:
    """Fits each measure alone, and all together, to known complexity [N]; measures: [N, 3].

    Raises DataError if there are too few images.
    """
    if len(measures) <= measures.shape[1]:
        raise DataError(f"fitting the classical measures needs more than {measures.shape[1]} images, found {len(measures)}")
    columns = {name: (i,) for i, name in enumerate(MEASURES)} | {COMBINED: tuple(range(len(MEASURES)))}
    fits = {}
    for name, chosen in columns.items():
        design = np.column_stack([measures[:, chosen], np.ones(len(measures))])
        fits[name] = Fit(chosen, np.linalg.lstsq(design, complexity, rcond=None)[0])
    return fits

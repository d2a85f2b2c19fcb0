"""Published classical measures of visual complexity, computed at the size at which people judged the images.

Edge density and compression are those of `baselines`, at SIZE pixels. Number of regions after Comaniciu and Meer 2002, feature
congestion and subband entropy after Rosenholtz et al. 2007, are reduced to a few lines: regions are connected areas of equal
quantised colour, congestion is that of colour and contrast without orientation, and subbands are those of a Laplacian pyramid.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage, sparse

from icar_jax.data.images import Preprocess
from icar_jax.evaluation.complexity import baselines

SIZE = 224  # pixels
PREPROCESS = Preprocess(SIZE, "squash", "bicubic")
_LEVELS = 6  # of a colour channel, for regions
_SMALLEST = 20  # pixels of a region that counts
_SCALES = 3  # of the pyramid for feature congestion
_BINS = 64  # of a histogram of a subband


def regions(image: np.ndarray) -> float:
    """Root of the number of regions of uint8 [H, W, 3]: connected areas of equal colour after smoothing and quantisation."""
    smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.MedianFilter(5)))
    colours = np.minimum(smooth.astype(int) * _LEVELS // 255, _LEVELS - 1) @ np.array([_LEVELS**2, _LEVELS, 1])
    pixel = np.arange(colours.size).reshape(colours.shape)
    down, across = colours[1:] == colours[:-1], colours[:, 1:] == colours[:, :-1]
    first = np.concatenate([pixel[:-1][down], pixel[:, :-1][across]])
    second = np.concatenate([pixel[1:][down], pixel[:, 1:][across]])
    equal = sparse.coo_matrix((np.ones(len(first)), (first, second)), shape=(pixel.size, pixel.size))
    _, region = sparse.csgraph.connected_components(equal, directed=False)
    return float(np.sqrt(np.count_nonzero(np.bincount(region) >= _SMALLEST)))


def feature_congestion(image: np.ndarray) -> float:
    """Mean local spread of colour and of contrast of uint8 [H, W, 3], over three scales (Rosenholtz et al. 2007, reduced).

    The spread of colour at a position is the sixth root of the determinant of the covariance of its neighbourhood's colours.
    """
    picture, found = _opponent(image), []
    for _ in range(_SCALES):
        mean = _blurred(picture, 3.5)
        second = _blurred(picture[..., :, None] * picture[..., None, :], 3.5)
        covariance = second - mean[..., :, None] * mean[..., None, :] + 1e-5 * np.eye(3)
        colour = np.maximum(np.linalg.det(covariance), 0) ** (1 / 6)
        contrast = np.abs(picture[..., 0] - _blurred(picture[..., :1], 1.0)[..., 0])
        spread = np.sqrt(np.maximum(_blurred(contrast[..., None] ** 2, 3.5) - _blurred(contrast[..., None], 3.5) ** 2, 0))
        found.append(float(colour.mean() + spread.mean()))
        picture = _blurred(picture, 1.0)[::2, ::2]
    return float(np.mean(found))


def subband_entropy(image: np.ndarray) -> float:
    """Entropy in bits of the bands of a Laplacian pyramid of uint8 [H, W, 3]; colour counts a tenth, as in Rosenholtz 2007."""
    picture, bands = _opponent(image), []
    for _ in range(_SCALES):
        low = _blurred(picture, 1.0)
        bands.append(picture - low)
        picture = low[::2, ::2]
    weights = np.array([1.0, 0.1, 0.1])
    entropy = np.array([[_entropy(band[..., c]) for c in range(3)] for band in bands])
    return float(entropy.mean(axis=0) @ weights / weights.sum())


def _opponent(image: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] -> luma, red - green, blue - yellow, float64 [H, W, 3] of order 1."""
    rgb = image / 255
    return np.stack([rgb @ [0.299, 0.587, 0.114], rgb[..., 0] - rgb[..., 1], rgb[..., 2] - rgb[..., :2].mean(-1)], -1)


def _blurred(values: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur over the first two axes of [H, W, ...]."""
    for axis in (0, 1):
        values = ndimage.gaussian_filter1d(values, sigma, axis=axis, truncate=3.0, mode="reflect")
    return values


def _entropy(values: np.ndarray) -> float:
    share = np.histogram(values, _BINS, (-0.5, 0.5))[0] / values.size
    share = share[share > 0]
    return float(abs(share @ np.log2(share)))


def png_bytes(image: np.ndarray) -> float:
    """Bytes per pixel of uint8 [H, W, 3] encoded as PNG, header included."""
    return baselines.encoded_bytes(Image.fromarray(image), "PNG")


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "edge_density": baselines.edge_density,
    "jpeg_bytes": baselines.jpeg_bytes,
    "png_bytes": png_bytes,
    "regions": regions,
    "feature_congestion": feature_congestion,
    "subband_entropy": subband_entropy,
}


def measured(images: np.ndarray) -> np.ndarray:
    """Computes all measures: uint8 [N, H, W, 3] -> float64 [N, 6], in the order of MEASURES."""
    return np.array([[function(image) for function in MEASURES.values()] for image in images]).reshape(-1, len(MEASURES))

"""Colour-only retrieval baseline: a linear map from colour histograms to caption words.

If this baseline solves a data set, the data set says little about a model. Pure numpy, no training loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from icar_jax.errors import DataError, require_list
from icar_jax.evaluation.metrics.retrieval import DIRECTIONS, RECALL_AT, ranks, recall

_BINS = 4
_RIDGE = 1e-4  # times the mean squared feature


def colour_histogram_baseline(
    train_images: Iterable[np.ndarray],
    train_captions: Sequence[Sequence[str]],
    test_images: Iterable[np.ndarray],
    test_captions: Sequence[Sequence[str]],
) -> dict[str, dict[str, float]]:
    """Fits ridge regression from colour histograms to bags of words and returns cosine-retrieval recall on the test images.

    Image features are the square root of the joint 4 x 4 x 4 RGB histogram. Caption features are unit-norm tf-idf vectors
    over the training words, centred on the training mean. The target of an image is the mean over its captions.

    Args:
        train_images, test_images: uint8 [H, W, 3] arrays or RGB PIL images; read once, in order.
        train_captions, test_captions: the captions of each image, at least one per image.

    Returns:
        'text_to_image' and 'image_to_text', each with 'r1', 'r5', 'r10' in percent of the queries.

    Raises:
        ValueError: no images, different numbers of images and caption lists, an image without captions, or an
            image that is not uint8 [H, W, 3]. TypeError: captions of an image that are one text.
    """
    features = _histograms("train", train_images, train_captions)
    gallery = _histograms("test", test_images, test_captions)
    words, weights = _vocabulary(train_captions)
    targets = np.stack([_bags(captions, words, weights).mean(0) for captions in train_captions])
    mean = targets.mean(0)
    gram = features.T @ features
    gram += _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    predicted = gallery @ np.linalg.solve(gram, features.T @ (targets - mean))
    texts = np.concatenate([_bags(captions, words, weights) for captions in test_captions]) - mean
    owner = np.repeat(np.arange(len(test_captions)), [len(c) for c in test_captions])
    result = ranks(_unit(predicted), _unit(texts), owner)
    recalls = {k: recall(result, k) for k in RECALL_AT}
    return {name: {f"r{k}": recalls[k][name] for k in RECALL_AT} for name in DIRECTIONS}


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def _histograms(name: str, images: Iterable[np.ndarray], captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Returns features [N, 65]: the square root of each colour cell's share, and a constant one."""
    rows = []
    for k, image in enumerate(images):
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(
                f"{name} image {k}: expected uint8 [H, W, 3], found {pixels.dtype} {list(pixels.shape)}; "
                "convert it to RGB first"
            )
        cells = pixels.reshape(-1, 3).astype(np.int64) * _BINS // 256
        counts = np.bincount(cells @ np.array([_BINS * _BINS, _BINS, 1]), minlength=_BINS**3)
        rows.append(np.append(np.sqrt(counts / len(cells)), 1.0))
    if not rows:
        raise DataError(f"the colour baseline needs {name} images, found none")
    if len(rows) != len(captions):
        raise ValueError(f"{name}: {len(rows)} images but captions for {len(captions)}; pass one tuple per image")
    for k, texts in enumerate(captions):
        require_list(f"{name}_captions[{k}]", texts)
    bare = [k for k, texts in enumerate(captions) if not len(texts)]
    if bare:
        raise DataError(f"{name}: {len(bare)} images have no caption (first: image {bare[0]}); leave them out")
    return np.stack(rows)


def _words(caption: str) -> list[str]:
    return re.findall(r"[^\W_]+", caption.lower())


def _vocabulary(captions: Sequence[Sequence[str]]) -> tuple[dict[str, int], np.ndarray]:
    """Returns each training word's index, and the idf weights log((1 + captions) / (1 + captions with the word))."""
    documents = [set(_words(text)) for texts in captions for text in texts]
    words = {word: k for k, word in enumerate(sorted(set().union(*documents)))}
    if not words:
        raise DataError("the colour baseline found no word in the training captions; expected ordinary text")
    counts = np.zeros(len(words))
    for document in documents:
        counts[[words[word] for word in document]] += 1
    return words, np.log((1 + len(documents)) / (1 + counts))


def _bags(captions: Sequence[str], words: dict[str, int], weights: np.ndarray) -> np.ndarray:
    """Returns unit-norm tf-idf vectors [captions, words]; words not seen in training are ignored."""
    bags = np.zeros((len(captions), len(words)))
    for row, text in enumerate(captions):
        for word in _words(text):
            if word in words:
                bags[row, words[word]] += weights[words[word]]
    return _unit(bags)

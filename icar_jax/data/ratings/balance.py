"""Distribution of the training ratings, and advice for imbalanced ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10
_MOST = 2.0  # ratio of the larger class to the smaller one above which advice is given


@dataclass(frozen=True)
class Balance:
    """Counts of training images per class or score bin.

    Attributes:
        head: 'classification': counts of (simple, complex); 'regression': counts in 10 bins of equal width over [0, 1].
        counts: images in each class or bin, among the sampled images.
        images: images in the training split; may exceed the sum of counts, if only some were sampled.
    """

    head: str
    counts: tuple[int, ...]
    images: int

    @property
    def classes(self) -> tuple[int, int]:
        """Counts of (simple, complex); for scores, of the lower and upper half of the scale."""
        half = len(self.counts) // 2
        return sum(self.counts[:half]), sum(self.counts[half:])

    @property
    def larger_share(self) -> float:
        """Share of the larger class, 0.5 to 1."""
        return max(self.classes) / sum(self.classes)

    @property
    def skewed(self) -> bool:
        """Whether one class has more than twice as many images as the other."""
        return max(self.classes) > _MOST * min(self.classes)

    def lines(self, class_weights: str) -> list[str]:
        """Returns sentences with the counts, the larger share and, above 2:1, advice."""
        looked, (low, high) = sum(self.counts), self.classes
        of = f"{looked} of {self.images} training images" if looked < self.images else f"{looked} training images"
        if self.head == "classification":
            found = f"{of}: {low} simple, {high} complex; the larger class has {self.larger_share:.0%}"
            advice = "set config.complexity.class_weights='balanced', or the model will favour the larger class"
            done = "config.complexity.class_weights='balanced' weights both classes equally"
        else:
            bars = " ".join(map(str, self.counts))
            found = f"{of}, scores in tenths from 0 to 1: {bars}; the larger half of the scale has {self.larger_share:.0%}"
            advice = done = "expect larger errors in the other half; add images from it, and compare SRCC with PCC"
        if not self.skewed:
            return [found]
        ratio = f"{max(low, high) / min(low, high):.1f}:1" if min(low, high) else "all on one side"
        return [found, f"Imbalance {ratio}: {done if class_weights == 'balanced' else advice}."]

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-ready dict."""
        values = {"head": self.head, "counts": list(self.counts), "images": self.images}
        return {**values, "looked_at": sum(self.counts), "larger_share": round(self.larger_share, 4)}


def balance(scores: np.ndarray, head: str, threshold: float, images: int) -> Balance:
    """Counts scores float [N] in [0, 1] per class or bin; class 'complex' is score > threshold; 1 is in the last bin."""
    if head == "classification":
        high = int(np.count_nonzero(np.asarray(scores) > np.float32(threshold)))
        return Balance(head, (len(scores) - high, high), images)
    bins = np.minimum((np.asarray(scores, np.float64) * BINS).astype(int), BINS - 1)
    return Balance(head, tuple(np.bincount(bins, minlength=BINS).tolist()), images)

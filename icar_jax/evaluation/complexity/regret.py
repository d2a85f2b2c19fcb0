"""Regret of early exits on a held-out source, and evaluation of complexity models trained on regret.

Regret measures how much worse an image's embedding is at an early exit than at full depth (`models.exit_regret`). Scores are
compared with the ranks of the regrets, scaled to [0, 1]. Training uses the same ranks within a batch; here they are computed
over the whole source and all captions. For scenes, the true complexity is compared with the same ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from icar_jax import checkpoint
from icar_jax.architectures import routed_clip
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.records import Record, Source
from icar_jax.evaluation.metrics import ratings
from icar_jax.evaluation.records.complexity import RegretSummary
from icar_jax.evaluation.routing.gallery import embed_source, full_scale
from icar_jax.inference.loading import load
from icar_jax.inference.model import Model

KNOWN = "known_complexity"  # run that predicts regret from the source's known complexity
_ROWS = 1024


def regrets(
    exit: np.ndarray, full: np.ndarray, texts: np.ndarray, caption_image: np.ndarray, scale: float, kind: str = "loss"
) -> np.ndarray:
    """Returns float64 [N]: each image's regret among all N images and M captions, averaged over its captions.

    exit, full: [N, D]; texts: [M, D], unit norm; caption_image: [M] image of each caption, at least one per image. An image's
    other captions are not negatives of its caption. scale: logit scale of full depth. kind: one of
    `models.exit_regret.KINDS`, where the definitions are; 'cosine' uses no captions.
    """
    if kind == "cosine":
        return 1 - np.einsum("nd,nd->n", exit, full, dtype=np.float64)
    owner = np.asarray(caption_image)
    at_exit, at_full = (scale * np.einsum("md,md->m", z[owner], texts, dtype=np.float64) for z in (exit, full))
    others_exit, others_full = (_log_sums(z, texts, scale, lambda rows: rows[:, None] != owner[None, :]) for z in (exit, full))
    images = _log_sums(texts, full, scale, lambda rows: owner[rows][:, None] != np.arange(len(full))[None, :])
    early = np.logaddexp(0, np.stack([others_exit[owner], images]) - at_exit)
    late = np.logaddexp(0, np.stack([others_full[owner], images]) - at_full)
    each = np.mean((early - late) * (np.exp(-late) if kind == "kl" else 1.0), axis=0)
    return np.bincount(owner, weights=each, minlength=len(full)) / np.bincount(owner, minlength=len(full))


def _log_sums(a: np.ndarray, b: np.ndarray, scale: float, counted) -> np.ndarray:
    """Returns [len(a)]: log of the sum of exp(scale a b) over the counted b; -inf if none is counted."""
    found = np.empty(len(a))
    for start in range(0, len(a), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(a)))
        scores = np.where(counted(rows), scale * (a[rows].astype(np.float32) @ b.T.astype(np.float32)), -np.inf)
        top = scores.max(axis=1, initial=-1e30)
        with np.errstate(divide="ignore"):
            found[rows] = top + np.log(np.exp(scores - top[:, None], dtype=np.float64).sum(axis=1))
    return found


def unit_ranks(values: np.ndarray) -> np.ndarray:
    """Converts values [N] to float32 ranks from 0 (lowest) to 1 (highest); ties take their mean rank."""
    from scipy.stats import rankdata

    return ((rankdata(values) - 1) / max(len(values) - 1, 1)).astype(np.float32)


class RegretSource(Source):
    """A source whose records have `targets` {index: float} as their complexity."""

    def __init__(self, source: Source, targets: Mapping[int, float]):
        self.source, self.name, self.targets = source, source.name, dict(targets)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Record:
        return dataclasses.replace(self.source[i], complexity=self.targets.get(i, float("nan")))


@dataclasses.dataclass(frozen=True)
class Regrets:
    """Regrets `values` float64 [n] of a source's readable images, and their indices [n]."""

    source: Source
    index: np.ndarray
    values: np.ndarray

    def as_source(self) -> RegretSource:
        """Returns the source with the ranks of the regrets as the records' complexity."""
        return RegretSource(self.source, dict(zip(self.index.tolist(), unit_ranks(self.values).tolist(), strict=True)))

    def known_complexity(self) -> np.ndarray:
        """Returns float32 [n]: the source's own complexity, nan if unknown."""
        return np.array([self.source[i].complexity for i in self.index.tolist()], np.float32)


def load_routed_clip(config: ExperimentConfig, scorer: Mapping[str, Any]) -> Model:
    """Loads the CLIP whose regret the complexity model with this description was trained on.

    Raises ConfigError if the model was not trained on regret, or on the regret of a CLIP other than config.complexity.clip.
    """
    folder, spec = routed_clip(config.complexity), scorer.get("regret")
    if spec is None:
        raise ConfigError(
            "config.complexity.target='regret', but the model was trained on ratings; evaluate it with "
            "config.complexity.target=rating"
        )
    found = checkpoint.describe(folder).get("hashes", {}).get(checkpoint.WEIGHTS)
    if found != spec["sha256"]:
        raise ConfigError(
            f"config.complexity.clip={config.complexity.clip} is not the CLIP the regret model was trained with: pass "
            f"{spec['clip']}, whose weights have SHA-256 {spec['sha256']}"
        )
    return load(folder, batch_size=config.eval.batch_size, dtype=config.eval.dtype)


def measure_regrets(config: ExperimentConfig, clip: Model, spec: Mapping[str, Any], source: Source) -> Regrets:
    """Embeds a source and computes the regrets of its images. spec: the regret's 'kind' and 'exit'."""
    early, full = int(spec["exit"]), clip.exits[-1]
    gallery = embed_source(clip, source, configured.loading(config.data), exits=(early, full))
    scale = full_scale(clip)
    values = regrets(
        gallery.by_exit[early], gallery.by_exit[full], gallery.texts, gallery.caption_image, scale, spec["kind"]
    )  # fmt: skip
    return Regrets(source, gallery.index, values)


def fit_line(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Fits a least-squares line to (x, y) [k] and returns its values at `at` [n], clipped to [0, 1]."""
    slope, constant = np.polyfit(x.astype(np.float64), y.astype(np.float64), 1)
    return np.clip(slope * at + constant, 0.0, 1.0)


def summarise_regrets(
    found: Regrets, spec: Mapping[str, Any], scores: np.ndarray, known: np.ndarray | None, n: int
) -> RegretSummary:
    """Returns regret statistics, and Pearson's correlation with the raw regrets.

    spec: the 'regret' of the model's description; scores: [n] of the model; known: [n] known complexity, or None; n: bootstrap
    resamples.
    """
    values = found.values
    correlated = {"model": scores} | ({KNOWN: known} if known is not None else {})
    return RegretSummary(
        **spec,
        mean=float(values.mean()),
        deviation=float(values.std()),
        better_early=float(np.mean(values < 0)),
        pcc={name: _pcc(predicted, values, n) for name, predicted in correlated.items()},
    )


def _pcc(predicted: np.ndarray, values: np.ndarray, n: int) -> ratings.Estimate:
    try:
        return ratings.Estimate(*dataclasses.astuple(ratings.interval("pcc", predicted, values, n=n)))
    except ratings.MetricError:  # too few images, or all values equal
        return ratings.Estimate(None)

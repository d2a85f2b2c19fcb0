"""What the images of a held-out source lose by leaving a CLIP early, and how a complexity model that learnt it is judged.

Its scores are compared with the ranks of the regrets, scaled to [0, 1], which is what it was trained to within a batch: here
the batch is the whole source, and every caption counts. Of scenes the true complexity is compared with the same ranks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from icar_jax import checkpoint
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.records import Record, Source
from icar_jax.evaluation.metrics import ratings as m
from icar_jax.evaluation.routing.gallery import embed, full_scale
from icar_jax.inference.loading import load
from icar_jax.inference.model import Model
from icar_jax.models.variants import routed_clip

KNOWN = "known_complexity"  # the run of what is known of the images, as a prediction of their regret
_ROWS = 1024


def regrets(
    exit: np.ndarray, full: np.ndarray, texts: np.ndarray, caption_image: np.ndarray, scale: float, kind: str = "loss"
) -> np.ndarray:
    """Regret [N] float64 of each image, as of models/regret.py, among all N images and M captions; mean over its captions.

    exit, full: [N, D]; texts: [M, D], unit norm; caption_image: [M] image of each caption, every image having one or more.
    An image's other captions are no rivals of its caption. `scale` is that of full depth; kind, one of models.regret.KINDS:
    'cosine' reads no captions.
    """
    if kind == "cosine":
        return 1 - np.einsum("nd,nd->n", exit, full, dtype=np.float64)
    owner = np.asarray(caption_image)
    at_exit, at_full = (scale * np.einsum("md,md->m", z[owner], texts, dtype=np.float64) for z in (exit, full))
    rivals_exit, rivals_full = (_log_sums(z, texts, scale, lambda rows: rows[:, None] != owner[None, :]) for z in (exit, full))
    images = _log_sums(texts, full, scale, lambda rows: owner[rows][:, None] != np.arange(len(full))[None, :])
    early = np.logaddexp(0, np.stack([rivals_exit[owner], images]) - at_exit)
    late = np.logaddexp(0, np.stack([rivals_full[owner], images]) - at_full)
    each = np.mean((early - late) * (np.exp(-late) if kind == "kl" else 1.0), axis=0)
    return np.bincount(owner, weights=each, minlength=len(full)) / np.bincount(owner, minlength=len(full))


def _log_sums(a: np.ndarray, b: np.ndarray, scale: float, counted) -> np.ndarray:
    """log sum over the counted b of exp(scale a b), [len(a)]; -inf where none counts."""
    found = np.empty(len(a))
    for start in range(0, len(a), _ROWS):
        rows = np.arange(start, min(start + _ROWS, len(a)))
        scores = np.where(counted(rows), scale * (a[rows].astype(np.float32) @ b.T.astype(np.float32)), -np.inf)
        top = scores.max(axis=1, initial=-1e30)
        with np.errstate(divide="ignore"):
            found[rows] = top + np.log(np.exp(scores - top[:, None], dtype=np.float64).sum(axis=1))
    return found


def unit_ranks(values: np.ndarray) -> np.ndarray:
    """[N] -> float32 ranks from 0 (least) to 1 (greatest), equal values sharing their mean rank."""
    from scipy.stats import rankdata

    return ((rankdata(values) - 1) / max(len(values) - 1, 1)).astype(np.float32)


class RegretResult:
    """A source whose records carry `targets` {index: float} in place of what is known of their complexity."""

    def __init__(self, source: Source, targets: Mapping[int, float]):
        self.source, self.name, self.targets = source, source.name, dict(targets)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> Record:
        return dataclasses.replace(self.source[i], complexity=self.targets.get(i, float("nan")))


@dataclasses.dataclass(frozen=True)
class Regrets:
    """regrets float64 [n] of the readable images of a source and their indices [n]."""

    source: Source
    index: np.ndarray
    values: np.ndarray

    def judged(self) -> RegretResult:
        """The source with the ranks of the regrets as the records' complexity."""
        return RegretResult(self.source, dict(zip(self.index.tolist(), unit_ranks(self.values).tolist(), strict=True)))

    def known(self) -> np.ndarray:
        """float32 [n]: the complexity that the source knows, nan where it does not."""
        return np.array([self.source[i].complexity for i in self.index.tolist()], np.float32)


def open_clip(config: ExperimentConfig, scorer: Mapping[str, Any]) -> Model:
    """The CLIP whose regret the complexity model of that description learnt.

    Raises ConfigError where the model learnt something else, or the regret of another CLIP than config.complexity.clip.
    """
    folder, told = routed_clip(config.complexity), scorer.get("regret")
    if told is None:
        raise ConfigError(
            "config.complexity.target='regret', but the model learnt ratings; evaluate it with config.complexity.target=rating"
        )
    found = checkpoint.describe(folder).get("hashes", {}).get(checkpoint.WEIGHTS)
    if found != told["sha256"]:
        raise ConfigError(
            f"config.complexity.clip={config.complexity.clip} is not the CLIP whose regret the model learnt ({told['clip']}, "
            f"whose weights have SHA-256 {told['sha256']}); pass that one"
        )
    return load(folder, batch_size=config.eval.batch_size, dtype=config.eval.dtype)


def measure(config: ExperimentConfig, clip: Model, told: Mapping[str, Any], source: Source) -> Regrets:
    """Embeds a source and measures the regrets. `told`: 'kind' and 'exit'."""
    early, full = int(told["exit"]), clip.exits[-1]
    gallery = embed(clip, source, configured.loading(config.data), exits=(early, full))
    scale = full_scale(clip)
    values = regrets(
        gallery.by_exit[early], gallery.by_exit[full], gallery.texts, gallery.caption_image, scale, told["kind"]
    )  # fmt: skip
    return Regrets(source, gallery.index, values)


def line(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The least-squares line through (x, y) [k], at `at` [n], cut to [0, 1] as scores are."""
    slope, constant = np.polyfit(x.astype(np.float64), y.astype(np.float64), 1)
    return np.clip(slope * at + constant, 0.0, 1.0)


def record(found: Regrets, told: Mapping[str, Any], scores: np.ndarray, known: np.ndarray | None, n: int) -> dict[str, Any]:
    """What metrics.json says of the regrets: how large they are, and Pearson's correlation with them as they are.

    scores, known: [n] of the model, and what is known of the images (None where nothing is); n: resamples of an interval.
    """
    values = found.values
    correlated = {"model": scores} | ({KNOWN: known} if known is not None else {})
    return {
        **told,
        "mean": float(values.mean()),
        "deviation": float(values.std()),
        "better_early": float(np.mean(values < 0)),
        "pcc": {name: _interval(predicted, values, n) for name, predicted in correlated.items()},
    }


def _interval(predicted: np.ndarray, values: np.ndarray, n: int) -> dict[str, float | None]:
    try:
        return m.interval("pcc", predicted, values, n=n).as_dict()
    except m.MetricError:  # too few images, or all alike
        return {"value": None, "low": None, "high": None}

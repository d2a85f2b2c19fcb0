"""Thresholds from calibration images, and the bundle that carries them.

Calibration images come from the training split and are never trained on; the evaluated split has no say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from icar_jax import checkpoint
from icar_jax.config import ConfigError
from icar_jax.data.pipeline import BadFiles, eval_batches
from icar_jax.data.records import Source
from icar_jax.inference.model import Model, load_parts
from icar_jax.inference.router import assign


def full_shares(shares: Sequence[float], exits: Sequence[int]) -> tuple[float, ...]:
    """One share for every exit, full depth last; empty `shares` divides equally. Raises ConfigError where they misfit."""
    if not shares:
        return (1 / len(exits),) * len(exits)
    if len(shares) != len(exits) - 1 or min(shares) < 0 or sum(shares) > 1:
        raise ConfigError(
            f"early shares {tuple(shares)} do not fit the exits {tuple(exits)}: give {len(exits) - 1} numbers in [0, 1] "
            "that sum to at most 1, one for each exit before full depth"
        )
    return (*shares, 1 - sum(shares))


def thresholds_for_shares(scores: np.ndarray, shares: Sequence[float]) -> tuple[float, ...]:
    """Thresholds at quantiles: scores [N], shares per exit (full depth last) -> one threshold per exit but the last.

    A threshold lies midway between two neighbouring scores, so that the shares are met exactly up to one image and
    ties. A share of 0 puts its threshold below every score.
    """
    ordered = np.sort(np.asarray(scores, np.float64))
    if not len(ordered) or not np.isfinite(ordered).all():
        raise ValueError(f"thresholds need finite scores of at least one calibration image, found {len(ordered)} scores")
    # Scores lie in [0, 1]: the outer edges hold for every image, not only for those seen here.
    edges = np.concatenate([[-1.0], (ordered[:-1] + ordered[1:]) / 2, [2.0]])
    below = np.rint(np.cumsum(shares)[:-1] * len(ordered)).astype(int)
    return tuple(float(edges[b]) for b in below)


def score_source(
    model: Model, source: Source, title: str, loading: Mapping[str, Any] | None = None
) -> tuple[np.ndarray, BadFiles]:
    """Complexity scores float32 [n] of every readable image of a source, in order, and the unreadable files."""
    scores, bad = [], BadFiles()
    preprocess = {"complexity": model.scorer.preprocess}
    batches = eval_batches(source, preprocess, batch_size=model.batch_size, **(loading or {}))
    with batches:
        for batch in tqdm(batches, total=-(-len(source) // model.batch_size), desc=title, unit="batch"):
            bad.add(batch)
            if len(batch["index"]):
                scores.append(model.scorer.forward.submit(batch["images"]["complexity"]))
    if not scores:
        raise ValueError(f"no image of {source.name} could be read:\n{bad.summary()}")
    return np.concatenate([part.result() for part in scores]), bad


def make_bundle(
    clip: str | Path,
    complexity: str | Path,
    out: str | Path,
    *,
    calibration: Source | None = None,
    shares: Sequence[float] = (),
    thresholds: Sequence[float] | None = None,
    batch_size: int = 64,
    dtype: str = "float32",
    loading: Mapping[str, Any] | None = None,
) -> Path:
    """Joins a CLIP and a complexity checkpoint with thresholds and writes the bundle to `out`.

    Either `thresholds` are given, or they are set on `calibration` so that each exit gets its share of those images. Without
    both, the threshold that a converted classifier brings along serves a CLIP with one early exit. `loading` are keywords of
    `eval_batches`: workers, retries and the like.
    The description records how they were found. Raises CheckpointError or ConfigError where the parts do not fit.
    """
    checkpoint.require_replaceable(out, "bundle")  # known before the calibration images are scored
    clip_model, scorer = load_parts(clip, complexity, batch_size=batch_size, dtype=dtype)
    exits = clip_model.exits
    if len(exits) < 2:
        raise ConfigError(
            f"{clip} has no early exit, so there is nothing to route; train it with config.clip.exits, or convert it again "
            "with `icar convert --exits`"
        )
    stored = scorer.description.get("threshold")
    if thresholds is not None:
        assign(np.zeros(0), exits, thresholds)
        found: dict[str, Any] = {"method": "given"}
    elif calibration is None and stored is not None and len(exits) == 2 and not shares:
        thresholds, found = (stored,), {"method": "stored with the complexity model"}
    else:
        if calibration is None:
            raise ConfigError(
                "a bundle needs thresholds, or calibration images to set them on: pass --thresholds, or as --clip a workdir of "
                "train.py, which names its calibration images"
            )
        wanted = full_shares(shares, exits)
        scores, bad = score_source(scorer, calibration, "calibrate", loading)
        thresholds = thresholds_for_shares(scores, wanted)
        reached = {e: float(np.mean(assign(scores, exits, thresholds) == e)) for e in exits}
        if any(abs(reached[e] - share) > 0.05 for e, share in zip(exits, wanted)):
            logging.warning(
                "Many images have the same complexity score, so the shares %s were not met: reached %s.", wanted, reached
            )
        found = {
            "method": "shares",
            "shares": dict(zip(map(str, exits), wanted)),
            "reached": {str(e): share for e, share in reached.items()},
            "calibration": calibration.name,
            "images": len(scores),
            "unreadable": len(bad.reasons),
        }
    routing = {"exits": list(exits), "thresholds": [float(t) for t in thresholds], "found": found}
    logging.info("Thresholds %s for exits %s.", routing["thresholds"], exits)
    return checkpoint.write_bundle(
        out, {"routing": routing}, checkpoint.find(clip, ("clip",)), checkpoint.find(complexity, ("complexity",))
    )

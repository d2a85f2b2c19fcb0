"""Evaluation while training. What is measured comes from above, as functions; here is when, and what is kept of it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jax.sharding import NamedSharding

from icar_jax import checkpoint
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.parallel import distributed
from icar_jax.training.checkpoints import write_model

BEST = "best"
SCORE = "mean_r5"
RECALL = "_r5"  # names of values that the best model is chosen by end so


@dataclass(frozen=True)
class Trained:
    """What an evaluator is told about a run before it starts.

    `part` = (index, count): of `count` equal parts of a batch sharded by `batch_sharding`, this process provides `index`.
    """

    config: ExperimentConfig
    kind: str
    description: dict[str, Any]
    tokenizer: Tokenizer | None
    batch_sharding: NamedSharding
    batch_shards: int
    part: tuple[int, int]


Evaluate = Callable[[Mapping[str, Any]], dict[str, float]]  # sharded parameters -> values, the same on every process
MakeEvaluator = Callable[[Trained], Evaluate]  # called in one process after the other, so it must not wait for the others


class Evaluation:
    """Runs the evaluators of a run and keeps WORKDIR/best, the model with the highest mean recall at 5."""

    def __init__(self, trained: Trained, workdir: Path, start: int, evaluators: list[Evaluate]):
        self._trained, self._workdir, self._evaluators = trained, workdir, evaluators
        self._keep_best = trained.config.train.keep_best
        self._best = _remembered(workdir / BEST, start) if self._keep_best else -math.inf

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after `step`: as configured, and when it is complete."""
        t = self._trained.config.train
        return t.eval_every > 0 and (step % t.eval_every == 0 or step == t.steps)

    def __call__(self, step: int, params: Mapping[str, Any]) -> dict[str, float]:
        """Evaluates; writes WORKDIR/best where the mean has risen. Called by every process."""
        values: dict[str, float] = {}
        for evaluate in self._evaluators:
            values |= evaluate(params)
        if self._keep_best:
            recalls = [value for name, value in values.items() if name.endswith(RECALL)]
            if not recalls:
                raise ValueError(f"config.train.keep_best needs an evaluator that returns recall ('...{RECALL}'), got {values}")
            if (score := fmean(recalls)) > self._best:
                self._best = score
                t = self._trained
                found = {"steps": step, SCORE: score, **values}
                source = {"trained_with": "icar_jax", "steps": step}
                description = {**t.description, "source": source, "evaluation": found}
                text = t.tokenizer.to_json() if t.tokenizer else None
                write_model(self._workdir / BEST, t.kind, description, params, text)
        return values


def make_evaluation(
    trained: Trained, workdir: Path, start: int, evaluators: tuple[MakeEvaluator, ...]
) -> Evaluation | None:
    """The evaluation that `config.train.eval_every` asks for. Raises ConfigError where no evaluator was given."""
    if not trained.config.train.eval_every:
        return None
    if not evaluators:
        raise ConfigError(
            "config.train.eval_every needs an evaluator: train(..., evaluators=(during_training.Retrieval,)) as in train.py, "
            "or set it to 0"
        )
    # Process 0 first: what it indexes of the evaluation split the others read.
    made = [distributed.main_first("preparing the evaluation", lambda make=make: make(trained)) for make in evaluators]
    return Evaluation(trained, workdir, start, made)


def _remembered(folder: Path, start: int) -> float:
    """The score to beat. A run that starts anew forgets the best model of one that ended before its first checkpoint.

    A continued run may find a best model from beyond its start: those steps come again, with the same score.
    """
    if start == 0:
        with distributed.together(f"removing {folder} of an earlier start"):
            if distributed.is_main() and (folder / checkpoint.DESCRIPTION).is_file():
                shutil.rmtree(folder)
        return -math.inf
    if not (folder / checkpoint.DESCRIPTION).is_file():
        return -math.inf
    try:
        return float(checkpoint.describe(folder)["evaluation"][SCORE])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no score of an earlier evaluation ({error}); move it away") from error

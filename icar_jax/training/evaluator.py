"""Evaluation while training. What is measured comes from above, as functions; here is when, and what is kept of it."""

from __future__ import annotations

import json
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
from icar_jax.training.logs import METRICS
from icar_jax.training.tasks.kinds import kind_of

BEST = "best"


@dataclass(frozen=True)
class Criterion:
    """What makes one evaluation better than another: the mean of the values whose names end in `ending`.

    `name` is what that is called in the description of WORKDIR/best.
    """

    name: str
    ending: str
    higher: bool  # whether more is better

    def score(self, values: Mapping[str, float]) -> float:
        """The mean. Raises ValueError where no name ends so."""
        found = self._found(values)
        if not found:
            raise ValueError(
                "config.train.keep_best and config.train.patience need an evaluator that returns values named "
                f"'...{self.ending}', got {dict(values)}"
            )
        return fmean(found)

    def knows(self, values: Mapping[str, Any]) -> bool:
        """Whether these are the values of an evaluation."""
        return bool(self._found(values))

    def better(self, score: float, best: float | None) -> bool:
        """Whether a score beats the best so far; None is beaten by all."""
        return best is None or (score > best if self.higher else score < best)

    def _found(self, values: Mapping[str, Any]) -> list[float]:
        return [value for name, value in values.items() if name.endswith(self.ending)]


RECALL = Criterion("mean_r5", "_r5", higher=True)
CORRELATION = Criterion("pcc", "eval/pcc", higher=True)
LOSS = Criterion("loss", "eval/loss", higher=False)


def criterion(config: ExperimentConfig) -> Criterion:
    """The metric that chooses the best checkpoint: mean recall at 5, PCC (regression) or validation loss (classification)."""
    return {"recall": RECALL, "pcc": CORRELATION, "loss": LOSS}[kind_of(config).best_by]


@dataclass(frozen=True)
class TrainedModel:
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
MakeEvaluator = Callable[[TrainedModel], Evaluate]  # called in one process after the other, so it must not wait for the others


class Evaluation:
    """Runs the evaluators of a run, keeps WORKDIR/best as the run's `criterion` says, and knows when patience is at its end."""

    def __init__(self, trained: TrainedModel, workdir: Path, start: int, evaluators: list[Evaluate]):
        self._trained, self._workdir, self._evaluators = trained, workdir, evaluators
        self._criterion, self._patience = criterion(trained.config), trained.config.train.patience
        self._keep_best = trained.config.train.keep_best
        on = _measured_on(trained.config)
        self._best = _remembered(workdir / BEST, start, self._criterion, on) if self._keep_best else None
        self._top: float | None = None
        self._stale = 0  # evaluations since the last better one
        for score in _history(workdir / METRICS, start, self._criterion) if self._patience else ():
            self._count(score)

    @property
    def exhausted(self) -> bool:
        """Whether config.train.patience evaluations have passed without a better one."""
        return 0 < self._patience <= self._stale

    def _count(self, score: float) -> None:
        better = self._criterion.better(score, self._top)
        self._top, self._stale = (score, 0) if better else (self._top, self._stale + 1)

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after `step`: as configured, and when it is complete."""
        t = self._trained.config.train
        return t.eval_every > 0 and (step % t.eval_every == 0 or step == t.steps)

    def __call__(self, step: int, params: Mapping[str, Any]) -> dict[str, float]:
        """Evaluates; writes WORKDIR/best where the score is better than any before. Called by every process."""
        values: dict[str, float] = {}
        for evaluate in self._evaluators:
            values |= evaluate(params)
        if self._patience:
            self._count(self._criterion.score(values))
        if self._keep_best:
            score = self._criterion.score(values)
            if self._criterion.better(score, self._best):
                self._best = score
                t = self._trained
                found = {"steps": step, "split": _measured_on(t.config), self._criterion.name: score, **values}
                source = {"trained_with": "icar_jax", "steps": step}
                description = {**t.description, "source": source, "evaluation": found}
                text = t.tokenizer.to_json() if t.tokenizer else None
                write_model(self._workdir / BEST, t.kind, description, params, text)
        return values


def make_evaluation(
    trained: TrainedModel, workdir: Path, start: int, evaluators: tuple[MakeEvaluator, ...]
) -> Evaluation | None:
    """The evaluation that `config.train.eval_every` asks for. Raises ConfigError where no evaluator was given."""
    if not trained.config.train.eval_every:
        return None
    if not evaluators:
        raise ConfigError(
            "config.train.eval_every needs an evaluator: train(..., evaluators=(during_training.evaluator(config),)) as in "
            "train.py, or set it to 0"
        )
    # Process 0 first: what it indexes of the evaluation split the others read.
    made = [distributed.main_first("preparing the evaluation", lambda make=make: make(trained)) for make in evaluators]
    return Evaluation(trained, workdir, start, made)


def _history(file: Path, start: int, chosen_by: Criterion) -> list[float]:
    """The scores of the evaluations up to step `start`, in order, as the metrics of the run tell them."""
    if start == 0 or not file.is_file():
        return []
    scores = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut off when the run was killed
        if line["step"] <= start and chosen_by.knows(line):
            scores.append(chosen_by.score(line))
    return scores


def _measured_on(config: ExperimentConfig) -> list[Any]:
    """What the scores of two evaluations must share to be compared."""
    return [config.train.eval_split or config.eval.split, config.eval.size]


def _remembered(folder: Path, start: int, chosen_by: Criterion, measured_on: list[Any]) -> float | None:
    """The score to beat. A run that starts anew forgets the best model of one that ended before its first checkpoint.

    A continued run may find a best model from beyond its start: those steps come again, with the same score.
    """
    if start == 0:
        with distributed.together(f"removing {folder} of an earlier start"):
            if distributed.is_main() and (folder / checkpoint.DESCRIPTION).is_file():
                shutil.rmtree(folder)
        return None
    if not (folder / checkpoint.DESCRIPTION).is_file():
        return None
    found = checkpoint.describe(folder).get("evaluation", {})
    if (chosen_on := found.get("split", measured_on)) != measured_on:
        raise ConfigError(
            f"{folder} was chosen on split and size {chosen_on}, and the configuration now names {measured_on}: their "
            "scores do not compare; use the config.eval.split and size the run began with, or move the folder away"
        )
    try:
        return float(found[chosen_by.name])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} holds no score of an earlier evaluation ({error}); move it away") from error

"""Schedules evaluations during training and keeps the best checkpoint; the evaluators are passed in."""

from __future__ import annotations

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
from icar_jax.errors import DataError
from icar_jax.files import json_file
from icar_jax.parallel import distributed
from icar_jax.training.checkpoints import write_model
from icar_jax.training.logs import METRICS
from icar_jax.training.tasks.kinds import kind_of

BEST = "best"


@dataclass(frozen=True)
class Criterion:
    """Scores an evaluation by the mean of the values whose names end in `ending`.

    `name` is the key of the score in the description of WORKDIR/best.
    """

    name: str
    ending: str
    higher: bool  # whether a higher score is better

    def score(self, values: Mapping[str, float]) -> float:
        """Returns the mean score. Raises ValueError if no name ends in `ending`."""
        found = self._found(values)
        if not found:
            raise ValueError(
                "config.train.keep_best and config.train.patience need an evaluator that returns values named "
                f"'...{self.ending}', got {dict(values)}"
            )
        return fmean(found)

    def knows(self, values: Mapping[str, Any]) -> bool:
        """Returns whether `values` contain the values this criterion scores."""
        return bool(self._found(values))

    def better(self, score: float, best: float | None) -> bool:
        """Returns whether `score` is better than `best`; any score is better than None."""
        return best is None or (score > best if self.higher else score < best)

    def _found(self, values: Mapping[str, Any]) -> list[float]:
        return [value for name, value in values.items() if name.endswith(self.ending)]


RECALL = Criterion("mean_r5", "_r5", higher=True)
CORRELATION = Criterion("pcc", "eval/pcc", higher=True)
LOSS = Criterion("loss", "eval/loss", higher=False)


def criterion(config: ExperimentConfig) -> Criterion:
    """Returns the criterion for the best checkpoint: mean recall at 5, PCC (regression) or validation loss (classification)."""
    return {"recall": RECALL, "pcc": CORRELATION, "loss": LOSS}[kind_of(config).best_by]


@dataclass(frozen=True)
class TrainedModel:
    """Description of the run, passed to an evaluator when it is built.

    `part` = (index, count): this process provides part `index` of `count` equal parts of a batch sharded by `batch_sharding`.
    """

    config: ExperimentConfig
    kind: str
    description: dict[str, Any]
    tokenizer: Tokenizer | None
    batch_sharding: NamedSharding
    batch_shards: int
    part: tuple[int, int]


Evaluate = Callable[[Mapping[str, Any]], dict[str, float]]  # sharded parameters -> values, the same on every process
MakeEvaluator = Callable[[TrainedModel], Evaluate]  # called on process 0 first, then on the others: no collectives inside


class Evaluation:
    """Runs the evaluators, saves WORKDIR/best by the run's `criterion`, and tracks early stopping (config.train.patience)."""

    def __init__(self, trained: TrainedModel, workdir: Path, start: int, evaluators: list[Evaluate]):
        self._trained, self._workdir, self._evaluators = trained, workdir, evaluators
        self._criterion, self._patience = criterion(trained.config), trained.config.train.patience
        self._keep_best = trained.config.train.keep_best
        on = _measured_on(trained.config)
        self._best = _remembered(workdir / BEST, start, self._criterion, on) if self._keep_best else None
        self._top: float | None = None
        self._stale = 0  # evaluations since the last improvement
        for score in _history(workdir / METRICS, start, self._criterion) if self._patience else ():
            self._count(score)

    @property
    def exhausted(self) -> bool:
        """Whether the last config.train.patience evaluations brought no improvement."""
        return 0 < self._patience <= self._stale

    def _count(self, score: float) -> None:
        better = self._criterion.better(score, self._top)
        self._top, self._stale = (score, 0) if better else (self._top, self._stale + 1)

    def due(self, step: int) -> bool:
        """Returns whether to evaluate after `step`: every config.train.eval_every steps and after the last step."""
        t = self._trained.config.train
        return t.eval_every > 0 and (step % t.eval_every == 0 or step == t.steps)

    def __call__(self, step: int, params: Mapping[str, Any]) -> dict[str, float]:
        """Evaluates sharded `params` and returns {name: value}; writes WORKDIR/best if the score is a new best.

        Every process must call it.
        """
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
    """Returns the evaluation, or None if `config.train.eval_every` is 0. Raises ConfigError if no evaluator was given."""
    if not trained.config.train.eval_every:
        return None
    if not evaluators:
        raise ConfigError(
            "config.train.eval_every needs an evaluator: train(..., evaluators=(during_training.evaluator(config),)) as in "
            "train.py, or set it to 0"
        )
    # Process 0 first: it indexes the evaluation split, and the others read its index.
    made = [distributed.main_first("preparing the evaluation", lambda make=make: make(trained)) for make in evaluators]
    return Evaluation(trained, workdir, start, made)


def _history(file: Path, start: int, chosen_by: Criterion) -> list[float]:
    """Scores of the evaluations up to step `start`, in order, read from the run's metrics.jsonl."""
    if start == 0 or not file.is_file():
        return []
    scores = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            line = json_file.require_object(json_file.parse(text, file), file)
        except DataError:
            continue  # the run was killed while it wrote this line
        if isinstance(step := line.get("step"), int) and step <= start and chosen_by.knows(line):
            scores.append(chosen_by.score(line))
    return scores


def _measured_on(config: ExperimentConfig) -> list[Any]:
    """[split, size] of the evaluation; only scores measured on equal values are comparable."""
    return [config.train.eval_split or config.eval.split, config.eval.size]


def _remembered(folder: Path, start: int, chosen_by: Criterion, measured_on: list[Any]) -> float | None:
    """The best score so far. A run that starts at step 0 deletes the best model of an attempt that saved no checkpoint.

    A resumed run may find a best model from a later step than `start`: it repeats those steps and reaches the same score.
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
            f"{folder} was selected on split and size {chosen_on}, but the configuration now has {measured_on}; their "
            "scores are not comparable. Use the config.eval.split and config.eval.size the run started with, or move the "
            "folder away"
        )
    try:
        return float(found[chosen_by.name])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} has no score from an earlier evaluation ({error}); move it away") from error

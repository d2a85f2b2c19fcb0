"""The training run: one ordered loop for every task, resumed by the same command."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.data import sources
from icar_jax.data.images import Augment
from icar_jax.data.iterator import Batch, BatchIterator
from icar_jax.data.pipeline import BadFiles, train_batches
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import registry
from icar_jax.parallel.mesh import batch_shards, make_mesh
from icar_jax.training.checkpoints import StateStore
from icar_jax.training.logs import RunLog
from icar_jax.training.optimizer import make_optimizer, schedule
from icar_jax.training.step import State, abstract_state, init_state, make_step, put_batch
from icar_jax.training.tasks import Task, make_task

CAPTIONS_FOR_TOKENIZER = 20_000  # images whose captions a tokenizer is trained on


class NonFiniteLoss(RuntimeError):
    """The loss of a step is not finite; the last checkpoint on disk is from before it."""


def train(config: ExperimentConfig, workdir: Path, *, stop_after: int | None = None) -> Path:
    """Trains to `config.train.steps`, or continues a run that was cut off; returns the finished checkpoint's folder.

    Writes into `workdir`: config.json, tokenizer.json, metrics.jsonl, checkpoints/ and, at the end, model/.
    `stop_after` ends this call early after that many steps in all, as an interruption would.
    Raises ConfigError before anything is written; NonFiniteLoss naming the step and the batch's files.
    """
    config = cfg.validate(config)
    workdir = Path(workdir)
    if jax.process_count() > 1:
        raise cfg.ConfigError(f"training runs in one process in this version, found {jax.process_count()}")
    mesh = make_mesh(config.mesh)
    cfg.validate_batch(config.train.batch_size, batch_shards(mesh))
    _check_architecture(config)
    source = sources.train_source(config.data)
    trained_on = sources.fingerprint(source)
    resumed = files.has_checkpoint(workdir)
    if resumed:
        files.require_same_config(workdir, config, files.FREE_ON_RESUME)
        files.require_same_data(workdir, trained_on)
    tokenizer = _tokenizer(config, source, workdir if resumed else None) if config.task == "clip" else None
    task = make_task(config, tokenizer)
    optimizer = make_optimizer(config.optim, config.train.steps)
    step_fn = make_step(task, optimizer, mesh, config.train.seed)
    last = min(config.train.steps, stop_after or config.train.steps)
    _claim_workdir(config, workdir, trained_on, tokenizer)

    with StateStore(workdir, config.train.keep) as store:
        start = store.latest_step or 0
        if start:
            state = store.restore(start, abstract_state(task, optimizer, mesh))
            print(f"Continuing {workdir} after step {start} of {config.train.steps}.")
        else:
            state = init_state(task, optimizer, mesh, config.train.seed)
        log = RunLog(workdir, config.train.steps, start, config.train.tensorboard, f"train {config.task}")
        with _batches(config, task, source, tokenizer, start) as batches, contextlib.closing(log):
            advance = lambda state, batch: step_fn(state, put_batch(batch, task.fields, mesh))
            state = _run(config, advance, state, batches, range(start + 1, last + 1), store, log)
        if last < config.train.steps:
            return workdir
        params = jax.device_get(state["params"])
    description = {**task.description, "source": {"trained_with": "icar_jax", "steps": config.train.steps}}
    return checkpoint.write(
        workdir / "model", task.kind, description, params, tokenizer.to_json() if tokenizer else None
    )


def _batches(config: ExperimentConfig, task: Task, source: Source, tokenizer: Tokenizer | None, start: int) -> BatchIterator:
    """The batches after `start` steps."""
    data, t = config.data, config.train
    return train_batches(
        source,
        task.preprocess,
        tokenizer,
        task.context_length,
        batch_size=t.batch_size,
        seed=t.seed,
        start_position=start * t.batch_size,
        augment=Augment("crop" if data.crop_scale < 1 else "none", scale=(data.crop_scale, 1.0), flip=data.flip),
        num_workers=data.workers,
        num_threads=data.threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        with_complexity=config.task == "complexity",
    )


def _run(
    config: ExperimentConfig,
    advance: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]],
    state: State,
    batches: BatchIterator,
    steps: range,
    store: StateStore,
    log: RunLog,
) -> State:
    """Runs `steps`, saving as configured and after the last; unreadable files and cut captions are reported at the end."""
    bad, cut, monitor = BadFiles(), _CutCaptions(config.clip.context_length), _Monitor(config, log)
    try:
        for step in steps:
            batch = next(batches)
            bad.add(batch)
            cut.add(batch)
            state, metrics = advance(state, batch)
            monitor.push(step, metrics, batch["name"])
            log.advance()
            if step % config.train.checkpoint_every == 0 or step == steps[-1]:
                monitor.flush()  # never save a state whose loss has not been seen
                store.save(step, state)
    finally:
        if bad.reasons:
            logging.warning("%s", bad.summary())
        cut.report()
    return state


class _Monitor:
    """Reads metrics one step late, so that the host prepares the next batch while the device works."""

    def __init__(self, config: ExperimentConfig, log: RunLog):
        self._config, self._log = config, log
        self._pending: deque = deque()
        self._share = schedule(config.optim, config.train.steps)
        self._since: tuple[int, float] | None = None  # the first step includes compilation and is not timed

    def push(self, step: int, metrics: dict[str, jax.Array], names: Any) -> None:
        self._pending.append((step, metrics, names))
        if len(self._pending) > 1:
            self._take()

    def flush(self) -> None:
        while self._pending:
            self._take()

    def _take(self) -> None:
        step, metrics, names = self._pending.popleft()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not all(math.isfinite(value) for value in values.values()):
            raise NonFiniteLoss(
                f"step {step}: not finite: {', '.join(n for n, v in values.items() if not math.isfinite(v))}; "
                f"files of the batch: {', '.join(map(str, names))}. Checkpoints saved before it are intact; "
                "lower config.optim.lr or inspect these files, then run the command again."
            )
        now = time.perf_counter()
        if self._since is None:
            self._since = (step, now)
        if step % self._config.train.log_every == 0 or step == self._config.train.steps:
            before, then = self._since
            if step > before:
                values["pairs_per_s"] = (step - before) * self._config.train.batch_size / max(now - then, 1e-9)
                self._since = (step, now)
            values["lr"] = self._config.optim.lr * float(self._share(step - 1))
            self._log.metrics(step, values)


class _CutCaptions:
    """Counts captions that are longer than the context."""

    def __init__(self, context_length: int):
        self._context_length, self._cut, self._seen = context_length, 0, 0

    def add(self, batch: dict[str, Any]) -> None:
        truncated = batch.get("truncated", ())
        self._cut += int(sum(truncated))
        self._seen += len(truncated)

    def report(self) -> None:
        if self._cut:
            logging.warning(
                "%d of %d captions (%.1f%%) were longer than the context of %s tokens and were cut; "
                "config.clip.context_length sets it.",
                self._cut, self._seen, 100 * self._cut / self._seen, self._context_length or "the variant's",
            )  # fmt: skip


def _check_architecture(config: ExperimentConfig) -> None:
    """An unknown variant, a misplaced exit or a bad size fails before any data is opened."""
    if config.task == "clip":
        registry.clip_arch(config.clip)
    else:
        registry.complexity_arch(config.complexity)


def _claim_workdir(config: ExperimentConfig, workdir: Path, trained_on: dict[str, Any], tokenizer: Tokenizer | None) -> None:
    """Writes what the run is; called once everything that can be checked beforehand has been."""
    try:
        files.save_config(workdir, config)
        files.save_data(workdir, trained_on)
        if tokenizer is not None:
            files.write_text(workdir / checkpoint.TOKENIZER, tokenizer.to_json())
    except OSError as error:
        raise cfg.ConfigError(f"--workdir={workdir} cannot be written: {error}; choose a writable folder") from error


def _tokenizer(config: ExperimentConfig, source: Source, resumed: Path | None) -> Tokenizer:
    """The tokenizer of the run: the one a resumed run began with, the configured file, or one trained on the captions."""
    if resumed is not None:
        return Tokenizer.from_file(resumed / checkpoint.TOKENIZER)
    if config.data.tokenizer:
        return Tokenizer.from_file(config.data.tokenizer)
    count = min(len(source), CAPTIONS_FOR_TOKENIZER)
    captions = (caption for i in range(count) for caption in source[i].captions)
    return Tokenizer.train(captions, config.data.vocabulary)

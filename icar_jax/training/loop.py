"""The training run: one ordered loop for every task, resumed by the same command."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import jax
from absl import logging

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax.config import ExperimentConfig
from icar_jax.data import sources
from icar_jax.data.images import Augment
from icar_jax.data.pipeline import BadFiles, train_batches
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import registry
from icar_jax.parallel.mesh import batch_shards, make_mesh
from icar_jax.training.checkpoints import StateStore
from icar_jax.training.logs import RunLog
from icar_jax.training.optimizer import make_optimizer, schedule
from icar_jax.training.step import abstract_state, init_state, make_step, put_batch
from icar_jax.training.tasks import make_task

# Fields that may change when a run is continued; anything else would make it another run.
FREE_ON_RESUME = {
    "train": {"log_every", "checkpoint_every", "keep", "tensorboard"},
    "data": {"root", "workers", "threads"},
    "mesh": {"data", "fsdp", "tensor"},
    "eval": {f.name for f in dataclasses.fields(cfg.EvalConfig)},
}
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
    mesh = make_mesh(config.mesh)
    cfg.validate_batch(config.train.batch_size, batch_shards(mesh))
    if config.task == "clip":
        registry.clip_arch(config.clip)  # an unknown variant or exit fails before data is opened
    source = sources.train_source(config.data)
    _claim_workdir(config, workdir)
    tokenizer = _tokenizer(config, source, workdir) if config.task == "clip" else None
    task = make_task(config, tokenizer)
    optimizer = make_optimizer(config.optim, config.train.steps)
    step_fn = make_step(task, optimizer, mesh, config.train.seed)
    last = min(config.train.steps, stop_after or config.train.steps)

    with StateStore(workdir, config.train.keep) as store:
        start = store.latest_step or 0
        if start:
            state = store.restore(start, abstract_state(task, optimizer, mesh))
            logging.info("Continuing %s at step %d of %d.", workdir, start, config.train.steps)
        else:
            state = init_state(task, optimizer, mesh, config.train.seed)
        state = _run(config, workdir, task, step_fn, store, source, tokenizer, mesh, state, start, last)
        if last < config.train.steps:
            return workdir
        params = jax.device_get(state["params"])
    description = {**task.description, "source": {"trained_with": "icar_jax", "steps": config.train.steps}}
    return checkpoint.write(
        workdir / "model", task.kind, description, params, tokenizer.to_json() if tokenizer else None
    )


def _run(config, workdir, task, step_fn, store, source, tokenizer, mesh, state, start, last):
    t = config.train
    batches = train_batches(
        source,
        task.preprocess,
        tokenizer,
        task.context_length,
        batch_size=t.batch_size,
        seed=t.seed,
        start_position=start * t.batch_size,
        augment=Augment(
            kind="crop" if config.data.crop_scale < 1 else "none",
            scale=(config.data.crop_scale, 1.0),
            flip=config.data.flip,
        ),
        num_workers=config.data.workers,
        num_threads=config.data.threads,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        with_complexity=config.task == "complexity",
    )
    log = RunLog(workdir, t.steps, start, t.tensorboard, f"train {config.task}")
    bad = BadFiles()
    monitor = _Monitor(config, log, start)
    try:
        for step in range(start + 1, last + 1):
            batch = next(batches)
            bad.add(batch)
            state, metrics = step_fn(state, put_batch(batch, task.fields, mesh))
            monitor.push(step, metrics, batch["name"])
            log.advance()
            if step % t.checkpoint_every == 0 or step == last:
                monitor.flush()  # never save a state whose loss has not been seen
                if step != store.latest_step:
                    store.save(step, state)
        monitor.flush()
    finally:
        batches.close()
        log.close()
        if bad.reasons:
            logging.warning("%s", bad.summary())
    return state


class _Monitor:
    """Reads metrics one step late, so that the host prepares the next batch while the device works."""

    def __init__(self, config: ExperimentConfig, log: RunLog, start: int):
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
                f"files of the batch: {', '.join(map(str, names))}. The last checkpoint in the workdir is intact; "
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


def _claim_workdir(config: ExperimentConfig, workdir: Path) -> None:
    """Writes config.json, or checks that the run found there is the same one. Raises ConfigError naming what differs."""
    file = workdir / "config.json"
    now = dataclasses.asdict(config)
    if file.is_file():
        then = dataclasses.asdict(cfg.from_dict(json.loads(file.read_text(encoding="utf-8"))))
        changed = _changes(then, now)
        if changed:
            raise cfg.ConfigError(
                f"{workdir} holds a run with another configuration; use a new --workdir, or take back: "
                + "; ".join(changed)
            )
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file.write_text(cfg.to_json(config) + "\n", encoding="utf-8")
    except OSError as error:
        raise cfg.ConfigError(f"--workdir={workdir} cannot be written: {error}; choose a writable folder") from error


def _changes(then: dict, now: dict, prefix: str = "config") -> list[str]:
    lines = []
    for key, value in now.items():
        section = prefix.removeprefix("config").strip(".")
        if isinstance(value, dict):
            lines += _changes(then.get(key, {}), value, f"{prefix}.{key}")
        elif then.get(key) != value and key not in FREE_ON_RESUME.get(section, ()):
            lines.append(f"{prefix}.{key} was {then.get(key)!r}, now {value!r}")
    return lines


def _tokenizer(config: ExperimentConfig, source, workdir: Path) -> Tokenizer:
    """The tokenizer of the run: the one it began with, the configured file, or one trained on the captions."""
    file = workdir / checkpoint.TOKENIZER
    if file.is_file():
        return Tokenizer.from_file(file)
    if config.data.tokenizer:
        tokenizer = Tokenizer.from_file(config.data.tokenizer)
    else:
        count = min(len(source), CAPTIONS_FOR_TOKENIZER)
        captions = (caption for i in range(count) for caption in source[i].captions)
        tokenizer = Tokenizer.train(captions, config.data.vocabulary)
    tokenizer.save(file)
    return tokenizer

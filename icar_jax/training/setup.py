"""Run setup: validates everything on every process before the workdir is created and locked."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.parallel import distributed
from icar_jax.parallel.mesh import batch_shards, make_mesh
from icar_jax.training.checkpoints import require_space
from icar_jax.training.logs import note_event
from icar_jax.training.optimizer import make_optimizer, require_matches
from icar_jax.training.step import abstract_state
from icar_jax.training.tasks.base import Task
from icar_jax.training.tasks.kind import RunKind
from icar_jax.training.tasks.kinds import kind_of
from icar_jax.training.tasks.ratings import RatingsSummary


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Everything known before the first step; the same on every process."""

    config: ExperimentConfig
    kind: RunKind
    workdir: Path
    mesh: Mesh
    source: Source
    tokenizer: Tokenizer | None
    task: Task


def open_run(config: ExperimentConfig, workdir: Path, held: ExitStack) -> RunContext:
    """Validates the run, then creates and locks the workdir; the lock is released when `held` is closed.

    Raises ConfigError for anything in the configuration, data or workdir that prevents the run.
    """
    with distributed.together("preparing the run"):
        mesh = make_mesh(config.mesh)
        distributed.avoid_cached_collectives()
        cfg.validate_batch(config.train.batch_size, batch_shards(mesh), config.train.accumulate)
        kind_of(kind_of(config).recalled(workdir)).check_architecture()
    distributed.require_same("configuration", _shared_part(config))
    open_data = lambda: configured.train_source(config.data)
    # Process 0 builds the index and the others read it; sources without an index are opened by all processes at once.
    source = distributed.main_first("indexing the shards", open_data) if configured.keeps_index(config.data) else None
    with distributed.together("opening the data"):
        source = open_data() if source is None else source
        trained_on = configured.fingerprint(source)
        config = with_length(config, len(source))
        kind = kind_of(config)
        resumed, steered = files.has_checkpoint(workdir), {}
        if resumed:
            free = (*files.FREE_ON_RESUME, *files.STEERING)
            files.require_same_config(workdir, config, free)
            files.require_same_data(workdir, trained_on)
            kind.require_same(workdir)
            steered = files.steered(workdir, config)
            if (done := files.last_checkpoint(workdir)) > config.train.steps:
                raise cfg.ConfigError(
                    f"config.train.steps={config.train.steps}, but the run in {workdir} is at step {done}; set more steps"
                )
        rated = kind.survey(source)
        counts = rated.class_counts if rated else (1, 1)
    distributed.require_same("set of training images (config.data.root)", json.dumps(trained_on, sort_keys=True))
    if rated is not None:
        distributed.require_same("set of rated images (config.data.ratings)", rated.content)
    token = distributed.from_main(secrets.randbits(30))
    tokenizer = None
    with distributed.together("claiming the workdir"):
        if distributed.is_main():
            tokenizer = kind.tokenizer(source, workdir if resumed else None)
            # Everything is validated before anything is written.
            task = kind_of(kind.recalled(workdir)).task(tokenizer, mesh, counts)
            require_matches(config.train.freeze, config.optim.rates, task.shapes)
            if kind.starts_from_weights and not resumed:
                kind.initial_params(task, _quiet)  # raises for incompatible weights now; values are read later
            kind.frozen_params(task)  # raises for damaged files now
            kind.require_images(len(source))
            if config.train.eval_every:
                configured.validation_source(config)  # raises for a missing split now
            abstract = abstract_state(task, optimizer_of(kind), mesh, config)
            require_space(workdir, abstract, config.train.keep, 1 + config.train.keep_best)
            try:
                held.enter_context(files.locked(workdir))
                if files.has_checkpoint(workdir) != resumed:  # `resumed` was read before the lock, perhaps minutes ago
                    raise cfg.ConfigError(
                        f"--workdir={workdir}: another run wrote to it while this one was starting; run the command again"
                    )
                if resumed:
                    files.require_same_config(workdir, config, free)
                if steered:  # logged before config.json is written: a run killed in between logs it again
                    note_event(workdir, files.last_checkpoint(workdir), "config_changed", changed=steered)
                _claim_workdir(kind, workdir, trained_on, tokenizer, rated, token)
            except OSError as error:
                raise cfg.ConfigError(f"--workdir={workdir} cannot be written: {error}; choose a writable folder") from error
    with distributed.together("reading the workdir"):
        if not distributed.is_main():
            files.require_token(workdir, token)
            tokenizer = kind.tokenizer(source, workdir)
            task = kind_of(kind.recalled(workdir)).task(tokenizer, mesh, counts)
    if distributed.is_main():
        (workdir / files.TOKEN).unlink(missing_ok=True)
    for field, (then, now) in steered.items():
        say(f"Changed: {field} from {then!r} to {now!r}")
    for line in rated.lines if rated else ():
        say(line)
    return RunContext(config, kind, workdir, mesh, source, tokenizer, task)


def with_length(config: ExperimentConfig, images: int) -> ExperimentConfig:
    """Returns the config with train.steps and train.eval_every in steps where they are given in epochs of `images`."""
    t, epoch = config.train, images / config.train.batch_size
    steps = math.ceil(t.epochs * epoch) if t.epochs else t.steps
    every = max(1, round(epoch)) if t.eval_every < 0 else t.eval_every
    return dataclasses.replace(config, train=dataclasses.replace(t, steps=steps, eval_every=every))


def optimizer_of(kind: RunKind) -> optax.GradientTransformation:
    """Returns the optimizer of a run, with its frozen groups."""
    return make_optimizer(kind.config.optim, kind.config.train.steps, kind.frozen_groups)


def say(text: str) -> None:
    """Prints a line on process 0."""
    if distributed.is_main():
        print(text, flush=True)


def _quiet(text: str) -> None:
    pass


def _claim_workdir(
    kind: RunKind,
    workdir: Path,
    trained_on: dict[str, Any],
    tokenizer: Tokenizer | None,
    rated: RatingsSummary | None,
    token: int,
) -> None:
    """Writes the files that describe the run; called after all validation."""
    files.save_config(workdir, kind.config)
    files.save_data(workdir, trained_on)
    kind.remember(workdir)
    if rated is not None:
        rated.write(workdir)
    if tokenizer is not None and kind.trains_clip:
        files.write_text(workdir / checkpoint.TOKENIZER, tokenizer.to_json())
    if jax.process_count() > 1:
        files.write_token(workdir, token)
    files.recover(workdir)


def _shared_part(config: ExperimentConfig) -> str:
    """JSON of the config fields that must be equal on all processes.

    Data paths and numbers of workers may differ between machines; the data itself is compared by content.
    """
    values = dataclasses.asdict(config)
    for name in ("root", "ratings", "workers", "threads", "scenes_kept"):
        del values["data"][name]
    return json.dumps(values, sort_keys=True)

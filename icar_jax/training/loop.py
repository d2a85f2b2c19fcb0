"""The training run: one ordered loop for every task, on any number of processes, resumed by the same command."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax
from absl import logging
from jax.sharding import Mesh

from icar_jax import checkpoint
from icar_jax import config as cfg
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.data import augment, sources
from icar_jax.data.iterator import Batch, BatchIterator
from icar_jax.data.pipeline import BadFiles, train_batches
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import registry
from icar_jax.parallel import distributed
from icar_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh
from icar_jax.parallel.rules import shardings
from icar_jax.training import tower
from icar_jax.training.checkpoints import StateStore, require_space, write_model
from icar_jax.training.evaluator import Evaluation, MakeEvaluator, Trained, make_evaluation
from icar_jax.training.initial import load_params, load_tokenizer, note_preprocessing, place
from icar_jax.training.logs import RunLog, SilentLog, open_log
from icar_jax.training.monitor import CutCaptions, Monitor, NonFiniteLoss
from icar_jax.training.optimizer import make_optimizer
from icar_jax.training.preemption import Agreement, StopRequest
from icar_jax.training.rated_run import RatedRun, look_at
from icar_jax.training.step import State, abstract_state, init_state, make_step, model_params, put_batch
from icar_jax.training.tasks import Task, make_task

__all__ = ["NonFiniteLoss", "train"]

CAPTIONS_FOR_TOKENIZER = 20_000  # images whose captions a tokenizer is trained on


def train(
    config: ExperimentConfig,
    workdir: Path,
    *,
    stop_after: int | None = None,
    evaluators: tuple[MakeEvaluator, ...] = (),
) -> Path:
    """Trains to `config.train.steps`, or continues a run that was cut off; returns the finished checkpoint's folder.

    Writes into `workdir`: config.json, tokenizer.json, splits.json (complexity), metrics.jsonl, checkpoints/, best/ and, at the
    end, model/. Called by every process of a run, with a workdir that all of them see; the first one writes.
    A run that config.train.patience ends is finished: model/ holds its last weights, best/ the best ones.
    SIGTERM saves the state and returns `workdir`; SIGINT saves and raises KeyboardInterrupt. `stop_after` ends this call early
    after that many steps in all. `evaluators` are what `config.train.eval_every` asks for.
    Raises ConfigError before anything is written; NonFiniteLoss naming the step and the batch's files; SaveError or OSError
    where the disk fails, PeerError where another process does: the checkpoints saved before are intact.
    """
    with StopRequest() as request:
        run = _open_run(cfg.validate(config), Path(workdir))
        return _train(run, request, run.config.train.steps if stop_after is None else stop_after, evaluators)


@dataclasses.dataclass(frozen=True)
class _Run:
    """What is known before the first step; the same on every process."""

    config: ExperimentConfig
    workdir: Path
    mesh: Mesh
    source: Source
    tokenizer: Tokenizer | None
    task: Task


def _open_run(config: ExperimentConfig, workdir: Path) -> _Run:
    """Checks everything that can be checked beforehand, then claims the workdir."""
    with distributed.together("preparing the run"):
        mesh = make_mesh(config.mesh)
        distributed.avoid_cached_collectives()
        cfg.validate_batch(config.train.batch_size, batch_shards(mesh), config.train.accumulate)
        _check_architecture(config)
    distributed.require_same("configuration", _shared_part(config))
    open_data = lambda: sources.train_source(config.data)
    # What process 0 has indexed the others read; sources without an index are opened by all at the same time.
    source = distributed.main_first("indexing the shards", open_data) if sources.keeps_index(config.data) else None
    with distributed.together("opening the data"):
        source = open_data() if source is None else source
        trained_on = sources.fingerprint(source)
        config = _with_length(config, len(source))
        resumed = files.has_checkpoint(workdir)
        if resumed:
            # Steps that follow from the number of images: where that has changed, the images are what to complain of.
            free = (*files.FREE_ON_RESUME, "config.train.steps") if config.train.epochs else files.FREE_ON_RESUME
            files.require_same_config(workdir, config, free)
            files.require_same_data(workdir, trained_on)
        rated = look_at(config, source) if config.task == "complexity" else None
        counts = rated.class_counts if rated else (1, 1)
    distributed.require_same("set of training images (config.data.root)", json.dumps(trained_on, sort_keys=True))
    token = distributed.from_main(secrets.randbits(30))
    tokenizer = None
    with distributed.together("claiming the workdir"):
        if distributed.is_main():
            if config.task == "clip":
                tokenizer = _tokenizer(config, source, workdir if resumed else None)
            task = make_task(config, tokenizer, mesh, counts)  # what does not fit is found before anything is written
            if _starts_from_weights(config) and not resumed:
                _initial_params(config, task, _quiet)  # what does not fit is named now; the values are read later
            abstract = abstract_state(task, _optimizer(config), mesh, config)
            require_space(workdir, abstract, config.train.keep, 1 + config.train.keep_best)
            _claim_workdir(config, workdir, trained_on, tokenizer, rated, token)
    with distributed.together("reading the workdir"):
        if not distributed.is_main():
            files.require_token(workdir, token)
            tokenizer = Tokenizer.from_file(workdir / checkpoint.TOKENIZER) if config.task == "clip" else None
            task = make_task(config, tokenizer, mesh, counts)
    if distributed.is_main():
        (workdir / files.TOKEN).unlink(missing_ok=True)
    for line in rated.lines if rated else ():
        _say(line)
    return _Run(config, workdir, mesh, source, tokenizer, task)


def _with_length(config: ExperimentConfig, images: int) -> ExperimentConfig:
    """The config with steps, and steps between evaluations, where these are given in epochs."""
    t, epoch = config.train, images / config.train.batch_size
    steps = math.ceil(t.epochs * epoch) if t.epochs else t.steps
    every = max(1, round(epoch)) if t.eval_every < 0 else t.eval_every
    return dataclasses.replace(config, train=dataclasses.replace(t, steps=steps, eval_every=every))


def _train(run: _Run, request: StopRequest, stop_after: int, evaluators: tuple[MakeEvaluator, ...]) -> Path:
    config, workdir, task, t = run.config, run.workdir, run.task, run.config.train
    optimizer = _optimizer(config)
    step_fn = make_step(task, optimizer, run.mesh, config)
    sharding = batch_sharding(run.mesh)
    part = distributed.batch_part(sharding, t.batch_size)
    trained = Trained(config, task.kind, task.description, run.tokenizer, sharding, batch_shards(run.mesh), part)
    with StateStore(workdir, t.keep) as store:
        start = distributed.from_main(store.latest_step or 0)  # a network file system may show the newest one late elsewhere
        evaluation = make_evaluation(trained, workdir, start, evaluators)
        if start:
            state = store.restore(start, abstract_state(task, optimizer, run.mesh, config))
            _say(f"Continuing {workdir} after step {start} of {t.steps}.")
        else:
            given = _starts_from_weights(config)
            params = place(_initial_params(config, task), shardings(task.shapes, run.mesh)) if given else None
            state = init_state(task, optimizer, run.mesh, config, params)
        log = open_log(workdir, t.steps, start, t.tensorboard, f"train {config.task}")
        with _batches(run, start, part) as batches, contextlib.closing(log):
            advance = lambda state, batch: step_fn(state, put_batch(batch, task.fields, run.mesh))
            steps = range(start + 1, min(t.steps, stop_after) + 1)
            with _naming_lost_peers(workdir):
                state, done, stopped = _run(config, advance, state, batches, steps, store, log, evaluation, request)
    if done < t.steps and evaluation is not None and evaluation.exhausted:
        _say(f"The last {t.patience} evaluations were no better (config.train.patience): ended after step {done} of {t.steps}.")
    elif done < t.steps:
        if stopped:
            _say(f"Stopped by {stopped} after step {done} of {t.steps}; the same command continues.")
        if stopped == "SIGINT":
            distributed.end_together()
            raise KeyboardInterrupt
        return workdir
    description = {**task.description, "source": {"trained_with": "icar_jax", "steps": done}}
    text = run.tokenizer.to_json() if run.tokenizer else None
    return write_model(workdir / "model", task.kind, description, model_params(state), text)


def _run(
    config: ExperimentConfig,
    advance: Callable[[State, Batch], tuple[State, dict[str, jax.Array]]],
    state: State,
    batches: BatchIterator,
    steps: range,
    store: StateStore,
    log: RunLog | SilentLog,
    evaluation: Evaluation | None,
    request: StopRequest,
) -> tuple[State, int, str | None]:
    """Runs `steps`, or until a signal or the end of patience; saves as configured and at the end.

    Returns (state, last step done, signal).

    Unreadable files and cut captions are reported at the end.
    """
    bad, cut, monitor = BadFiles(), CutCaptions(config.clip.context_length), Monitor(config, log)
    done = saved = steps.start - 1
    stop, stopped = Agreement(request), None
    try:
        for step in steps:
            if evaluation is not None and evaluation.exhausted:
                break
            if stopped := stop(state["step"]):
                break
            try:
                batch = next(batches)
            except Exception:
                # A signal to the whole group has ended the data workers as well.
                if request.name and jax.process_count() == 1:
                    stopped = request.name
                    break
                raise
            bad.add(batch)
            cut.add(batch)
            state, metrics = advance(state, batch)
            done = step
            monitor.push(step, metrics, batch["name"])
            log.advance()
            store.check()
            if evaluation is not None and evaluation.due(step):
                monitor.flush()
                begun = time.perf_counter()
                log.metrics(step, evaluation(step, model_params(state)))
                monitor.exclude(time.perf_counter() - begun)
            if step % config.train.checkpoint_every == 0:
                monitor.flush()  # never save a state whose loss has not been seen
                store.save(step, state)
                saved = step
        monitor.flush()
        if saved < done:
            store.save(done, state)
        store.wait()
    finally:
        if bad:
            logging.warning("%s", bad.summary())
        cut.report()
    return state, done, stopped


def _optimizer(config: ExperimentConfig) -> optax.GradientTransformation:
    return make_optimizer(config.optim, config.train.steps, tower.frozen_groups(config))


def _batches(run: _Run, start: int, part: tuple[int, int]) -> BatchIterator:
    """This process's part of the batches after `start` steps."""
    data, t = run.config.data, run.config.train
    return train_batches(
        run.source,
        run.task.preprocess,
        run.tokenizer,
        run.task.context_length,
        batch_size=t.batch_size,
        seed=t.seed,
        start_position=start * t.batch_size,
        augment=augment.from_config(data, run.config.task == "complexity" and run.task.preprocess.resize_mode == "squash"),
        process_index=part[0],
        process_count=part[1],
        with_complexity=run.config.task == "complexity",
        **sources.loading(data),
    )


@contextlib.contextmanager
def _naming_lost_peers(workdir: Path):
    """Says what the runtime's errors mean when the connection to another process breaks."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = str(error)
        signs = ("Gloo", "NCCL", "Connection ", "Socket closed", "UNAVAILABLE", "coordination service", "DEADLINE_EXCEEDED")
        if jax.process_count() == 1 or not any(sign in text for sign in signs):
            raise
        raise distributed.PeerError(
            f"another process of this run ended or cannot be reached ({text.splitlines()[0]}); its own output says why. "
            f"The checkpoints in {workdir} are intact: start all processes again, with the same command"
        ) from error


def _shared_part(config: ExperimentConfig) -> str:
    """What all processes must agree on; where the data lies and who prepares it may differ between machines."""
    values = dataclasses.asdict(config)
    for name in ("root", "workers", "threads"):
        del values["data"][name]
    return json.dumps(values, sort_keys=True)


def _say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


def _check_architecture(config: ExperimentConfig) -> None:
    """An unknown variant, a misplaced exit or a bad size fails before any data is opened."""
    if config.task == "clip":
        registry.clip_arch(config.clip)
    else:
        registry.complexity_arch(config.complexity)


def _claim_workdir(
    config: ExperimentConfig,
    workdir: Path,
    trained_on: dict[str, Any],
    tokenizer: Tokenizer | None,
    rated: RatedRun | None,
    token: int,
) -> None:
    """Writes what the run is; called once everything that can be checked beforehand has been."""
    try:
        files.save_config(workdir, config)
        files.save_data(workdir, trained_on)
        if rated is not None:
            rated.write(workdir)
        if tokenizer is not None:
            files.write_text(workdir / checkpoint.TOKENIZER, tokenizer.to_json())
        if jax.process_count() > 1:
            files.write_token(workdir, token)
        files.recover(workdir)
    except OSError as error:
        raise cfg.ConfigError(f"--workdir={workdir} cannot be written: {error}; choose a writable folder") from error


def _quiet(text: str) -> None:
    pass


def _starts_from_weights(config: ExperimentConfig) -> bool:
    return bool(config.train.init) or tower.has_tower(config)


def _initial_params(config: ExperimentConfig, task: Task, note: Callable[[str], None] = _say) -> Mapping[str, Any]:
    """The weights of config.train.init, read when asked for, or the tower of config.complexity.clip under a fresh head.

    Raises ConfigError where they do not fit the task's model.
    """
    fresh = lambda: jax.device_get(task.init(jax.random.key(config.train.seed)))
    if tower.has_tower(config):
        return tower.params(config, task.shapes, fresh)
    note_preprocessing(config.train.init, task.kind, task.preprocess, note)
    return load_params(config.train.init, task.kind, task.arch, task.shapes, fresh, note)


def _tokenizer(config: ExperimentConfig, source: Source, resumed: Path | None) -> Tokenizer:
    """The tokenizer of the run: the one a resumed run began with, the configured file, or one trained on the captions."""
    if resumed is not None:
        return Tokenizer.from_file(resumed / checkpoint.TOKENIZER)
    init, file = config.train.init, config.data.tokenizer
    kept = load_tokenizer(init) if init else None
    theirs = Tokenizer.from_json(kept, f"the tokenizer of {init}") if kept is not None else None
    if file:
        given = Tokenizer.from_file(file)
        if theirs is not None and not given.same_ids(theirs):
            raise cfg.ConfigError(
                f"config.data.tokenizer={file} gives other ids than the tokenizer in config.train.init={init}, which its text "
                "tower was trained with; leave config.data.tokenizer empty, which takes that one"
            )
        return given
    if theirs is not None:
        return theirs
    if init:
        raise cfg.ConfigError(
            f"config.train.init={init} holds no tokenizer, and one trained on the captions would not fit its text tower; pass "
            "the one it was trained with: --config.data.tokenizer=PATH"
        )
    count = min(len(source), CAPTIONS_FOR_TOKENIZER)
    captions = (caption for i in range(count) for caption in source[i].captions)
    return Tokenizer.train(captions, config.data.vocabulary)

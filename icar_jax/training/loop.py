"""The training run: one ordered loop for every task, on any number of processes, resumed by the same command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from icar_jax import config as cfg
from icar_jax.config import ExperimentConfig
from icar_jax.data import augment, configured
from icar_jax.data.loader.batches import BadFiles, train_batches
from icar_jax.data.loader.iterator import Batch, BatchIterator
from icar_jax.parallel import distributed
from icar_jax.parallel.mesh import batch_sharding, batch_shards
from icar_jax.parallel.rules import shardings
from icar_jax.training.checkpoints import StateStore, write_model
from icar_jax.training.evaluator import Evaluation, MakeEvaluator, TrainedModel, make_evaluation
from icar_jax.training.init_weights import place
from icar_jax.training.logs import RunLog, SilentLog, open_log
from icar_jax.training.monitor import CutCaptions, Monitor, NonFiniteLoss
from icar_jax.training.preemption import Agreement, StopRequest
from icar_jax.training.setup import RunContext, open_run, optimizer_of, say
from icar_jax.training.step import State, abstract_state, init_state, make_step, model_params, put_batch
from icar_jax.training.tasks.kind import RunKind

__all__ = ["NonFiniteLoss", "train"]


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
    cfg.require_local("--workdir", workdir)
    with StopRequest() as request, contextlib.ExitStack() as held:
        run = open_run(cfg.validate(config), Path(workdir), held)
        return _train(run, request, run.config.train.steps if stop_after is None else stop_after, evaluators)


def _train(run: RunContext, request: StopRequest, stop_after: int, evaluators: tuple[MakeEvaluator, ...]) -> Path:
    config, workdir, task, t = run.config, run.workdir, run.task, run.config.train
    kind, optimizer = run.kind, optimizer_of(run.kind)
    step_fn = make_step(task, optimizer, run.mesh, config)
    sharding = batch_sharding(run.mesh)
    part = distributed.batch_part(sharding, t.batch_size)
    tokenizer = run.tokenizer if kind.trains_clip else None  # a regret run reads captions with that of its CLIP
    trained = TrainedModel(config, task.kind, task.description, tokenizer, sharding, batch_shards(run.mesh), part)
    read = kind.frozen_params(task)
    frozen = {name: place(tree, shardings(task.frozen[name], run.mesh)) for name, tree in read.items()}
    with StateStore(workdir, t.keep) as store:
        start = distributed.from_main(store.latest_step or 0)  # a network file system may show the newest one late elsewhere
        if start < min(t.steps, stop_after):
            with distributed.together("embedding the extra negatives"):
                found = kind.embedded_params(task, run.source, run.tokenizer, read, request)
            for name, tree in (found or {}).items():  # None: a signal has come, and no step is done
                distributed.require_same("set of extra negatives (images that can be read)", tree["index"].tobytes().hex())
                frozen[name] = place(tree, shardings(task.frozen[name], run.mesh))
        evaluation = make_evaluation(trained, workdir, start, evaluators)
        if start:
            state = store.restore(start, abstract_state(task, optimizer, run.mesh, config))
            say(f"Continuing {workdir} after step {start} of {t.steps}.")
        else:
            weights = kind.initial_params(task, say) if kind.starts_from_weights else None
            params = place(weights, shardings(task.shapes, run.mesh)) if weights is not None else None
            state = init_state(task, optimizer, run.mesh, config, params)
        log = open_log(workdir, t.steps, start, t.tensorboard, f"train {config.task}")
        with _batches(run, start, part) as batches, contextlib.closing(log):
            advance = lambda state, batch: step_fn(state, put_batch(batch, task.fields, run.mesh), frozen)
            steps = range(start + 1, min(t.steps, stop_after) + 1)
            with _naming_lost_peers(workdir):
                state, done, stopped = _run(kind, advance, state, batches, steps, store, log, evaluation, request)
    if done < t.steps and evaluation is not None and evaluation.exhausted:
        say(f"The last {t.patience} evaluations were no better (config.train.patience): ended after step {done} of {t.steps}.")
    elif done < t.steps:
        if stopped:
            say(f"Stopped by {stopped} after step {done} of {t.steps}; the same command continues.")
        if stopped == "SIGINT":
            distributed.end_together()
            raise KeyboardInterrupt
        return workdir
    description = {**task.description, "source": {"trained_with": "icar_jax", "steps": done}}
    text = tokenizer.to_json() if tokenizer else None
    return write_model(workdir / "model", task.kind, description, model_params(state), text)


def _run(
    kind: RunKind,
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
    config, bad, cut = kind.config, BadFiles(), CutCaptions(kind.config.clip.context_length)
    monitor = Monitor(kind, log, lambda: store.newest)
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
            if kind.trains_clip:  # a frozen CLIP keeps its context length
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


def _batches(run: RunContext, start: int, part: tuple[int, int]) -> BatchIterator:
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
        augment=augment.from_config(data, not run.kind.trains_clip and run.task.preprocess.resize_mode == "squash"),
        process_index=part[0],
        process_count=part[1],
        with_complexity="complexity" in run.task.fields,
        others=run.task.others,
        **configured.loading(data),
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

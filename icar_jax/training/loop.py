"""The training loop: the same for every task, on one or several processes, resumed by running the same command again."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

import jax
from absl import logging

from icar_jax import config as cfg
from icar_jax import profiling
from icar_jax.config import ExperimentConfig
from icar_jax.data import augment, configured
from icar_jax.data.loader.bad_files import BadFiles
from icar_jax.data.loader.batches import train_batches
from icar_jax.data.loader.iterator import Batch, BatchIterator
from icar_jax.data.loader.kept import KeptOutputs
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
from icar_jax.training.start import forget
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
    """Trains to `config.train.steps`, or resumes an interrupted run; returns the folder of the finished checkpoint.

    Writes config.json, tokenizer.json, splits.json (complexity), metrics.jsonl, checkpoints/, best/ and, at the end, model/
    into `workdir`. Every process of a run must call it with the same shared workdir; process 0 writes.
    Early stopping (config.train.patience) also finishes the run: model/ holds the last weights, best/ the best ones.
    SIGTERM saves the state and returns `workdir`; SIGINT saves and raises KeyboardInterrupt.

    Args:
        stop_after: ends this call once the run has done this many steps in total; None trains to the end.
        evaluators: functions that build the evaluators; required if `config.train.eval_every` is set.

    Raises ConfigError before anything is written; NonFiniteLoss naming the step and the files of the batch; SaveError or
    OSError if the disk fails; PeerError if another process fails. Checkpoints saved before an error stay intact.
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
    tokenizer = run.tokenizer if kind.trains_clip else None  # a regret run uses its CLIP's tokenizer and does not save it
    trained = TrainedModel(config, task.kind, task.description, tokenizer, sharding, batch_shards(run.mesh), part)
    read = kind.frozen_params(task)
    frozen = {name: place(tree, shardings(task.frozen[name], run.mesh)) for name, tree in read.items()}
    with StateStore(workdir, t.keep) as store:
        start, saved = store.restore_newest(abstract_state(task, optimizer, run.mesh, config))
        if task.frozen.keys() - read.keys() and start < min(t.steps, stop_after):
            with distributed.together("embedding the extra negatives"):
                found = kind.embedded_params(task, run.source, run.tokenizer, read, request)
            for name, tree in (found or {}).items():  # None: a stop signal arrived, so no step will run
                distributed.require_same("set of extra negatives (images that can be read)", tree["index"].tobytes().hex())
                frozen[name] = place(tree, shardings(task.frozen[name], run.mesh))
        evaluation = make_evaluation(trained, workdir, start, evaluators)
        if saved is not None:
            state = saved
            say(f"Resuming {workdir} after step {start} of {t.steps}.")
        else:
            weights = kind.initial_params(task, say) if kind.starts_from_weights else None
            params = place(weights, shardings(task.shapes, run.mesh)) if weights is not None else None
            state = init_state(task, optimizer, run.mesh, config, params)
        del saved  # the state is donated step by step
        forget()
        kept = kind.kept_outputs(task, run.source, run.tokenizer, state["params"], run.mesh, request)
        kept = KeptOutputs() if kept is None else kept  # None: a stop signal arrived, so no step will run
        log = open_log(workdir, t.steps, start, t.tensorboard, f"train {config.task}")
        with _batches(run, start, part, kept) as batches, contextlib.closing(log):

            def advance(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
                with profiling.section("transfer"):
                    on_device = profiling.ready(put_batch(batch, task.fields, run.mesh))
                with profiling.section("step"):
                    return profiling.ready(step_fn(state, on_device, frozen))

            steps = range(start + 1, min(t.steps, stop_after) + 1)
            with _naming_lost_peers(workdir):
                state, done, stopped = _run(kind, advance, state, batches, steps, store, log, evaluation, request)
    if done < t.steps and evaluation is not None and evaluation.exhausted:
        say(f"Early stopping: no improvement in {t.patience} evaluations (config.train.patience); step {done} of {t.steps}.")
    elif done < t.steps:
        if stopped:
            say(f"Stopped by {stopped} after step {done} of {t.steps}; run the same command to resume.")
        if stopped == "SIGINT":
            distributed.end_together()
            raise KeyboardInterrupt
        return workdir
    description = {**task.description, "source": {"trained_with": "icar_jax", "steps": done}}
    text = tokenizer.to_json() if tokenizer else None
    with profiling.section("saving"):
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
    """Runs `steps` until a stop signal or early stopping; saves every config.train.checkpoint_every steps and at the end.

    Returns (state, last completed step, name of the signal or None). Reports unreadable files and truncated captions at the
    end.
    """
    config, bad, cut = kind.config, BadFiles(), CutCaptions(kind.config.clip.context_length)
    monitor = Monitor(kind, log, lambda: store.newest)
    done = saved = steps.start - 1
    stop, stopped = Agreement(request), None
    try:
        for step in profiling.steps(steps, config.train.batch_size, kind.unit):
            if evaluation is not None and evaluation.exhausted:
                break
            if stopped := stop(state["step"]):
                break
            try:
                with profiling.section("input wait"):
                    batch = next(batches)
            except Exception:
                # A signal sent to the whole process group has also stopped the data workers.
                if request.name and jax.process_count() == 1:
                    stopped = request.name
                    break
                raise
            bad.add(batch)
            if kind.trains_clip:  # the context length of a frozen CLIP cannot be changed
                cut.add(batch)
            state, metrics = advance(state, batch)
            done = step
            monitor.push(step, metrics, batch["name"])
            log.advance()
            store.check()
            if evaluation is not None and evaluation.due(step):
                monitor.flush()
                started = time.perf_counter()
                with profiling.section("evaluating"):
                    log.metrics(step, evaluation(step, model_params(state)))
                monitor.exclude(time.perf_counter() - started)
            if step % config.train.checkpoint_every == 0:
                monitor.flush()  # check that the loss is finite before saving
                with profiling.section("saving"):
                    store.save(step, state)
                saved = step
        monitor.flush()
        with profiling.section("saving"):
            if saved < done:
                store.save(done, state)
            store.wait()
    finally:
        if bad:
            logging.warning("%s", bad.summary())
        cut.report()
    return state, done, stopped


def _batches(run: RunContext, start: int, part: tuple[int, int], kept: KeptOutputs) -> BatchIterator:
    """This process's part of each batch, starting after `start` steps."""
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
        kept=kept,
        **configured.loading(data),
    )


@contextlib.contextmanager
def _naming_lost_peers(workdir: Path):
    """Raises PeerError in place of the runtime's error when the connection to another process breaks."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        text = str(error)
        signs = ("Gloo", "NCCL", "Connection ", "Socket closed", "UNAVAILABLE", "coordination service", "DEADLINE_EXCEEDED")
        if jax.process_count() == 1 or not any(sign in text for sign in signs):
            raise
        raise distributed.PeerError(
            f"another process of this run ended or cannot be reached ({text.splitlines()[0]}); see its output for the cause. "
            f"The checkpoints in {workdir} are intact: start all processes again with the same command"
        ) from error

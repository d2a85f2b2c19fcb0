"""Opening a run: everything that can be checked is, on every process, before the workdir is claimed."""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Callable, Mapping
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
from icar_jax.models import variants
from icar_jax.parallel import distributed
from icar_jax.parallel.mesh import batch_shards, make_mesh
from icar_jax.training.checkpoints import require_space
from icar_jax.training.init_weights import load_params, load_tokenizer, note_preprocessing
from icar_jax.training.logs import note_event
from icar_jax.training.optimizer import make_optimizer, require_matches
from icar_jax.training.step import abstract_state
from icar_jax.training.tasks import extra_negatives, frozen_trunk, init_teacher, origin, regret
from icar_jax.training.tasks.ratings import RatingsSummary, look_at
from icar_jax.training.tasks.tasks import Task, given_params, make_task

CAPTIONS_FOR_TOKENIZER = 20_000  # images whose captions a tokenizer is trained on


@dataclasses.dataclass(frozen=True)
class RunContext:
    """What is known before the first step; the same on every process."""

    config: ExperimentConfig
    workdir: Path
    mesh: Mesh
    source: Source
    tokenizer: Tokenizer | None
    task: Task


def open_run(config: ExperimentConfig, workdir: Path, held: ExitStack) -> RunContext:
    """Checks everything that can be checked beforehand, then claims the workdir, which stays locked until `held` is closed."""
    with distributed.together("preparing the run"):
        mesh = make_mesh(config.mesh)
        distributed.avoid_cached_collectives()
        cfg.validate_batch(config.train.batch_size, batch_shards(mesh), config.train.accumulate)
        _check_architecture(config)
    distributed.require_same("configuration", _shared_part(config))
    open_data = lambda: configured.train_source(config.data)
    # What process 0 has indexed the others read; sources without an index are opened by all at the same time.
    source = distributed.main_first("indexing the shards", open_data) if configured.keeps_index(config.data) else None
    with distributed.together("opening the data"):
        source = open_data() if source is None else source
        trained_on = configured.fingerprint(source)
        config = with_length(config, len(source))
        resumed, steered = files.has_checkpoint(workdir), {}
        if resumed:
            free = (*files.FREE_ON_RESUME, *files.STEERING)
            files.require_same_config(workdir, config, free)
            files.require_same_data(workdir, trained_on)
            regret.require_same(config, workdir)
            init_teacher.require_same(config, workdir)
            steered = files.steered(workdir, config)
            if (done := files.last_checkpoint(workdir)) > config.train.steps:
                raise cfg.ConfigError(
                    f"config.train.steps={config.train.steps}, but the run in {workdir} is at step {done}; ask for more steps"
                )
        rates = config.task == "complexity" and not regret.has_regret(config)
        rated = look_at(config, source) if rates else None
        counts = rated.class_counts if rated else (1, 1)
    distributed.require_same("set of training images (config.data.root)", json.dumps(trained_on, sort_keys=True))
    if rated is not None:
        distributed.require_same("set of rated images (config.data.ratings)", rated.content)
    token = distributed.from_main(secrets.randbits(30))
    tokenizer = None
    with distributed.together("claiming the workdir"):
        if distributed.is_main():
            tokenizer = _tokenizer(config, source, workdir if resumed else None)
            # What does not fit is found before anything is written.
            task = make_task(origin.recall(config, workdir), tokenizer, mesh, counts)
            require_matches(config.train.freeze, config.optim.rates, task.shapes)
            if starts_from_weights(config) and not resumed:
                initial_params(config, task, _quiet)  # what does not fit is named now; the values are read later
            given_params(config, task)  # what is damaged is named now
            if regret.has_regret(config):
                extra_negatives.require_enough(config, len(source))
            if config.train.eval_every:
                configured.validation_source(config)  # the same of a split that is not there
            abstract = abstract_state(task, optimizer_of(config), mesh, config)
            require_space(workdir, abstract, config.train.keep, 1 + config.train.keep_best)
            try:
                held.enter_context(files.locked(workdir))
                if files.has_checkpoint(workdir) != resumed:  # seen before it was locked, perhaps minutes ago
                    raise cfg.ConfigError(
                        f"--workdir={workdir}: another training wrote to it while this one began; start again"
                    )
                if resumed:
                    files.require_same_config(workdir, config, free)
                if steered:  # before config.json says so: a run that is killed in between notes it again
                    note_event(workdir, files.last_checkpoint(workdir), "config_changed", changed=steered)
                _claim_workdir(config, workdir, trained_on, tokenizer, rated, token)
            except OSError as error:
                raise cfg.ConfigError(f"--workdir={workdir} cannot be written: {error}; choose a writable folder") from error
    with distributed.together("reading the workdir"):
        if not distributed.is_main():
            files.require_token(workdir, token)
            tokenizer = _tokenizer(config, source, workdir)
            task = make_task(origin.recall(config, workdir), tokenizer, mesh, counts)
    if distributed.is_main():
        (workdir / files.TOKEN).unlink(missing_ok=True)
    for field, (then, now) in steered.items():
        say(f"Changed: {field} from {then!r} to {now!r}")
    for line in rated.lines if rated else ():
        say(line)
    return RunContext(config, workdir, mesh, source, tokenizer, task)


def with_length(config: ExperimentConfig, images: int) -> ExperimentConfig:
    """The config with steps, and steps between evaluations, where these are given in epochs."""
    t, epoch = config.train, images / config.train.batch_size
    steps = math.ceil(t.epochs * epoch) if t.epochs else t.steps
    every = max(1, round(epoch)) if t.eval_every < 0 else t.eval_every
    return dataclasses.replace(config, train=dataclasses.replace(t, steps=steps, eval_every=every))


def optimizer_of(config: ExperimentConfig) -> optax.GradientTransformation:
    return make_optimizer(config.optim, config.train.steps, frozen_trunk.frozen_groups(config))


def say(text: str) -> None:
    if distributed.is_main():
        print(text, flush=True)


def _check_architecture(config: ExperimentConfig) -> None:
    """An unknown variant, a misplaced exit or a bad size fails before any data is opened."""
    if config.task == "clip":
        variants.clip_arch(config.clip)
    else:
        variants.complexity_arch(config.complexity)


def _claim_workdir(
    config: ExperimentConfig,
    workdir: Path,
    trained_on: dict[str, Any],
    tokenizer: Tokenizer | None,
    rated: RatingsSummary | None,
    token: int,
) -> None:
    """Writes what the run is; called once everything that can be checked beforehand has been."""
    files.save_config(workdir, config)
    files.save_data(workdir, trained_on)
    origin.remember(config, workdir)
    if rated is not None:
        rated.write(workdir)
    regret.remember(config, workdir)
    if tokenizer is not None and config.task == "clip":
        files.write_text(workdir / checkpoint.TOKENIZER, tokenizer.to_json())
    if jax.process_count() > 1:
        files.write_token(workdir, token)
    files.recover(workdir)


def starts_from_weights(config: ExperimentConfig) -> bool:
    return bool(config.train.init) or frozen_trunk.has_tower(config)


def _quiet(text: str) -> None:
    pass


def initial_params(config: ExperimentConfig, task: Task, note: Callable[[str], None] = say) -> Mapping[str, Any]:
    """The weights of config.train.init, read when asked for, or the tower of config.complexity.clip under a fresh head.

    Raises ConfigError where they do not fit the task's model.
    """
    fresh = lambda: jax.device_get(task.init(jax.random.key(config.train.seed)))
    if frozen_trunk.has_tower(config):
        return frozen_trunk.params(config, task.shapes, fresh)
    note_preprocessing(config.train.init, task.kind, task.preprocess, note)
    return load_params(config.train.init, task.kind, task.arch, task.shapes, fresh, note, config.clip.exit_start)


def _tokenizer(config: ExperimentConfig, source: Source, written: Path | None) -> Tokenizer | None:
    if config.task == "clip":
        return tokenizer_of(config, source, written)
    return regret.tokenizer(config) if regret.has_regret(config) else None


def tokenizer_of(config: ExperimentConfig, source: Source, resumed: Path | None) -> Tokenizer:
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


def _shared_part(config: ExperimentConfig) -> str:
    """What all processes must agree on; where the data lies and who prepares it may differ between machines.

    What lies there is compared by its content.
    """
    values = dataclasses.asdict(config)
    for name in ("root", "ratings", "workers", "threads", "scenes_kept"):
        del values["data"][name]
    return json.dumps(values, sort_keys=True)

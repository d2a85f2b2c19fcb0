"""What a run started from, remembered in its workdir: a continued run does not need the first weights any more, unless they
are what it learns to say (regret, and config.loss.distill_init).

    WORKDIR/start/icar.json    description of the checkpoint that config.train.init or config.complexity.clip names
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from icar_jax import checkpoint
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.training import init_weights
from icar_jax.training.tasks import frozen_trunk, regret

START = "start"


def remember(config: ExperimentConfig, workdir: Path) -> None:
    """Writes WORKDIR/start where the run starts from weights, and not where it is continued. Raises OSError, ConfigError."""
    copy = described(workdir)
    if files.has_checkpoint(workdir) and copy.is_file():
        return
    if config.train.init:
        origin = init_weights.find(config.train.init, config.task)
    elif frozen_trunk.has_tower(config):
        origin = frozen_trunk.folder(config)
    else:
        return
    files.write_text(copy, (origin / checkpoint.DESCRIPTION).read_text(encoding="utf-8"))


def described(workdir: Path) -> Path:
    """The file that describes what the run in `workdir` started from."""
    return workdir / START / checkpoint.DESCRIPTION


def recall(config: ExperimentConfig, workdir: Path) -> ExperimentConfig:
    """The configuration, with WORKDIR/start for a checkpoint that is no longer where the run found it.

    Only the architecture is read from there: a run that has saved a state needs no other weights, unless it learns regret or
    aims at what the first ones say.
    """
    kept = workdir / START
    if not (files.has_checkpoint(workdir) and described(workdir).is_file()):
        return config
    train, complexity = config.train, config.complexity
    if train.init and not config.loss.distill_init and not Path(train.init).exists():
        train = dataclasses.replace(train, init=str(kept))
    if frozen_trunk.has_tower(config) and not regret.has_regret(config) and not Path(complexity.clip).exists():
        complexity = dataclasses.replace(complexity, clip=str(kept))
    return dataclasses.replace(config, train=train, complexity=complexity)

"""Selects the kind of run for a configuration."""

from __future__ import annotations

from icar_jax.config import ExperimentConfig, unknown
from icar_jax.training.tasks.clip import ClipRun
from icar_jax.training.tasks.kind import RunKind
from icar_jax.training.tasks.ratings import RatingsRun
from icar_jax.training.tasks.regret import RegretRun

KINDS: dict[str, type[RunKind]] = {"clip": ClipRun, "rating": RatingsRun, "regret": RegretRun}


def kind_of(config: ExperimentConfig) -> RunKind:
    """Returns the kind of run for config.task and config.complexity.target. Raises ConfigError for an unknown one."""
    name = "clip" if config.task == "clip" else config.complexity.target
    if config.task not in ("clip", "complexity") or name not in KINDS:
        raise unknown("config.task", config.task, ("clip", "complexity"))
    return KINDS[name](config)

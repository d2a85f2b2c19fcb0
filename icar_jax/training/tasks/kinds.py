"""Selects the kind of run for a configuration."""

from __future__ import annotations

from icar_jax.config import ExperimentConfig, unknown
from icar_jax.training.tasks.clip import ClipRun
from icar_jax.training.tasks.kind import RunKind
from icar_jax.training.tasks.ratings import RatingsRun
from icar_jax.training.tasks.regret import RegretRun

KINDS: dict[tuple[str, str], type[RunKind]] = {
    ("clip", "rating"): ClipRun,
    ("clip", "regret"): ClipRun,
    ("complexity", "rating"): RatingsRun,
    ("complexity", "regret"): RegretRun,
}


def kind_of(config: ExperimentConfig) -> RunKind:
    """Returns the kind of run for config.task and config.complexity.target. Raises ConfigError for an unknown one."""
    kind = KINDS.get((config.task, config.complexity.target))
    if kind is None:
        raise unknown("config.task", config.task, sorted({task for task, _ in KINDS}))
    return kind(config)

"""AdamW with parameter groups: towers, exit heads and temperatures each have their own rate."""

from __future__ import annotations

import re
from typing import Any

import jax.numpy as jnp
import optax

from icar_jax import pytree
from icar_jax.config import OptimConfig

GROUPS: tuple[tuple[str, str], ...] = (
    (r"(^|/)(exit_)?logit_(scale|bias)(/|$)", "temperature"),
    (r"(^|/)exits/", "exit"),
    (r"", "backbone"),
)


def group(path: str) -> str:
    """The parameter group of a path: temperature, exit or backbone."""
    return next(name for pattern, name in GROUPS if re.search(pattern, path))


def decays(path: str, ndim: int) -> bool:
    """Weight decay applies to matrices, convolutions and the token embedding; not to norms, biases, positions, temperatures."""
    return ndim >= 2 and not path.endswith("/pos")


def schedule(config: OptimConfig, steps: int):
    """Share of the peak rate at a step: linear warm-up from 0, then a cosine down to `final_lr` at the last step."""
    warmup = min(config.warmup_steps, steps)

    def share(step):
        rising = (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - warmup, 1), 0, 1)
        falling = config.final_lr + (1 - config.final_lr) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return share


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay, then the group's rate along the schedule."""
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    parts += [
        optax.scale_by_adam(config.b1, config.b2, config.eps),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: pytree.map_with_path(lambda path, leaf: decays(path, leaf.ndim), params),
        ),
        _scale_by_group(config, steps),
    ]
    return optax.chain(*parts)


def _scale_by_group(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    rates = {"backbone": config.lr, "exit": config.exit_lr, "temperature": config.temperature_lr}
    share = schedule(config, steps)

    def update(updates: Any, state: optax.ScaleByScheduleState, params: Any = None):
        now = share(state.count)
        scaled = pytree.map_with_path(lambda path, u: -rates[group(path)] * now * u, updates)
        return scaled, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)

"""Checks of what holds early exits to full depth: summed heads, distillation, the mixed gallery, layer dropout."""

import math

from icar_jax.config.errors import ConfigError
from icar_jax.config.schema import ExperimentConfig


def validate_levers(c: ExperimentConfig) -> None:
    """Raises ConfigError for a weight out of range and for fields that do not go together, naming both."""
    loss, dropout = c.loss, c.train.layer_dropout
    if c.clip.exit_sum and c.task == "clip" and not c.clip.exits:
        raise ConfigError("config.clip.exit_sum=True sums heads of exits, and config.clip.exits=() has none; leave it False")
    if c.clip.exit_sum and "image" in c.train.freeze:
        raise ConfigError(
            f"config.clip.exit_sum=True changes the embeddings of full depth as its exits learn, which config.train.freeze="
            f"{c.train.freeze} is to hold; leave it False"
        )
    for name in ("distill_cosine", "distill_kl", "distill_init", "mixed"):
        value = getattr(loss, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"config.loss.{name}={value} must be a weight of 0 or more; 0 switches it off")
        if name == "distill_init":
            if value and c.task == "clip" and not c.train.init:
                raise ConfigError(
                    f"config.loss.distill_init={value} aims at the embeddings of the weights that the run starts from, and "
                    "config.train.init='' names none; name a checkpoint, or leave it 0"
                )
            if value and "image" in c.train.freeze:
                raise ConfigError(
                    f"config.loss.distill_init={value} draws the image tower back to where it began, and config.train.freeze="
                    f"{c.train.freeze} holds it there; leave it 0, or let exits learn with config.loss.distill_cosine"
                )
        elif value and c.task == "clip" and not c.clip.exits:
            raise ConfigError(f"config.loss.{name}={value} is about early exits, and config.clip.exits=() has none; leave it 0")
    if not 0 <= dropout < 1:
        raise ConfigError(f"config.train.layer_dropout={dropout} must lie in [0, 1); 0 switches it off")
    if dropout and "image" in c.train.freeze:
        raise ConfigError(
            f"config.train.layer_dropout={dropout} only disturbs a tower that does not learn, and config.train.freeze="
            f"{c.train.freeze} holds it; leave it 0"
        )
    if loss.mixed and loss.direction != "symmetric":
        raise ConfigError(
            f"config.loss.mixed={loss.mixed} lets a text choose among images of different exits, which config.loss.direction="
            f"{loss.direction!r} leaves out; use 'symmetric'"
        )
    if loss.distill_kl and loss.kind == "sigmoid":
        raise ConfigError(
            f"config.loss.distill_kl={loss.distill_kl} compares softmaxes, and config.loss.kind='sigmoid' trains none; use "
            "config.loss.distill_cosine"
        )
    if loss.distill_kl and loss.chunk:
        raise ConfigError(
            f"config.loss.distill_kl={loss.distill_kl} forms all similarities at once, which config.loss.chunk={loss.chunk} "
            "avoids; use config.loss.distill_cosine, or config.loss.chunk=0"
        )

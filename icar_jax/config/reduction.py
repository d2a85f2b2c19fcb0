"""Checks the options of token reduction against each other."""

from icar_jax.config.schema import ExperimentConfig
from icar_jax.errors import ConfigError


def validate_reduction(c: ExperimentConfig) -> None:
    """Raises ConfigError where options of token reduction contradict each other; schedules are checked with the tower."""
    if c.task != "clip":
        return
    clip, loss = c.clip, c.loss
    if clip.reduce != "none" and clip.merge:
        raise ConfigError(
            f"config.clip.merge={clip.merge} and config.clip.reduce={clip.reduce!r} both remove tokens; leave one of them out"
        )
    if clip.reduce == "none":
        for name, off in (
            ("reduce_r", ()),
            ("reduce_to", 0.0),
            ("reduce_text", ()),
            ("reduce_routes", ()),
            ("reduce_after", 0),
        ):
            if (value := getattr(clip, name)) != off:
                raise ConfigError(
                    f"config.clip.{name}={value} needs a method: config.clip.reduce='none' removes no tokens; use 'tome', "
                    "'pitome', 'crossget' or 'drop'"
                )
    if clip.reduce_r and clip.reduce_to:
        raise ConfigError(
            f"config.clip.reduce_r={clip.reduce_r} and config.clip.reduce_to={clip.reduce_to} both set the schedule; use one"
        )
    if clip.reduce_text and clip.reduce != "crossget":
        raise ConfigError(
            f"config.clip.reduce_text={clip.reduce_text} is for config.clip.reduce='crossget' only, found {clip.reduce!r}"
        )
    if loss.cross and clip.reduce != "crossget":
        raise ConfigError(
            f"config.loss.cross={loss.cross} compares cross tokens, which only config.clip.reduce='crossget' has, found "
            f"{clip.reduce!r}; leave it 0"
        )
    if c.train.cache_frozen and (clip.reduce == "crossget" or clip.reduce_routes):
        found = "reduce='crossget'" if clip.reduce == "crossget" else f"reduce_routes={clip.reduce_routes}"
        raise ConfigError(
            f"config.train.cache_frozen=True keeps the outputs of a trunk that does not change, but they change with "
            f"config.clip.{found}; set it to False"
        )
    if loss.image_ids and (loss.kind != "softmax" or loss.chunk):
        found = f"config.loss.kind={loss.kind!r}" if loss.kind != "softmax" else f"config.loss.chunk={loss.chunk}"
        raise ConfigError(
            f"config.loss.image_ids=True spreads the softmax target of all logits at once, which {found} does not form; set "
            "config.loss.kind='softmax' and config.loss.chunk=0, or leave it False"
        )

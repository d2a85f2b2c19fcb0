"""What a CLIP is initialised from: a checkpoint (config.train.init), or two towers (config.train.init_image, init_text)."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from icar_jax import checkpoint
from icar_jax.checkpoint import Checkpoint, CheckpointError
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.convert import join
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.hub import download as hub

Start = str | os.PathLike | Checkpoint  # path of a checkpoint, bundle or workdir, or a checkpoint in memory

KINDS = {"clip": ("clip",), "complexity": ("complexity", "convnext")}


def start_of(config: ExperimentConfig) -> Start | None:
    """Returns the start of a run; None if its weights are drawn at random. Raises ConfigError for towers that cannot be joined.

    Two towers are joined once and kept in memory until `forget`.
    """
    train, clip = config.train, config.clip
    if not train.init_image:
        return train.init or None
    joint = join.Joint(
        clip.embed_dim or join.Joint.embed_dim,
        clip.head or join.Joint.head,
        clip.projection or join.Joint.projection,
        clip.projection_width,
        seed=train.seed,
        head_blocks=clip.head_blocks or join.Joint.head_blocks,
        text_head_blocks=clip.text_head_blocks or join.Joint.text_head_blocks,
    )
    return _joined(train.init_image, train.init_text, joint)


@functools.lru_cache(maxsize=1)
def _joined(image: str, text: str, joint: join.Joint) -> Checkpoint:
    try:
        return join.in_memory(image, text, joint)
    except (ConvertError, CheckpointError) as error:
        raise ConfigError(f"config.train.init_image={image} and config.train.init_text={text}: {error}") from error


forget = _joined.cache_clear  # frees the memory of joined towers


def find(path: str | os.PathLike, task: str) -> Path:
    """Returns the checkpoint folder to initialise `task` from: `path` itself, a workdir's model, or a part of a bundle.

    Raises ConfigError if there is none.
    """
    kinds = KINDS[task]
    try:
        path = hub.local(path)
        try:
            return checkpoint.find(path, kinds)
        except CheckpointError:
            if Path(path).is_dir() and (Path(path) / kinds[0] / checkpoint.DESCRIPTION).is_file():
                return checkpoint.find(Path(path) / kinds[0], kinds)
            raise
    except (CheckpointError, ConvertError) as error:
        raise init_error(path, error) from error


def describe(start: Start, task: str) -> dict:
    """Returns the description of a start. Raises ConfigError if it cannot be read."""
    if isinstance(start, Checkpoint):
        return start.description
    try:
        return checkpoint.describe(find(start, task))
    except CheckpointError as error:
        raise init_error(start, error) from error


def load_tokenizer(start: Start) -> str | None:
    """Returns the text of tokenizer.json of a CLIP, None if it has none. Raises ConfigError."""
    if isinstance(start, Checkpoint):
        return start.tokenizer
    try:
        return checkpoint.read_tokenizer(find(start, "clip"))
    except CheckpointError as error:
        raise init_error(start, error) from error


def named(start: Start) -> str:
    """Returns how messages name a start, as the setting and its value."""
    if isinstance(start, Checkpoint):
        return f"config.train.init_image and init_text ({start.path})"
    return f"config.train.init={os.fspath(start)}"


def init_error(start: Start, error: object) -> ConfigError:
    """Returns the error about a start that cannot be used."""
    return ConfigError(f"{named(start)}: {error}")

"""Typed configuration of an experiment, and the checks that run before anything else.

A file in configs/ returns an `ExperimentConfig`; `--config.optim.lr=1e-4` overrides single fields afterwards. Because
overrides happen after construction, the checks live in `validate`, which names the field, the value and the fix.

Annotations here must stay real types (no `from __future__ import annotations`): the flags read them to parse overrides.
"""

import dataclasses
import difflib
import json
import typing
from dataclasses import dataclass, field
from typing import Any

TASKS = ("clip", "complexity")
MIN_VOCABULARY = 259  # of a byte-level tokenizer: 256 bytes, pad, start and end
SOURCES = ("scenes", "folder")


class ConfigError(ValueError):
    """A field of the configuration cannot be used; the message names the field, the value and the fix."""


@dataclass
class ClipConfig:
    """The CLIP model that is trained when task is 'clip'."""

    variant: str = "vit_b32"  # named architecture of models/registry.py
    exits: tuple[int, ...] = ()  # early exits as executed blocks, ascending, each below the tower's depth
    pool: str = "cls"  # token pooled at the exits: cls | mean | first_patch
    exit_start: str = "final"  # exit heads start from ln_post and proj ('final') or at random ('random')
    temperature: str = "own"  # each exit has its 'own' logit scale, or all use the 'shared' one
    image_size: int = 0  # pixels; 0 keeps the variant's
    patch_size: int = 0  # pixels; 0 keeps the variant's
    context_length: int = 0  # tokens; 0 keeps the variant's


@dataclass
class ComplexityConfig:
    """The complexity model that is trained when task is 'complexity'."""

    variant: str = "convnextv2_nano"  # named ConvNeXt of models/registry.py
    head: str = "regression"  # regression (score in [0, 1]) | classification (probability of 'complex')
    image_size: int = 224  # pixels, squashed
    dropout: float = 0.2  # of the regression head, while training
    threshold: float = 0.5  # classification: a rated complexity above this is the class 'complex'


@dataclass
class DataConfig:
    """Where examples come from and how pictures and captions are prepared."""

    source: str = "scenes"  # scenes | folder (images with dataset*.json, captions.csv or captions.jsonl)
    root: str = ""  # folder of the data; unused by scenes
    train_split: str = "train"
    calibration_size: int = 1000  # images cut from the training split; thresholds come from these alone
    scenes_size: int = 200_000  # scenes: pictures in the training split
    scenes_pixels: int = 64  # scenes: side they are drawn at, 32 to 512
    resize: str = "squash"  # squash | crop (shortest side, then centre)
    interpolation: str = "bicubic"  # bicubic | bilinear, both antialiased
    normalise: str = "half"  # mean and std of the pixels: half | openai | imagenet
    crop_scale: float = 1.0  # training: smallest share of the picture kept by a random crop; 1 means no crop
    flip: bool = False  # training: random horizontal flip (wrong for captions with left and right)
    tokenizer: str = ""  # tokenizer.json or CLIP merges file; empty trains one on the captions
    vocabulary: int = 4096  # size of a tokenizer trained here
    workers: int = 0  # worker processes that prepare batches; 0 uses threads of this process
    threads: int = 2  # threads that prepare batches, in each process


@dataclass
class OptimConfig:
    """AdamW with one learning rate for each parameter group."""

    lr: float = 1e-3  # towers
    exit_lr: float = 1e-3  # exit heads
    temperature_lr: float = 1e-3  # logit scales (never decayed)
    weight_decay: float = 0.05  # matrices and embeddings only
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    clip_norm: float = 1.0  # global gradient norm; 0 switches clipping off
    warmup_steps: int = 100  # linear
    final_lr: float = 0.0  # the cosine ends at this share of the peak


@dataclass
class LossConfig:
    """The contrastive loss at every exit and at full depth."""

    exit_weights: tuple[float, ...] = ()  # one weight for each exit, then full depth; empty weighs all equally
    direction: str = "symmetric"  # symmetric | image_to_text


@dataclass
class TrainConfig:
    """Length, batch, precision and bookkeeping of a run."""

    steps: int = 1000
    batch_size: int = 128  # pairs over all devices
    seed: int = 0
    dtype: str = "bfloat16"  # of activations: bfloat16 | float32; parameters and sums stay float32
    log_every: int = 20  # steps
    checkpoint_every: int = 500  # steps; the last step is always saved
    keep: int = 2  # checkpoints kept
    tensorboard: bool = False  # also write TensorBoard events (needs the [tensorboard] extra)


@dataclass
class MeshConfig:
    """Devices along each axis; one axis may be -1, which takes the remaining devices."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclass
class EvalConfig:
    """What evaluate.py does with a trained model."""

    split: str = "val"  # scenes: val | test | relations | heldout; else a split of the folder
    size: int = 500  # scenes: pictures in the gallery
    complexity: str = ""  # complexity checkpoint or workdir that routes a plain CLIP; empty evaluates without
    early_share: tuple[float, ...] = ()  # share of calibration images for each early exit; empty: equal for all exits
    batch_size: int = 64  # images in a full batch of the router
    dtype: str = "float32"  # of activations: bfloat16 | float32
    bootstrap: int = 2000  # resamples of images behind each interval
    random_draws: int = 100  # random assignments averaged into the run 'random'


@dataclass
class ExperimentConfig:
    """Everything that train.py and evaluate.py need to know."""

    task: str = "clip"  # clip | complexity
    clip: ClipConfig = field(default_factory=ClipConfig)
    complexity: ComplexityConfig = field(default_factory=ComplexityConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def unknown(name: str, value: Any, choices: typing.Iterable[str]) -> ConfigError:
    """The error for a value outside a fixed list of names, with the nearest name where one is near."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}{hint}")


def _no_field(group: str, name: str, fields: typing.Iterable[str]) -> ConfigError:
    fields = sorted(fields)
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {group}.{near[0]}? " if near else ""
    return ConfigError(f"{group}.{name} is no field of the configuration; {hint}{group} has {', '.join(fields)}")


def _check_types(node: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        name, value, want = f"{prefix}.{f.name}", getattr(node, f.name), hints[f.name]
        if dataclasses.is_dataclass(want):
            if not isinstance(value, want):
                raise ConfigError(f"{name} must be a {want.__name__}, found {type(value).__name__}")
            _check_types(value, name)
        elif typing.get_origin(want) is tuple:
            inner = typing.get_args(want)[0]
            if not isinstance(value, (tuple, list)) or not all(_is(v, inner) for v in value):
                example = "(3,)" if inner is int else "(0.5,)"
                raise ConfigError(f"{name}={value!r} must be a tuple of {inner.__name__}, for example {example}")
            setattr(node, f.name, tuple(inner(v) for v in value))
        elif not _is(value, want):
            raise ConfigError(f"{name}={value!r} must be of type {want.__name__}, found {type(value).__name__}")


def _is(value: Any, want: type) -> bool:
    if isinstance(value, bool):
        return want is bool
    return isinstance(value, (int, float) if want is float else want)


def _choice(name: str, value: str, choices: typing.Iterable[str]) -> None:
    if value not in choices:
        raise unknown(name, value, choices)


def _at_least(name: str, value: float, low: float, fix: str) -> None:
    if not value >= low:
        raise ConfigError(f"{name}={value} must be at least {low}; {fix}")


def validate(config: ExperimentConfig) -> ExperimentConfig:
    """Checks types, names and ranges; returns the config with lists made tuples. Raises ConfigError.

    What needs the architecture (depth) or the devices (mesh) is checked by `validate_depth` and `validate_batch`.
    """
    _check_types(config, "config")
    c = config
    _choice("config.task", c.task, TASKS)
    _choice("config.data.source", c.data.source, SOURCES)
    _choice("config.data.resize", c.data.resize, ("squash", "crop"))
    _choice("config.data.interpolation", c.data.interpolation, ("bicubic", "bilinear"))
    _choice("config.data.normalise", c.data.normalise, ("half", "openai", "imagenet"))
    _choice("config.clip.pool", c.clip.pool, ("cls", "mean", "first_patch"))
    _choice("config.clip.exit_start", c.clip.exit_start, ("final", "random"))
    _choice("config.clip.temperature", c.clip.temperature, ("own", "shared"))
    _choice("config.complexity.head", c.complexity.head, ("regression", "classification"))
    _choice("config.loss.direction", c.loss.direction, ("symmetric", "image_to_text"))
    for name in ("train", "eval"):
        _choice(f"config.{name}.dtype", getattr(c, name).dtype, ("bfloat16", "float32"))
    if c.data.source != "scenes" and not c.data.root:
        raise ConfigError(
            f"config.data.root='' but config.data.source={c.data.source!r} reads a folder; "
            "pass --config.data.root=PATH/TO/THE/FOLDER"
        )
    if c.task == "complexity" and c.data.source != "scenes":
        raise ConfigError(
            f"config.data.source={c.data.source!r} holds no complexity ratings; train the complexity model on 'scenes'"
        )
    if c.task == "complexity" and c.data.resize != "squash":
        raise ConfigError(f"config.data.resize={c.data.resize!r}: the complexity model sees whole images; use 'squash'")
    if list(c.clip.exits) != sorted(set(c.clip.exits)) or any(e < 1 for e in c.clip.exits):
        fixed = tuple(sorted({e for e in c.clip.exits if e >= 1}))
        raise ConfigError(f"config.clip.exits={c.clip.exits} must be ascending block counts from 1; write {fixed}")
    for name, low in (("seed", 0), ("steps", 1), ("batch_size", 2), ("log_every", 1), ("checkpoint_every", 1), ("keep", 1)):
        _at_least(f"config.train.{name}", getattr(c.train, name), low, "raise it")
    for name in ("lr", "exit_lr", "temperature_lr", "weight_decay", "clip_norm", "warmup_steps", "eps", "final_lr"):
        _at_least(f"config.optim.{name}", getattr(c.optim, name), 0, "use zero or a positive number")
    for name in ("b1", "b2"):
        if not 0 <= getattr(c.optim, name) < 1:
            raise ConfigError(f"config.optim.{name}={getattr(c.optim, name)} must lie in [0, 1), for example 0.9")
    if not 0 < c.data.crop_scale <= 1:
        raise ConfigError(f"config.data.crop_scale={c.data.crop_scale} must lie in (0, 1]; 1 switches cropping off")
    for name in ("calibration_size", "scenes_size", "threads"):
        _at_least(f"config.data.{name}", getattr(c.data, name), 1, "raise it")
    for name in ("image_size", "patch_size"):
        _at_least(f"config.clip.{name}", getattr(c.clip, name), 0, "0 keeps the variant's")
    if not 32 <= c.data.scenes_pixels <= 512:
        raise ConfigError(f"config.data.scenes_pixels={c.data.scenes_pixels} must lie in 32 to 512")
    if c.task == "clip" and not c.data.tokenizer:
        _at_least("config.data.vocabulary", c.data.vocabulary, MIN_VOCABULARY, "256 bytes and 3 special tokens come first")
    _at_least("config.data.workers", c.data.workers, 0, "0 uses threads of this process")
    for name in ("size", "batch_size", "bootstrap", "random_draws"):
        _at_least(f"config.eval.{name}", getattr(c.eval, name), 1, "raise it")
    if c.task == "clip":
        _validate_shares(c)
    weights = c.loss.exit_weights
    if weights and len(weights) != len(c.clip.exits) + 1:
        raise ConfigError(
            f"config.loss.exit_weights={weights} has {len(weights)} entries; "
            f"{len(c.clip.exits)} exits and full depth need {len(c.clip.exits) + 1}"
        )
    if any(w < 0 for w in weights) or (weights and sum(weights) == 0):
        raise ConfigError(f"config.loss.exit_weights={weights} must be non-negative with a positive sum")
    return config


def _validate_shares(c: ExperimentConfig) -> None:
    shares = c.eval.early_share
    if shares and len(shares) != len(c.clip.exits):
        raise ConfigError(
            f"config.eval.early_share={shares} must hold one share for each of the exits {c.clip.exits}; "
            "the rest goes to full depth; leave it empty for equal shares"
        )
    if any(not 0 <= s <= 1 for s in shares) or sum(shares) > 1:
        raise ConfigError(f"config.eval.early_share={shares} must be shares in [0, 1] that sum to at most 1")


def validate_depth(exits: tuple[int, ...], depth: int, name: str = "config.clip.exits") -> None:
    """Raises ConfigError where an exit lies at or beyond the tower's depth (full depth is always there)."""
    beyond = [e for e in exits if e >= depth]
    if beyond:
        raise ConfigError(
            f"{name}={tuple(exits)}: {beyond} not below the tower's depth of {depth} blocks; "
            f"use exits from 1 to {depth - 1} (full depth is always an exit)"
        )


def validate_batch(batch_size: int, shards: int) -> None:
    """Raises ConfigError where the global batch does not divide over the mesh's data and fsdp axes."""
    if batch_size % shards:
        down, up = batch_size // shards * shards, -(-batch_size // shards) * shards
        near = f"{down} or {up}" if down else f"{up}"
        raise ConfigError(
            f"config.train.batch_size={batch_size} does not divide over {shards} devices of the mesh axes data x fsdp; "
            f"use {near}"
        )


def check_override(path: str, cls: type = ExperimentConfig) -> None:
    """Raises ConfigError where `config.a.b` names no field of the configuration, with the nearest field that exists."""
    node, seen = cls, []
    for part in path.split(".")[1:]:
        if not dataclasses.is_dataclass(node):
            raise ConfigError(f"{path} goes below the field {'.'.join(['config', *seen])}, which has none of its own")
        hints = typing.get_type_hints(node)
        if part not in hints:
            raise _no_field(".".join(["config", *seen]), part, hints)
        node = hints[part]
        seen.append(part)
    if dataclasses.is_dataclass(node):
        raise ConfigError(f"{path} is a group of fields; override one of {', '.join(typing.get_type_hints(node))}")


def to_json(config: ExperimentConfig) -> str:
    """The whole configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_dict(values: dict[str, Any], cls: type = ExperimentConfig, prefix: str = "config") -> Any:
    """The inverse of `dataclasses.asdict`; an unknown field raises ConfigError with the nearest known name."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise _no_field(prefix, key, known)
    made = {}
    for key, value in values.items():
        want = hints[key]
        if dataclasses.is_dataclass(want):
            value = from_dict(value, want, f"{prefix}.{key}")
        elif typing.get_origin(want) is tuple:
            value = tuple(value)
        made[key] = value
    return cls(**made)

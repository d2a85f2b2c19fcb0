"""What a configuration must satisfy, checked after the flags and before anything else."""

import dataclasses
import math
import re
import typing
from typing import Any

from icar_jax.config.addresses import require_local
from icar_jax.config.errors import ConfigError, unknown
from icar_jax.config.levers import validate_levers
from icar_jax.config.schema import FREEZE, MIN_VOCABULARY, REMAT, SOURCES, TASKS, DataConfig, ExperimentConfig


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


def _require_paths(c: ExperimentConfig) -> None:
    """Every field that names a file or a folder."""
    d, complexity, far = c.data, c.complexity, c.eval.distractors
    paths = {
        "data.root": d.root, "data.ratings": d.ratings, "data.scenes_kept": d.scenes_kept, "data.tokenizer": d.tokenizer,
        "complexity.clip": complexity.clip, "train.init": c.train.init, "eval.complexity": c.eval.complexity,
        "eval.static": c.eval.static, "eval.labels": c.eval.labels, "eval.distractors.root": far.root,
        "eval.distractors.labels": far.labels,
    }  # fmt: skip
    for name, value in paths.items():
        require_local(f"config.{name}", value)


def validate(config: ExperimentConfig) -> ExperimentConfig:
    """Checks types, names and ranges; returns the config with lists made tuples. Raises ConfigError.

    What needs the architecture (depth) or the devices (mesh) is checked by `validate_depth` and `validate_batch`.
    """
    _check_types(config, "config")
    c = config
    _require_paths(c)
    _choice("config.task", c.task, TASKS)
    _choice("config.data.source", c.data.source, SOURCES)
    _choice("config.data.resize", c.data.resize, ("squash", "crop"))
    _choice("config.data.interpolation", c.data.interpolation, ("bicubic", "bilinear"))
    _choice("config.data.normalise", c.data.normalise, ("half", "openai", "imagenet"))
    _choice("config.clip.pool", c.clip.pool, ("cls", "mean", "first_patch"))
    _choice("config.clip.exit_start", c.clip.exit_start, ("final", "random"))
    _choice("config.clip.exit_head", c.clip.exit_head, ("linear", "adapter", "attention"))
    _choice("config.clip.temperature", c.clip.temperature, ("own", "shared"))
    _choice("config.complexity.head", c.complexity.head, ("regression", "classification"))
    _choice("config.complexity.class_weights", c.complexity.class_weights, ("none", "balanced"))
    _choice("config.complexity.target", c.complexity.target, ("rating", "regret"))
    _choice("config.complexity.regret", c.complexity.regret, ("loss", "kl", "cosine"))
    _choice("config.complexity.pooled_norm", c.complexity.pooled_norm, ("whole", "parts"))
    _choice("config.eval.score_calibration", c.eval.score_calibration, ("none", "affine"))
    _choice("config.loss.direction", c.loss.direction, ("symmetric", "image_to_text"))
    _choice("config.loss.kind", c.loss.kind, ("softmax", "sigmoid"))
    _choice("config.optim.kind", c.optim.kind, ("adamw", "muon"))
    _choice("config.optim.mu_dtype", c.optim.mu_dtype, ("bfloat16", "float32"))
    _choice("config.train.remat", c.train.remat, REMAT)
    for entry in c.train.freeze:
        if entry not in FREEZE:
            _regex("config.train.freeze", entry, f"a group ({', '.join(FREEZE)}) or ")
    for entry in c.optim.rates:
        parse_rate(entry)
    for name in ("train", "eval"):
        _choice(f"config.{name}.dtype", getattr(c, name).dtype, ("bfloat16", "float32"))
    _validate_ratings(c)
    if c.data.source != "scenes" and not c.data.root:
        raise ConfigError(
            f"config.data.root='' but config.data.source={c.data.source!r} reads a folder; "
            "pass --config.data.root=PATH/TO/THE/FOLDER"
        )
    _validate_augmentation(c.data)
    if list(c.clip.exits) != sorted(set(c.clip.exits)) or any(e < 1 for e in c.clip.exits):
        fixed = tuple(sorted({e for e in c.clip.exits if e >= 1}))
        raise ConfigError(f"config.clip.exits={c.clip.exits} must be ascending block counts from 1; write {fixed}")
    lows = {"seed": 0, "steps": 1, "batch_size": 2, "log_every": 1, "checkpoint_every": 1, "keep": 1, "accumulate": 1}
    for name, low in lows.items():
        _at_least(f"config.train.{name}", getattr(c.train, name), low, "raise it")
    _at_least("config.train.eval_every", c.train.eval_every, -1, "0 evaluates only with evaluate.py, -1 once an epoch")
    _at_least("config.train.epochs", c.train.epochs, 0, "0 trains for config.train.steps")
    _at_least("config.train.patience", c.train.patience, 0, "0 runs all steps")
    _at_least("config.loss.chunk", c.loss.chunk, 0, "0 forms all logits at once")
    _at_least("config.data.retries", c.data.retries, 0, "0 stops at the first fault")
    if not 0 < c.data.stall_timeout_s < math.inf:
        raise ConfigError(
            f"config.data.stall_timeout_s={c.data.stall_timeout_s} must be a positive number of seconds; 86400 waits for a day"
        )
    _validate_training(c)
    validate_levers(c)
    for name in ("lr", "exit_lr", "temperature_lr", "weight_decay", "clip_norm", "warmup_steps", "eps", "final_lr"):
        _at_least(f"config.optim.{name}", getattr(c.optim, name), 0, "use zero or a positive number")
    for name in ("b1", "b2", "ema"):
        if not 0 <= getattr(c.optim, name) < 1:
            raise ConfigError(f"config.optim.{name}={getattr(c.optim, name)} must lie in [0, 1), for example 0.9")
    for name in ("calibration_size", "scenes_size", "threads"):
        _at_least(f"config.data.{name}", getattr(c.data, name), 1, "raise it")
    for name in ("depth", "image_size", "patch_size"):
        _at_least(f"config.clip.{name}", getattr(c.clip, name), 0, "0 keeps the variant's")
    if c.data.scenes_kept and c.data.source != "scenes":
        raise ConfigError(
            f"config.data.scenes_kept={c.data.scenes_kept!r} but config.data.source={c.data.source!r}; only "
            "drawn scenes are kept, so leave it empty"
        )
    if not 32 <= c.data.scenes_pixels <= 512:
        raise ConfigError(f"config.data.scenes_pixels={c.data.scenes_pixels} must lie in 32 to 512")
    if c.task == "clip" and not c.data.tokenizer:
        _at_least("config.data.vocabulary", c.data.vocabulary, MIN_VOCABULARY, "256 bytes and 3 special tokens come first")
    _at_least("config.data.workers", c.data.workers, 0, "0 uses threads of this process")
    for name in ("size", "batch_size", "bootstrap", "random_draws"):
        _at_least(f"config.eval.{name}", getattr(c.eval, name), 1, "raise it")
    _validate_distractors(c)
    if c.task == "clip":
        _validate_shares(c)
    _validate_budgets(c)
    weights = c.loss.exit_weights
    if weights and len(weights) != len(c.clip.exits) + 1:
        raise ConfigError(
            f"config.loss.exit_weights={weights} has {len(weights)} entries; "
            f"{len(c.clip.exits)} exits and full depth need {len(c.clip.exits) + 1}"
        )
    if any(w < 0 for w in weights) or (weights and sum(weights) == 0):
        raise ConfigError(f"config.loss.exit_weights={weights} must be non-negative with a positive sum")
    return config


def _regex(field: str, entry: str, more: str = "") -> None:
    try:
        re.compile(entry)
    except re.error as error:
        raise ConfigError(f"{field}={entry!r} must be {more}a regular expression for paths of parameters: {error}") from error


def parse_rate(entry: str) -> tuple[str, float]:
    """'vision/blocks/=0.1' -> ('vision/blocks/', 0.1). Raises ConfigError."""
    pattern, _, share = entry.rpartition("=")
    _regex("config.optim.rates", pattern)
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not pattern or not 0 <= value < float("inf"):
        raise ConfigError(
            f"config.optim.rates={entry!r} must read REGEX=SHARE with a share of at least 0: 'vision/blocks/=0.1'"
        )
    return pattern, value


def _validate_training(c: ExperimentConfig) -> None:
    """Options of the training run that do not go together."""
    t = c.train
    if t.batch_size % t.accumulate:
        raise ConfigError(
            f"config.train.accumulate={t.accumulate} does not divide config.train.batch_size={t.batch_size}; choose a divisor"
        )
    if set(t.freeze) >= set(FREEZE):
        raise ConfigError(f"config.train.freeze={t.freeze} leaves nothing to train; take one of its groups out")
    if t.keep_best and not t.eval_every:
        raise ConfigError("config.train.keep_best=True needs evaluations: set config.train.eval_every to a number of steps")
    if t.patience and not t.eval_every:
        raise ConfigError(
            f"config.train.patience={t.patience} counts evaluations: set config.train.eval_every to a number of steps, or -1"
        )
    evaluated = "config.train.eval_split" if t.eval_split else "config.eval.split"
    split = t.eval_split or c.eval.split
    if t.eval_every and (shared := {*split.split("+")} & {*c.data.train_split.split("+")}):
        raise ConfigError(
            f"{evaluated}={split!r} is not held out: {', '.join(sorted(shared))} is used for training, and "
            f"config.train.eval_every={t.eval_every} evaluates on it; choose another split"
        )
    if c.loss.kind == "sigmoid" and c.loss.direction != "symmetric":
        raise ConfigError(
            f"config.loss.direction={c.loss.direction!r} has no meaning with config.loss.kind='sigmoid'; leave it 'symmetric'"
        )
    if c.task == "complexity" and c.complexity.variant == "blocks" and t.init:
        raise ConfigError(
            f"config.train.init={t.init!r}: with config.complexity.variant='blocks' the tower's weights come from "
            "config.complexity.clip, and the head starts at random; leave it empty"
        )
    if c.task == "complexity":
        for name, value, off in (
            ("train.accumulate", t.accumulate, 1), ("train.freeze", t.freeze, ()),
            ("train.scan_blocks", t.scan_blocks, False), ("train.remat", t.remat, "none"), ("loss.chunk", c.loss.chunk, 0),
            ("train.layer_dropout", t.layer_dropout, 0.0), ("loss.distill_cosine", c.loss.distill_cosine, 0.0),
            ("loss.distill_kl", c.loss.distill_kl, 0.0), ("loss.distill_init", c.loss.distill_init, 0.0),
            ("loss.mixed", c.loss.mixed, 0.0),
        ):  # fmt: skip
            if value != off:
                raise ConfigError(f"config.{name}={value!r} is for task 'clip' only; leave it {off!r}")
    if c.data.source == "tfds" and not c.data.dataset:
        raise ConfigError("config.data.dataset='' but config.data.source='tfds'; name the dataset, such as coco_captions")


def _validate_distractors(c: ExperimentConfig) -> None:
    d, name = c.eval.distractors, "config.eval.distractors"
    if not d.source:
        for other in ("root", "split", "size", "labels"):
            if getattr(d, other):
                found = f"{name}.{other}={getattr(d, other)!r}"
                raise ConfigError(f"{found} but {name}.source=''; name the source, such as 'folder'")
        return
    _choice(f"{name}.source", d.source, ("scenes", "folder", "webdataset", "parquet"))
    _at_least(f"{name}.size", d.size, 0, "0 takes all")
    if d.source == "scenes" and not (d.split and d.size):
        raise ConfigError(
            f"{name}.split={d.split!r} and {name}.size={d.size}: distractors from scenes need both, such as "
            f"--{name}.split=test --{name}.size=5000"
        )
    if d.source != "scenes" and not d.root:
        raise ConfigError(f"{name}.root='' but {name}.source={d.source!r} reads files; pass --{name}.root=PATH")


def _validate_ratings(c: ExperimentConfig) -> None:
    """Where the ratings of a complexity run come from, and what is made of them."""
    d, rated = c.data, ("scenes", "ratings", "webdataset", "parquet")
    if not 0 <= d.bad_share <= 1:
        raise ConfigError(f"config.data.bad_share={d.bad_share} must be a share in [0, 1]; 0.01 allows one line in a hundred")
    if c.task != "complexity":
        wrong = f"ratings={d.ratings!r}" if d.ratings else "source='ratings'" if d.source == "ratings" else ""
        if wrong:
            raise ConfigError(f"config.data.{wrong} is for task 'complexity' only, and config.task is {c.task!r}")
        return
    if d.resize != "squash":
        raise ConfigError(f"config.data.resize={d.resize!r}: the complexity model sees whole images; use 'squash'")
    if c.complexity.target == "regret":
        _validate_regret(c)
        return
    for name in ("exit", "rivals"):
        if value := getattr(c.complexity, name):
            raise ConfigError(f"config.complexity.{name}={value} is for config.complexity.target='regret'; leave it 0")
    if d.source not in rated:
        raise ConfigError(
            f"config.data.source={d.source!r} holds no complexity ratings; use 'scenes', or 'ratings' with "
            "config.data.root=IMAGES and config.data.ratings=FILE"
        )
    if d.source in ("webdataset", "parquet") and not d.ratings:
        raise ConfigError(
            f"config.data.ratings='' but config.data.source={d.source!r} holds no complexity ratings itself; give a CSV or "
            "Parquet file with the columns url and score: --config.data.ratings=FILE"
        )
    if d.source == "scenes" and d.ratings:
        raise ConfigError(f"config.data.ratings={d.ratings!r}, but scenes know theirs; use config.data.source=ratings")
    if not 0 <= c.complexity.threshold < 1:
        raise ConfigError(
            f"config.complexity.threshold={c.complexity.threshold} must lie in [0, 1): an image rated above it is complex, and "
            "ratings lie in [0, 1]"
        )
    if c.complexity.class_weights != "none" and c.complexity.head != "classification":
        raise ConfigError(
            f"config.complexity.class_weights={c.complexity.class_weights!r} weighs classes, but config.complexity.head is "
            f"{c.complexity.head!r}; leave it 'none', or use the head 'classification'"
        )


def _validate_regret(c: ExperimentConfig) -> None:
    """A complexity run whose targets come from a CLIP, on pairs of image and text instead of ratings."""
    d, complexity = c.data, c.complexity
    if not complexity.clip:
        raise ConfigError(
            "config.complexity.clip='' but config.complexity.target='regret' is what images lose at the exit of a CLIP; name "
            "its checkpoint or workdir"
        )
    if complexity.exit < 0:
        raise ConfigError(f"config.complexity.exit={complexity.exit} must be an exit of config.complexity.clip, or 0")
    if complexity.rivals < 0 or (complexity.rivals and complexity.regret == "cosine"):
        raise ConfigError(
            f"config.complexity.rivals={complexity.rivals} must be 0, or a number of training pairs for "
            f"config.complexity.regret='loss' or 'kl' (found {complexity.regret!r})"
        )
    if d.source == "ratings" or d.ratings:
        found = f"ratings={d.ratings!r}" if d.ratings else "source='ratings'"
        raise ConfigError(
            f"config.data.{found}, but config.complexity.target='regret' learns from images with captions, not from ratings; "
            "use the data of the CLIP, such as 'scenes' or 'folder'"
        )
    for name, off in (("head", "regression"), ("class_weights", "none")):
        if getattr(complexity, name) != off:
            raise ConfigError(
                f"config.complexity.{name}={getattr(complexity, name)!r}, but config.complexity.target='regret' has no "
                f"classes; use {off!r}"
            )


def _validate_augmentation(d: DataConfig) -> None:
    if not 0 < d.crop_scale <= 1:
        raise ConfigError(f"config.data.crop_scale={d.crop_scale} must lie in (0, 1]; 1 switches cropping off")
    highest = {"rotate": 180, "translate": 1, "brightness": 1, "contrast": 1, "saturation": 1}
    for name, high in highest.items():
        if not 0 <= getattr(d, name) <= high:
            raise ConfigError(f"config.data.{name}={getattr(d, name)} must lie in [0, {high}]; 0 switches it off")


def _validate_shares(c: ExperimentConfig) -> None:
    shares = c.eval.early_share
    if shares and len(shares) != len(c.clip.exits):
        raise ConfigError(
            f"config.eval.early_share={shares} must hold one share for each of the exits {c.clip.exits}; "
            "the rest goes to full depth; leave it empty for equal shares"
        )
    if any(not 0 <= s <= 1 for s in shares) or sum(shares) > 1:
        raise ConfigError(f"config.eval.early_share={shares} must be shares in [0, 1] that sum to at most 1")


def _validate_budgets(c: ExperimentConfig) -> None:
    budgets = c.eval.budgets
    if any(not 0 < b <= 1 for b in budgets) or len(set(budgets)) < len(budgets):
        raise ConfigError(
            f"config.eval.budgets={budgets} must be different shares in (0, 1] of what full depth costs, such as (0.6, 0.8)"
        )


def validate_depth(exits: tuple[int, ...], depth: int, name: str = "config.clip.exits") -> None:
    """Raises ConfigError where an exit lies at or beyond the tower's depth (full depth is always there)."""
    beyond = [e for e in exits if e >= depth]
    if beyond:
        raise ConfigError(
            f"{name}={tuple(exits)}: {beyond} not below the tower's depth of {depth} blocks; "
            f"use exits from 1 to {depth - 1} (full depth is always an exit)"
        )


def validate_batch(batch_size: int, shards: int, accumulate: int = 1) -> None:
    """Raises ConfigError where the global batch does not divide over the mesh's data and fsdp axes, and over the parts."""
    if batch_size % shards == 0 and batch_size % (shards * accumulate):
        raise ConfigError(
            f"config.train.batch_size={batch_size} does not divide over {shards} devices and "
            f"config.train.accumulate={accumulate} parts; use a multiple of {shards * accumulate}"
        )
    if batch_size % shards:
        down, up = batch_size // shards * shards, -(-batch_size // shards) * shards
        near = f"{down} or {up}" if down else f"{up}"
        raise ConfigError(
            f"config.train.batch_size={batch_size} does not divide over {shards} devices of the mesh axes data x fsdp; "
            f"use {near}"
        )

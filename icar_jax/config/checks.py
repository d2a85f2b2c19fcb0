"""Checks a configuration after the flags and before anything else: types, the rule of each field, and fields against others."""

import dataclasses
import typing
from typing import Any

from icar_jax.config import choices
from icar_jax.config.reduction import validate_reduction
from icar_jax.config.rules import RULE, TASK, AtLeast, OneOf
from icar_jax.config.schema import MIN_VOCABULARY, ExperimentConfig
from icar_jax.config.values import require_finite, typed
from icar_jax.errors import ConfigError


def _check_types(node: Any, prefix: str) -> None:
    hints = typing.get_type_hints(type(node))
    for f in dataclasses.fields(node):
        name, value = f"{prefix}.{f.name}", getattr(node, f.name)
        setattr(node, f.name, typed(name, value, hints[f.name]))
        if dataclasses.is_dataclass(value):
            _check_types(value, name)


def _check_fields(node: Any, prefix: str, task: str) -> None:
    """The rule of every field, and that fields of another task keep their defaults."""
    for f in dataclasses.fields(node):
        name, value = f"{prefix}.{f.name}", getattr(node, f.name)
        if dataclasses.is_dataclass(value):
            _check_fields(value, name, task)
            continue
        rule, belongs_to = f.metadata.get(RULE), f.metadata.get(TASK)
        if rule is not None:
            rule.check(name, value)
        require_finite(name, value)
        if belongs_to and belongs_to != task and value != f.default:
            raise ConfigError(f"{name}={value!r} is for task {belongs_to!r} only; leave it {f.default!r}")


def validate(config: ExperimentConfig) -> ExperimentConfig:
    """Checks types, names and ranges; returns the config with lists made tuples. Raises ConfigError.

    What needs the architecture (depth) or the devices (mesh) is checked by `validate_depth` and `validate_batch`.
    """
    _check_types(config, "config")
    c = config
    _check_fields(c, "config", c.task)
    _validate_ratings(c)
    _validate_data(c)
    _validate_training(c)
    _validate_exit_options(c)
    validate_reduction(c)
    _validate_distractors(c)
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


def _validate_data(c: ExperimentConfig) -> None:
    """Settings of the data source that depend on each other."""
    d = c.data
    _validate_caption_file("config.data", d)
    if d.source != "scenes" and not d.root and not (d.json and d.images):
        raise ConfigError(
            f"config.data.root='' but config.data.source={d.source!r} reads a folder; "
            "pass --config.data.root=PATH/TO/THE/FOLDER"
        )
    if d.source == "tfds" and not d.dataset:
        raise ConfigError("config.data.dataset='' but config.data.source='tfds'; name the dataset, such as coco_captions")
    if d.scenes_kept and d.source != "scenes":
        raise ConfigError(
            f"config.data.scenes_kept={d.scenes_kept!r} but config.data.source={d.source!r}; only drawn scenes "
            "are kept, so leave it empty"
        )
    if c.task == "clip" and not d.tokenizer:
        AtLeast(MIN_VOCABULARY, "256 bytes and 3 special tokens come first").check("config.data.vocabulary", d.vocabulary)


def _validate_caption_file(name: str, where: Any) -> None:
    if where.source != "folder" and (where.json or where.images):
        given = f"json={where.json!r}" if where.json else f"images={where.images!r}"
        raise ConfigError(f"{name}.{given} is for {name}.source='folder' only, found {where.source!r}; leave it empty")


def _validate_training(c: ExperimentConfig) -> None:
    """Options of the training run that do not go together."""
    t = c.train
    if t.batch_size % t.accumulate:
        raise ConfigError(
            f"config.train.accumulate={t.accumulate} does not divide config.train.batch_size={t.batch_size}; choose a divisor"
        )
    if set(t.freeze) >= {"image", "text", "exits", "temperature"}:
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
    if bool(t.init_image) != bool(t.init_text):
        given, other = ("init_image", "init_text") if t.init_image else ("init_text", "init_image")
        raise ConfigError(f"config.train.{given} names one tower of a CLIP; name the other with config.train.{other}")
    if t.init_image and (t.init or c.clip.variant != "init"):
        wrong = f"config.train.init={t.init!r}" if t.init else f"config.clip.variant={c.clip.variant!r}"
        right = "leave it empty" if t.init else "use 'init'"
        raise ConfigError(f"config.train.init_image and init_text set the towers and their sizes, so {wrong} cannot; {right}")
    if c.loss.kind == "sigmoid" and c.loss.direction != "symmetric":
        raise ConfigError(
            f"config.loss.direction={c.loss.direction!r} has no meaning with config.loss.kind='sigmoid'; leave it 'symmetric'"
        )
    if c.task == "complexity" and c.complexity.variant == "blocks" and t.init:
        raise ConfigError(
            f"config.train.init={t.init!r}: with config.complexity.variant='blocks' the tower's weights come from "
            "config.complexity.clip, and the head starts at random; leave it empty"
        )


def _validate_distractors(c: ExperimentConfig) -> None:
    d, name = c.eval.distractors, "config.eval.distractors"
    if not d.source:
        for other in ("root", "json", "images", "split", "size", "labels"):
            if getattr(d, other):
                found = f"{name}.{other}={getattr(d, other)!r}"
                raise ConfigError(f"{found} but {name}.source=''; name the source, such as 'folder'")
        return
    if c.eval.folds:
        raise ConfigError(
            f"config.eval.folds={c.eval.folds}: folds are galleries of the evaluated images alone; leave it 0, or leave "
            f"{name}.source empty"
        )
    OneOf(choices.DistractorSource).check(f"{name}.source", d.source)
    if d.source == "scenes" and not (d.split and d.size):
        raise ConfigError(
            f"{name}.split={d.split!r} and {name}.size={d.size}: distractors from scenes need both, such as "
            f"--{name}.split=test --{name}.size=5000"
        )
    _validate_caption_file(name, d)
    if d.source != "scenes" and not d.root and not (d.json and d.images):
        raise ConfigError(f"{name}.root='' but {name}.source={d.source!r} reads files; pass --{name}.root=PATH")


def _validate_ratings(c: ExperimentConfig) -> None:
    """Where the ratings of a complexity run come from, and what is made of them."""
    d, rated = c.data, ("scenes", "ratings", "webdataset", "parquet")
    if c.task != "complexity":
        wrong = f"ratings={d.ratings!r}" if d.ratings else "source='ratings'" if d.source == "ratings" else ""
        if wrong:
            raise ConfigError(f"config.data.{wrong} is for task 'complexity' only, and config.task is {c.task!r}")
        return
    if d.resize != "squash":
        raise ConfigError(f"config.data.resize={d.resize!r}: the complexity model sees whole images; use 'squash'")
    if c.complexity.fit == "ridge" and (c.complexity.target != "rating" or d.source != "ratings"):
        raise ConfigError(
            f"config.complexity.fit='ridge' fits human ratings: expected config.complexity.target='rating' and "
            f"config.data.source='ratings', found {c.complexity.target!r} and {d.source!r}"
        )
    if not c.complexity.penalties or min(c.complexity.penalties) <= 0:
        raise ConfigError(f"config.complexity.penalties={c.complexity.penalties} must be positive numbers, at least one")
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


def _validate_shares(c: ExperimentConfig) -> None:
    shares = c.eval.early_share
    if shares and len(shares) != len(c.clip.exits):
        raise ConfigError(
            f"config.eval.early_share={shares} must hold one share for each of the exits {c.clip.exits}; "
            "the rest goes to full depth; leave it empty for equal shares"
        )
    if any(not 0 <= s <= 1 for s in shares) or sum(shares) > 1:
        raise ConfigError(f"config.eval.early_share={shares} must be shares in [0, 1] that sum to at most 1")


def _validate_exit_options(c: ExperimentConfig) -> None:
    """Summed heads, distillation, the mixed gallery and layer dropout, against each other."""
    loss, dropout = c.loss, c.train.layer_dropout
    if c.clip.exit_sum and c.task == "clip" and not c.clip.exits:
        raise ConfigError("config.clip.exit_sum=True sums heads of exits, and config.clip.exits=() has none; leave it False")
    if c.clip.exit_sum and "image" in c.train.freeze:
        raise ConfigError(
            f"config.clip.exit_sum=True changes the embeddings of full depth as its exits learn, which config.train.freeze="
            f"{c.train.freeze} freezes; leave it False"
        )
    for name in ("distill_cosine", "distill_kl", "distill_init", "mixed"):
        value = getattr(loss, name)
        if name == "distill_init":
            if value and c.task == "clip" and not (c.train.init or c.train.init_image):
                raise ConfigError(
                    f"config.loss.distill_init={value} aims at the embeddings of the weights that the run starts from, and "
                    "config.train.init='' names none; name a checkpoint, or leave it 0"
                )
            if value and "image" in c.train.freeze:
                raise ConfigError(
                    f"config.loss.distill_init={value} has no effect while config.train.freeze={c.train.freeze} freezes the "
                    "image tower; set it to 0, or let exits learn with config.loss.distill_cosine"
                )
        elif value and c.task == "clip" and not c.clip.exits:
            raise ConfigError(f"config.loss.{name}={value} is about early exits, and config.clip.exits=() has none; leave it 0")
    if dropout and "image" in c.train.freeze:
        raise ConfigError(
            f"config.train.layer_dropout={dropout} only disturbs a tower that config.train.freeze={c.train.freeze} freezes; "
            "set it to 0"
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

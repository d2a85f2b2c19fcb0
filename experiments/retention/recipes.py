"""Training runs of experiments/retention/study.py: sizes per setting, and recipes as changes of one configuration.

As in ICAR, exits are added by fine-tuning a pretrained CLIP. Per dataset, the full tower, the shallower baseline and the tower
that merges patches are pretrained once on the same pairs (for `shaded`, after those of scenes). Every recipe fine-tunes one
of them. All recipes see the same number of pairs, except `frozen` ones, which are initialised from the baseline; with the same
seed the order is the same, except for `summed`, which starts from scratch. Ablation recipes change one option of `shared`, or
merge patches without exits; `combined` recipes change several. docs/recipe.md recommends `combined_gently`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icar_jax.architectures import clip_arch
from icar_jax.config import (
    ClipConfig,
    ComplexityConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    OptimConfig,
    TrainConfig,
    check_override,
    validate,
)
from icar_jax.models.flops import vision_flops

DATASETS = ("scenes", "photos", "shaded")  # shaded: photograph-textured scenes
BUDGET = 0.70  # target cost of routing as a fraction of full depth, router included


@dataclass(frozen=True)
class Sizes:
    """Sizes that a setting fixes for a dataset, in pixels, blocks, images and optimiser steps."""

    variant: str
    exit: int  # early exit of all recipes except `exits` and those using `late`
    exits: tuple[int, ...]  # early exits of the recipe `exits`
    late: int  # exit of `combined` and `combined_gently`; with merged patches, the blocks after it are cheap
    merge: tuple[int, ...]  # patches merged after each block, so that full depth meets the budget
    gentle: tuple[int, ...]  # the smallest such numbers that meet the budget
    pretrain_steps: int
    steps: int  # fine-tuning steps of every recipe
    batch_size: int
    image_size: int
    after: str = ""  # dataset whose pretrained towers initialise pretraining
    patch_size: int = 0  # 0 uses the variant's value; the same for depth
    depth: int = 0
    context_length: int = 32
    vocabulary: int = 512
    train_images: int = 200_000  # scenes
    calibration: int = 1000  # held-out images for thresholds
    queries: int = 1000  # query images of scenes; photos use the full held-out split
    distractors: int = 4000  # distractor images; for photos also held out of training
    pretrain_lr: float = 1e-3
    lr: float = 5e-4
    exit_lr: float = 1e-3  # exit heads are initialised from the tower's head and need larger steps
    weight_decay: float = 0.05
    warmup_steps: int = 100
    dtype: str = "bfloat16"
    scan_blocks: bool = False
    checkpoint_every: int = 500
    augment: bool = False  # random crops and flips, for photos
    router: str = "convnextv2_demo"  # ConvNeXt-IC, trained on scenes for every dataset
    router_pixels: int = 64
    router_steps: int = 2000
    head_blocks: int = 2  # tower blocks below the head of the routers `blocks` and `regret`
    head_steps: int = 500
    gallery_steps: int = 2000  # for the router `gallery`, whose richer targets benefit from longer training
    gallery_batch: int = 256
    rivals: int = 4000  # extra negatives of the router `gallery`
    # Fractions of the baseline's counted cost; budgets at or above a recipe's own full depth become notes.
    budgets: tuple[float, ...] = (BUDGET, 0.80)
    merged_budgets: tuple[float, ...] = (0.58, 0.60, 0.62, 0.64, 0.66, 0.67, 0.68)
    bootstrap: int = 2000
    random_draws: int = 10
    eval_batch: int = 64  # small, because large batches would leave exit queues half empty on the 1,024 timed images


_SCENES = {"queries": 4000, "distractors": 1000}  # scenes are cheap, and more queries give narrower intervals
_PHOTOS = {"vocabulary": 4096, "calibration": 500, "distractors": 500, "weight_decay": 0.2, "augment": True}
# For two CPU cores, where float32 is faster than bf16. With 16-pixel patches there would be too few tokens (16) to merge.
_SMALL = {
    "variant": "vit_demo", "exit": 3, "exits": (2, 4), "late": 4,
    "merge": (0, 24, 16), "gentle": (0, 20, 14),
    "pretrain_steps": 1500, "steps": 300, "batch_size": 64, "image_size": 64, "patch_size": 8, "dtype": "float32",
    "router_pixels": 32, "head_steps": 600,
}  # fmt: skip
_LARGE = {
    "variant": "vit_s16", "exit": 6, "exits": (4, 6, 8), "late": 8,
    "merge": (0, 0, 16, 0, 0, 12, 0, 0, 8), "gentle": (0, 0, 16, 0, 0, 12, 0, 0, 7),
    "batch_size": 256, "image_size": 128, "warmup_steps": 500, "router_pixels": 64,
    "router_steps": 7000, "head_steps": 2000, "gallery_steps": 6000,
    "pretrain_lr": 5e-4, "lr": 2e-4, "exit_lr": 5e-4, "merged_budgets": (0.62, 0.65, 0.67, 0.68),
}  # fmt: skip
# For tests; runs in seconds.
_TINY = {
    "variant": "vit_demo", "exit": 1, "exits": (1, 2), "late": 2, "merge": (0, 1), "gentle": (0, 1),
    "pretrain_steps": 2, "steps": 3,
    "depth": 3, "patch_size": 32, "context_length": 16, "batch_size": 8, "image_size": 64, "train_images": 200,
    "calibration": 40, "queries": 24, "distractors": 16, "warmup_steps": 1, "dtype": "float32", "checkpoint_every": 2,
    "router_pixels": 32, "router_steps": 2, "head_blocks": 1, "head_steps": 2, "gallery_steps": 2, "gallery_batch": 8,
    "rivals": 20, "bootstrap": 100, "random_draws": 3, "eval_batch": 8, "vocabulary": 300, "budgets": (0.9,),
    "merged_budgets": (0.9,),
}  # fmt: skip

SETTINGS: dict[str, dict[str, Sizes]] = {
    "small": {
        "scenes": Sizes(**_SMALL, **_SCENES),
        "photos": Sizes(**_SMALL | {"pretrain_steps": 750}, **_PHOTOS),  # ten epochs of a few thousand photographs
        "shaded": Sizes(**_SMALL | {"pretrain_steps": 800}, **_SCENES, after="scenes"),
    },
    "large": {
        "scenes": Sizes(**_LARGE, **_SCENES, pretrain_steps=10_000, steps=2000),
        "photos": Sizes(**_LARGE, **_PHOTOS, pretrain_steps=3000, steps=600),
        "shaded": Sizes(**_LARGE, **_SCENES, after="scenes", pretrain_steps=3000, steps=600),
    },
    "tiny": {
        "scenes": Sizes(**_TINY),
        "photos": Sizes(**_TINY | {"augment": True}),
        "shaded": Sizes(**_TINY, after="scenes"),
    },
}


@dataclass(frozen=True)
class Recipe:
    """A recipe as changes of the configuration of `shared`, by dotted name.

    note: description in the table. many: use `Sizes.exits` instead of `Sizes.exit`. exits: False for towers without exits.
    init: the run that initialises it, one of PRETRAINED or a recipe with the same seed; empty: from scratch, on as many pairs
    as the others see in total (for PRETRAINED: from scratch, or from the towers of `Sizes.after`).
    """

    note: str
    changes: dict[str, Any] = field(default_factory=dict)
    many: bool = False
    exits: bool = True
    init: str = "pretrained"


_WEIGHTS = "loss.exit_weights"
_MERGED = {"clip.merge": "merge"}
_GENTLY = {"clip.merge": "gentle"}
_HELD = {"loss.distill_init": 10.0}
_LATE = {_WEIGHTS: "twentieth", "clip.exits": "late", "clip.exit_head": "attention"}

# Trained once per dataset, with a separate seed, so that no recipe repeats the batches of pretraining.
PRETRAINING_SEED = 0
PRETRAINED: dict[str, Recipe] = {
    "pretrained": Recipe("initialises the other recipes", exits=False, init=""),
    "pretrained_static": Recipe("initialises the shallower baseline", exits=False, init=""),
    "pretrained_merged": Recipe("initialises `merged_first`", _MERGED, exits=False, init=""),
}

RECIPES: dict[str, Recipe] = {
    "baseline": Recipe("full depth only, no exit", exits=False),
    "static": Recipe("shallower baseline: fewer blocks, no exit, no router", exits=False, init="pretrained_static"),
    "icar": Recipe(
        "as published: randomly initialised head on the first patch, separate temperatures and losses",
        {"clip.pool": "first_patch", "clip.exit_start": "random", "clip.temperature": "own"},
    ),
    "merged": Recipe("full depth only, token merging", _MERGED, exits=False),
    "merged_first": Recipe("merged, from the first step of pretraining", _MERGED, exits=False, init="pretrained_merged"),
    "heads": Recipe("exit heads initialised from ln_post and proj, on CLS; separate temperatures", {"clip.temperature": "own"}),
    "shared": Recipe("heads, with one shared temperature"),
    "adapter": Recipe("shared, residual adapter as exit head", {"clip.exit_head": "adapter"}),
    "attention": Recipe("shared, attention pool as exit head", {"clip.exit_head": "attention"}),
    "summed": Recipe("shared, from scratch; embeddings sum the heads up to their depth", {"clip.exit_sum": True}, init=""),
    "cosine": Recipe("shared, cosine distillation from full depth", {"loss.distill_cosine": 1.0}),
    "kl": Recipe("shared, KL distillation of similarities from full depth", {"loss.distill_kl": 1.0}),
    "mixed": Recipe("shared, mixed-gallery loss", {"loss.mixed": 1.0}),
    "growing": Recipe("shared, loss weights growing with depth", {_WEIGHTS: "growing"}),
    "light": Recipe("shared, exit loss weight 0.2", {_WEIGHTS: "light"}),
    "held": Recipe("merged, distillation from the initial weights", _MERGED | _HELD, exits=False),
    "dropout": Recipe("shared, layer dropout", {"train.layer_dropout": 0.1}),
    "exits": Recipe("shared, more than one exit", many=True),
    "frozen": Recipe(
        "frozen baseline weights, exit heads trained on as many pairs as the baseline was fine-tuned on",
        {"train.freeze": ("image", "text", "temperature")}, init="baseline",
    ),
    "frozen_attention": Recipe(
        "frozen, attention pool as exit head",
        {"train.freeze": ("image", "text", "temperature"), "clip.exit_head": "attention", "loss.distill_cosine": 1.0},
        init="baseline",
    ),
    "held_full": Recipe("full depth only, no merging, distillation from the initial weights", _HELD, exits=False),
    "held_gently": Recipe("held, fewer patches merged", _GENTLY | _HELD, exits=False),
    "combined_half": Recipe(
        "held, exit halfway: attention pool, loss weight 0.02",
        {_WEIGHTS: "fiftieth", "clip.exit_head": "attention"} | _MERGED | _HELD,
    ),
    "combined": Recipe("held, exit at two thirds of the depth: attention pool, loss weight 0.05", _LATE | _MERGED | _HELD),
    "combined_gently": Recipe("combined, fewer patches merged", _LATE | _GENTLY | _HELD),
}  # fmt: skip


def with_changes(config: ExperimentConfig, changes: dict[str, Any]) -> ExperimentConfig:
    """Returns the configuration with fields replaced by dotted name. Raises ConfigError for unknown fields."""
    for path, value in changes.items():
        check_override(f"config.{path}")
        group, name = path.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{name: value})})
    return config


def clip_config(name: str, dataset: str, sizes: Sizes, seed: int, photos: str, out: Path) -> ExperimentConfig:
    """Returns the configuration of a recipe for train.py. out: folder of all runs. Raises ConfigError for invalid ones."""
    recipe, s = (RECIPES | PRETRAINED)[name], sizes
    exits = () if not recipe.exits else s.exits if recipe.many else (s.exit,)
    start = initial_workdir(name, dataset, s, seed, out)
    lr, exit_lr = (s.lr, s.exit_lr) if recipe.init else (s.pretrain_lr, s.pretrain_lr)
    steps = s.steps if recipe.init else s.pretrain_steps + (0 if name in PRETRAINED else s.steps)
    config = ExperimentConfig(
        clip=ClipConfig(
            variant=s.variant, exits=exits, temperature="shared" if recipe.exits else "own", depth=s.depth,
            image_size=s.image_size, patch_size=s.patch_size, context_length=s.context_length,
        ),
        data=_data(dataset, s, photos, out),
        optim=OptimConfig(
            lr=lr, exit_lr=exit_lr, weight_decay=s.weight_decay, warmup_steps=min(s.warmup_steps, max(steps // 10, 1)),
        ),
        train=TrainConfig(
            steps=steps, batch_size=s.batch_size, seed=seed, dtype=s.dtype, checkpoint_every=s.checkpoint_every, keep=1,
            scan_blocks=s.scan_blocks, init=str(start) if start else "",
        ),
        eval=EvalConfig(split="val", size=s.queries, batch_size=s.eval_batch),
    )  # fmt: skip
    depth = clip_arch(config.clip).vision.depth
    flat = lambda weight: (*(weight for _ in exits), 1.0)
    meant = {"growing": growing_weights(exits, depth), "light": flat(0.2), "twentieth": flat(0.05), "fiftieth": flat(0.02)}
    meant |= {"late": (s.late,), "merge": s.merge, "gentle": s.gentle}
    meaning = lambda value: meant.get(value, value) if isinstance(value, str) else value
    changes = {path: meaning(value) for path, value in recipe.changes.items()}
    if name in ("static", "pretrained_static"):
        changes["clip.depth"] = static_depth(config)
    return validate(with_changes(config, changes))


def budgets_of(name: str, sizes: Sizes) -> tuple[float, ...]:
    """Returns the budgets at which a recipe is routed; empty without exits."""
    recipe = RECIPES[name]
    return () if not recipe.exits else sizes.merged_budgets if "clip.merge" in recipe.changes else sizes.budgets


def initial_workdir(name: str, dataset: str, sizes: Sizes, seed: int, out: Path) -> Path | None:
    """Returns the workdir that initialises a recipe; None for training from scratch."""
    if name in PRETRAINED:
        return folder(out, sizes.after, name, PRETRAINING_SEED) if sizes.after else None
    start = RECIPES[name].init
    return folder(out, dataset, start, PRETRAINING_SEED if start in PRETRAINED else seed) if start else None


def complexity_config(sizes: Sizes, out: Path) -> ExperimentConfig:
    """Returns the configuration of ConvNeXt-IC, trained on scenes, whose complexity is known."""
    s = sizes
    return validate(
        ExperimentConfig(
            task="complexity",
            complexity=ComplexityConfig(variant=s.router, image_size=s.router_pixels, dropout=0.0),
            data=DataConfig(
                source="scenes", scenes_size=s.train_images, scenes_pixels=s.router_pixels, normalise="imagenet",
                scenes_kept=_scene_cache(out),
            ),
            optim=OptimConfig(lr=1e-3, warmup_steps=min(100, s.router_steps // 2)),
            train=TrainConfig(
                steps=s.router_steps, batch_size=s.batch_size, dtype="float32", checkpoint_every=s.checkpoint_every, keep=1
            ),
        )
    )  # fmt: skip


def head_config(
    router: str, dataset: str, sizes: Sizes, seed: int, photos: str, clip: Path, exit: int, out: Path
) -> ExperimentConfig:
    """Returns the configuration of a router head on the first blocks of the CLIP at `clip`.

    Targets: `blocks` the ratings of scenes; `regret` the regret of leaving early; `gallery` the regret with thousands of extra
    negatives, weighted by full depth's probabilities, with the head at the exit itself.
    """
    s, gallery = sizes, router == "gallery"
    steps, batch = (s.gallery_steps, s.gallery_batch) if gallery else (s.head_steps, s.batch_size)
    more = {"regret": "kl", "rivals": s.rivals, "pooled_norm": "parts"} if gallery else {}
    # The tower's own preprocessing replaces this resize mode; routers are trained without random crops.
    data = dataclasses.replace(
        _data("scenes" if router == "blocks" else dataset, s, photos, out), resize="squash", crop_scale=1.0, flip=False
    )
    config = ExperimentConfig(
        task="complexity",
        complexity=ComplexityConfig(
            variant="blocks", clip=str(clip), blocks=exit if gallery else min(s.head_blocks, exit), dropout=0.0,
            target="rating" if router == "blocks" else "regret", **more,
        ),
        data=data,
        optim=OptimConfig(lr=1e-3, warmup_steps=min(100, steps // 2)),
        train=TrainConfig(
            steps=steps, batch_size=batch, seed=seed, dtype="float32", checkpoint_every=s.checkpoint_every, keep=1,
        ),
    )  # fmt: skip
    return validate(config)


def static_depth(config: ExperimentConfig, budget: float = BUDGET) -> int:
    """Returns the largest depth of the vision tower whose counted cost is at most `budget` times full depth; at least 1."""
    vision = clip_arch(config.clip).vision
    most = budget * vision_flops(vision)
    return max([1, *(d for d in range(1, vision.depth) if vision_flops(dataclasses.replace(vision, depth=d)) <= most)])


def growing_weights(exits: tuple[int, ...], depth: int) -> tuple[float, ...]:
    """Returns loss weights proportional to the executed blocks, 1 for full depth."""
    return (*(round(exit / depth, 4) for exit in exits), 1.0)


def folder(out: Path, dataset: str, recipe: str, seed: int) -> Path:
    """Returns the workdir of a run."""
    return out / dataset / recipe / str(seed)


def _data(dataset: str, s: Sizes, photos: str, out: Path) -> DataConfig:
    if dataset == "scenes":
        return DataConfig(
            source="scenes", scenes_size=s.train_images, scenes_pixels=s.image_size, calibration_size=s.calibration,
            vocabulary=s.vocabulary, scenes_kept=_scene_cache(out),
        )  # fmt: skip
    if dataset == "shaded":
        return DataConfig(
            source="folder", root=str(shaded_folder(out, s)), resize="squash", calibration_size=s.calibration,
            vocabulary=s.vocabulary,
        )  # fmt: skip
    return DataConfig(
        source="folder", root=photos, resize="crop", crop_scale=0.5 if s.augment else 1.0, flip=s.augment,
        # Held-out images are split into calibration images and distractors.
        calibration_size=s.calibration + s.distractors, vocabulary=s.vocabulary,
    )  # fmt: skip


def shaded_folder(out: Path, sizes: Sizes) -> Path:
    """Returns the folder of photograph-textured scenes."""
    return out / f"shaded_{sizes.image_size}"


def _scene_cache(out: Path) -> str:
    """Returns the cache folder of rendered scenes, shared by all recipes of a seed."""
    return str(out / "drawn")

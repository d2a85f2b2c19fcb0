"""Training a complexity model on regret: the increase of an image's retrieval loss when a frozen CLIP exits early."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from icar_jax import checkpoint, pytree
from icar_jax import workdir as files
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError, ExperimentConfig, from_dict
from icar_jax.data.images import Preprocess
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.files import json_file
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.exit_regret import ExtraNegatives, cosine_regret, loss_regret, unit_ranks
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.training.losses import contrastive
from icar_jax.training.preemption import StopRequest
from icar_jax.training.tasks import extra_negatives, frozen_trunk
from icar_jax.training.tasks.base import Frozen, Metrics, Task
from icar_jax.training.tasks.extra_negatives import NEGATIVES
from icar_jax.training.tasks.ratings import ScorerRun, scorer_task

CLIP = "clip"  # entry of the frozen arrays: the parameters of the CLIP
INDEX = "index"  # entry of a batch with extra negatives: index of each image in the training set
IMAGE = "clip_image"  # entry of a batch: images preprocessed for the CLIP, if the complexity model's preprocessing differs
KEPT = "start/clip.json"  # file in a workdir: description of the CLIP whose regret is learnt


@dataclass(frozen=True)
class Teacher:
    """The frozen CLIP whose regret is the training target; holds no arrays."""

    clip: Graph[Clip]
    exit: int  # executed blocks
    kind: str  # one of models.regret.KINDS
    preprocess: Preprocess
    description: dict[str, Any]  # of the finished checkpoint: kind, exit, rivals, path and hash of the CLIP
    negatives: int = 0  # extra negative pairs in addition to those of the batch

    @property
    def reads_captions(self) -> bool:
        return self.kind != "cosine"

    @property
    def shapes(self) -> dict[str, pytree.Tree]:
        """Shapes of the frozen arrays: CLIP and, with extra negatives, NEGATIVES."""
        embeddings = jax.ShapeDtypeStruct((self.negatives, self.clip.arch.vision.embed_dim), jnp.float32)
        index = jax.ShapeDtypeStruct((self.negatives,), jnp.int32)
        bank = {"image": embeddings, "text": embeddings, "index": index}
        return {CLIP: self.clip.shapes} | ({NEGATIVES: bank} if self.negatives else {})

    def regret(
        self, batch: Mapping[str, Any], frozen: Frozen, pixels: jax.Array | None, tokens: Tokens | None, start: int
    ) -> jax.Array:
        """Returns the regrets [B] of a batch; stop-gradient.

        Args:
            batch: 'tokens' int32 [B, L] if captions are read, and INDEX int32 [B] with extra negatives.
            frozen: parameters CLIP and, with extra negatives, NEGATIVES.
            pixels: images float [B, S, S, 3], normalised; ignored if `tokens` are given.
            tokens: Tokens of [B, L, W] in the tower after `start` blocks, or None.
        """
        params = jax.lax.stop_gradient(frozen[CLIP])
        exits = (self.exit, self.clip.arch.vision.depth)
        if tokens is None:
            image = self.clip.encode_image_exits(params, pixels, exits)
        else:
            image = self.clip.encode_tokens_exits(params, jax.lax.stop_gradient(tokens), start, exits)
        early, full = (image[e] for e in exits)
        if self.kind == "cosine":
            return cosine_regret(early, full)
        text = self.clip.encode_text(params, batch["tokens"])
        more = None
        if self.negatives:
            found = jax.lax.stop_gradient(frozen[NEGATIVES])
            more = ExtraNegatives(found["image"], found["text"], jnp.any(batch[INDEX][:, None] == found["index"], axis=0))
        return loss_regret(early, full, text, self.clip.logit_scales(params)[exits[-1]], more, self.kind == "kl")

    def target(self, batch: Mapping[str, Any], frozen: Frozen, tokens: Tokens | None, start: int) -> tuple[jax.Array, Metrics]:
        """Returns (targets, metrics): targets float32 [B] in [0, 1] are the ranks of the regrets within the batch."""
        pixels = None
        if tokens is None:
            picture = batch[IMAGE] if IMAGE in batch else batch["image"]
            pixels = normalise(picture, self.preprocess.mean, self.preprocess.std)
        found = jax.lax.stop_gradient(self.regret(batch, frozen, pixels, tokens, start).astype(jnp.float32))
        return unit_ranks(found), {"regret": jnp.mean(found)}


def teacher(config: ExperimentConfig) -> Teacher:
    """Returns the CLIP at config.complexity.clip. Raises ConfigError if it cannot be read or does not have the exit."""
    folder = frozen_trunk.folder(config)
    description = checkpoint.describe(folder)
    try:
        arch = from_dict(description["arch"], ClipArch, f"{folder}: arch")
    except (KeyError, ValueError) as error:
        raise ConfigError(f"config.complexity.clip={config.complexity.clip}: {error}") from error
    c = config.complexity
    if not arch.vision.exits:
        raise ConfigError(
            f"config.complexity.clip={c.clip} has no early exit, so there is no regret to learn; train it with "
            "--config.clip.exits, or set config.complexity.target=rating"
        )
    if c.exit and c.exit not in arch.vision.exits:
        raise ConfigError(
            f"config.complexity.exit={c.exit} is not an early exit of {c.clip}, which has exits after {arch.vision.exits} "
            "blocks; use one of these, or 0 for the first"
        )
    exit = c.exit or arch.vision.exits[0]
    told = {"kind": c.regret, "exit": exit, "rivals": c.rivals, **frozen_trunk.origin(config)}
    clip = Clip.graph(arch, dtype=config.train.dtype)
    return Teacher(clip, exit, c.regret, Preprocess.from_dict(description["preprocess"]), told, c.rivals)


def params(config: ExperimentConfig, shapes: pytree.Tree) -> pytree.Tree:
    """Returns the CLIP's parameters, float32 numpy. Raises ConfigError if they are damaged or do not match `shapes`."""
    try:
        found = checkpoint.read(frozen_trunk.folder(config), "clip").params
    except CheckpointError as error:
        raise ConfigError(f"config.complexity.clip={config.complexity.clip}: {error}") from error
    if differing := pytree.differences(shapes, found):
        raise ConfigError(
            f"config.complexity.clip={config.complexity.clip}: its weights do not match its description: {differing[0]} "
            f"({len(differing)} differences)"
        )
    return found


def clip_tokenizer(config: ExperimentConfig) -> Tokenizer | None:
    """Returns the CLIP's tokenizer; None if the regret reads no captions. Raises ConfigError if the checkpoint has none."""
    if config.complexity.regret == "cosine":
        return None
    file = frozen_trunk.folder(config) / checkpoint.TOKENIZER
    if not file.is_file():
        raise ConfigError(
            f"config.complexity.clip={config.complexity.clip} has no tokenizer, but regret {config.complexity.regret!r} "
            "reads captions; convert it with a tokenizer, or set config.complexity.regret=cosine"
        )
    return Tokenizer.from_file(file)


def others(found: Teacher, preprocess: Preprocess, shared: bool) -> dict[str, Preprocess]:
    """Returns {entry of the batch: preprocess} of the images that the CLIP needs in addition to the complexity model's.

    `shared`: the CLIP continues from the complexity model's tokens and needs no images. Mean and standard deviation are applied
    on the device, so a difference in these needs no second image.
    """
    alike = lambda p: dataclasses.replace(p, mean=found.preprocess.mean, std=found.preprocess.std)
    return {} if shared or alike(preprocess) == found.preprocess else {IMAGE: found.preprocess}


class RegretRun(ScorerRun):
    """`config.task` 'complexity' with `config.complexity.target` 'regret'."""

    @property
    def best_by(self) -> str:
        return "pcc"

    @property
    def still_needs_clip(self) -> bool:
        return True

    def task(
        self, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None, class_counts: tuple[int, int] = (1, 1)
    ) -> Task:
        model, preprocess, description = self.model()
        clip = teacher(self.config)
        blocks = model.arch.blocks if self.on_trunk else 0
        more = others(clip, preprocess, bool(blocks))

        def loss(params, batch, key, frozen):
            pixels, tokens = normalise(batch["image"], preprocess.mean, preprocess.std), None
            if blocks:  # the CLIP continues from the same tokens
                tokens = model.tokens(params, pixels)
                logits = model.logits_of_tokens(params, tokens, key)
            else:
                logits = model.logits(params, pixels, key)
            target, metrics = clip.target(batch, frozen, tokens, blocks)
            return contrastive.complexity_loss(logits, target, model.arch.head, 0.0), metrics

        fields = ("image", *more, *(("tokens",) if clip.reads_captions else ()), *((INDEX,) if clip.negatives else ()))
        length = clip.clip.arch.text.context_length if clip.reads_captions else 0
        described = {**description, "target": "regret", "regret": clip.description}
        kept = {"context_length": length, "frozen": clip.shapes, "others": more}
        return scorer_task(model, loss, preprocess, fields, described, **kept)

    def tokenizer(self, source: Source, resumed: Path | None) -> Tokenizer | None:
        return clip_tokenizer(self.config)

    def require_images(self, count: int) -> None:
        extra_negatives.require_enough(self.config, count)

    def frozen_params(self, task: Task) -> dict[str, pytree.Tree]:
        return {CLIP: params(self.config, task.frozen[CLIP])}

    def embedded_params(
        self, task: Task, source: Source, tokenizer: Tokenizer | None, frozen: Frozen, request: StopRequest
    ) -> dict[str, pytree.Tree] | None:
        if NEGATIVES not in task.frozen:
            return {}
        clip = teacher(self.config)
        found = extra_negatives.embed(self.config, clip.clip, clip.preprocess, source, tokenizer, frozen[CLIP], request)
        return None if found is None else {NEGATIVES: found}

    def remember(self, workdir: Path) -> None:
        super().remember(workdir)
        if not (files.has_checkpoint(workdir) and (workdir / KEPT).is_file()):
            text = (frozen_trunk.folder(self.config) / checkpoint.DESCRIPTION).read_text(encoding="utf-8")
            files.write_text(workdir / KEPT, text)

    def require_same(self, workdir: Path) -> None:
        if not (workdir / KEPT).is_file():
            return
        began = json_file.read_object(workdir / KEPT, ConfigError)
        if checkpoint.identity(checkpoint.describe(frozen_trunk.folder(self.config))) != checkpoint.identity(began):
            clip = self.config.complexity.clip
            raise ConfigError(
                f"config.complexity.clip={clip} differs from the CLIP that {workdir} started with, so the regret targets would "
                "change; restore the original one, or use another --workdir"
            )

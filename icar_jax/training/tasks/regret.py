"""The frozen CLIP beside a complexity model that learns regret: its weights, its view of a batch, and the targets it gives."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from icar_jax import checkpoint, pytree
from icar_jax import workdir as files
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import ConfigError, ExperimentConfig, from_dict
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.exit_regret import ExtraNegatives, cosine_regret, loss_regret, unit_ranks
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.token_merging import Tokens
from icar_jax.training.tasks import frozen_trunk

CLIP = "clip"  # entry of a batch: the parameters of the CLIP
# Entry of a batch: {'image', 'text': float32 [M, D], unit norm; 'index': int32 [M], which image of the training set}.
RIVALS = "rivals"
INDEX = "index"  # entry of a batch, beside RIVALS: which image of the training set each one is
IMAGE = "clip_image"  # entry of a batch: the pictures as the CLIP is given them, where the complexity model sees others
KEPT = "start/clip.json"  # of a workdir: description of the CLIP that the regret is of


def has_regret(config: ExperimentConfig) -> bool:
    """Whether the run learns regret."""
    return config.task == "complexity" and config.complexity.target == "regret"


@dataclass(frozen=True)
class Teacher:
    """The CLIP whose regret is learnt; holds no arrays."""

    clip: Graph[Clip]
    exit: int  # executed blocks
    kind: str  # one of models.regret.KINDS
    preprocess: Preprocess
    description: dict[str, Any]  # of the finished checkpoint: kind, exit, rivals, and which CLIP
    rivals: int = 0  # pairs beside those of the batch

    @property
    def reads_captions(self) -> bool:
        return self.kind != "cosine"

    def regret(self, batch: dict[str, Any], pixels: jax.Array | None, tokens: Tokens | None, start: int) -> jax.Array:
        """Regrets [B] of a batch with the entries CLIP and, where captions are read, 'tokens' int32 [B, L]; RIVALS and INDEX.

        Images come as `pixels` float [B, S, S, 3], normalised, or as Tokens of [B, L, W] in the tower after `start` blocks.
        No gradient flows through.
        """
        params = jax.lax.stop_gradient(batch[CLIP])
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
        if self.rivals:
            found = jax.lax.stop_gradient(batch[RIVALS])
            more = ExtraNegatives(found["image"], found["text"], jnp.any(batch[INDEX][:, None] == found["index"], axis=0))
        return loss_regret(early, full, text, self.clip.logit_scales(params)[exits[-1]], more, self.kind == "kl")

    def target(self, batch: dict[str, Any], tokens: Tokens | None, start: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(targets [B] in [0, 1], what is logged): ranks of the regrets in the batch."""
        pixels = None
        if tokens is None:
            picture = batch[IMAGE] if IMAGE in batch else batch["image"]
            pixels = normalise(picture, self.preprocess.mean, self.preprocess.std)
        found = jax.lax.stop_gradient(self.regret(batch, pixels, tokens, start).astype(jnp.float32))
        return unit_ranks(found), {"regret": jnp.mean(found)}


def teacher(config: ExperimentConfig) -> Teacher:
    """The CLIP that config.complexity.clip names. Raises ConfigError where it cannot be read or lacks the exit."""
    folder = frozen_trunk.folder(config)
    description = checkpoint.describe(folder)
    try:
        arch = from_dict(description["arch"], ClipArch, f"{folder}: arch")
    except (KeyError, ValueError) as error:
        raise ConfigError(f"config.complexity.clip={config.complexity.clip}: {error}") from error
    c = config.complexity
    if not arch.vision.exits:
        raise ConfigError(
            f"config.complexity.clip={c.clip} has no early exit, so no image can leave it early; train it with "
            "--config.clip.exits, or set config.complexity.target=rating"
        )
    if c.exit and c.exit not in arch.vision.exits:
        raise ConfigError(
            f"config.complexity.exit={c.exit} is no early exit of {c.clip}, which has them after {arch.vision.exits} blocks; "
            "take one of these, or 0 for the first"
        )
    exit = c.exit or arch.vision.exits[0]
    told = {"kind": c.regret, "exit": exit, "rivals": c.rivals, **frozen_trunk.origin(config)}
    clip = Clip.graph(arch, dtype=config.train.dtype)
    return Teacher(clip, exit, c.regret, Preprocess.from_dict(description["preprocess"]), told, c.rivals)


def rival_shapes(found: Teacher) -> pytree.Tree:
    """Shapes of RIVALS."""
    embeddings = jax.ShapeDtypeStruct((found.rivals, found.clip.arch.vision.embed_dim), jnp.float32)
    return {"image": embeddings, "text": embeddings, "index": jax.ShapeDtypeStruct((found.rivals,), jnp.int32)}


def params(config: ExperimentConfig, shapes: pytree.Tree) -> pytree.Tree:
    """The CLIP's parameters, float32 numpy. Raises ConfigError where they are damaged or do not fit `shapes`."""
    try:
        found = checkpoint.read(frozen_trunk.folder(config), "clip").params
    except CheckpointError as error:
        raise ConfigError(f"config.complexity.clip={config.complexity.clip}: {error}") from error
    if differing := pytree.differences(shapes, found):
        raise ConfigError(
            f"config.complexity.clip={config.complexity.clip}: its weights do not fit its description: {differing[0]} "
            f"({len(differing)} differences)"
        )
    return found


def tokenizer(config: ExperimentConfig) -> Tokenizer | None:
    """The CLIP's own; None where the regret reads no captions. Raises ConfigError where the checkpoint has none."""
    if config.complexity.regret == "cosine":
        return None
    file = frozen_trunk.folder(config) / checkpoint.TOKENIZER
    if not file.is_file():
        raise ConfigError(
            f"config.complexity.clip={config.complexity.clip} holds no tokenizer, and regret {config.complexity.regret!r} "
            "reads captions: convert it with one, or set config.complexity.regret=cosine"
        )
    return Tokenizer.from_file(file)


def remember(config: ExperimentConfig, workdir: Path) -> None:
    """Writes which CLIP the run learns the regret of, not where it is continued. Raises OSError, ConfigError."""
    if has_regret(config) and not (files.has_checkpoint(workdir) and (workdir / KEPT).is_file()):
        text = (frozen_trunk.folder(config) / checkpoint.DESCRIPTION).read_text(encoding="utf-8")
        files.write_text(workdir / KEPT, text)


def require_same(config: ExperimentConfig, workdir: Path) -> None:
    """Raises ConfigError where a continued run would learn the regret of another CLIP than it began with."""
    if not has_regret(config) or not (workdir / KEPT).is_file():
        return
    began = json.loads((workdir / KEPT).read_text(encoding="utf-8"))
    if checkpoint.identity(checkpoint.describe(frozen_trunk.folder(config))) != checkpoint.identity(began):
        raise ConfigError(
            f"config.complexity.clip={config.complexity.clip} is another model than the one {workdir} began with: what its "
            "images lose is another; put the first one back, or start in another --workdir"
        )


def others(found: Teacher, preprocess: Preprocess, shared: bool) -> dict[str, Preprocess]:
    """{entry of the batch: preprocess} of pictures that the CLIP needs beside those of the complexity model.

    `shared`: it reads the complexity model's tokens. Mean and deviation are applied on the device and need no second picture.
    """
    alike = lambda p: dataclasses.replace(p, mean=found.preprocess.mean, std=found.preprocess.std)
    return {} if shared or alike(preprocess) == found.preprocess else {IMAGE: found.preprocess}

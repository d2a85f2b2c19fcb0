"""Floating-point operations of one training step, counted from the configuration and not from the compiled program."""

from __future__ import annotations

from dataclasses import dataclass

from icar_jax.config import ExperimentConfig
from icar_jax.models import flops
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.token_router import ScorerArch
from icar_jax.models.vision import VisionArch
from icar_jax.training import init_weights
from icar_jax.training.tasks import regret
from icar_jax.training.tasks.kinds import kind_of


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step over all chips. `model` is what the gradient takes, `recomputed` what the options run once more."""

    model: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.model + self.recomputed


def step_flops(config: ExperimentConfig, arch: ClipArch | ScorerArch) -> StepFlops:
    """Forward and backward of both towers with all exits, and of the logits; a backward pass costs twice its forward pass.

    A tower that is frozen has no backward pass. Computed once more: under remat 'full' the blocks but for their last product,
    under 'dots' their products of activations with each other; where gradients are accumulated the forward pass of what learns;
    the logits where the loss goes in chunks.
    """
    batch, train = config.train.batch_size, config.train
    if not isinstance(arch, ClipArch):
        learns = flops.router_flops(arch)  # all of a ConvNeXt; of a head on a frozen tower the head alone
        teacher = batch * teacher_flops(config) if isinstance(kind_of(config), regret.RegretRun) else 0
        return StepFlops(batch * (flops.complexity_flops(arch) + 2.0 * learns) + teacher, 0.0)
    matrix = logit_flops(arch, batch) // len(arch.vision.all_exits)
    logits = logit_flops(arch, batch) + (matrix if config.loss.mixed else 0)
    model, again = 3 * logits, logits if config.loss.chunk else 0
    if config.loss.distill_kl:  # the logits are there already; the gradient goes to the images of the early exits alone
        model += matrix * len(arch.vision.exits)
    if config.loss.distill_init:
        model += batch * flops.vision_flops(init_weights.saved_clip(config.train.init).vision)
    heads_learn = bool(arch.vision.exits) and "exits" not in train.freeze
    for name, tower in (("image", arch.vision), ("text", arch.text)):
        forward = batch * (image_flops(tower) if name == "image" else flops.text_flops(tower))
        learns = name not in train.freeze
        model += forward * (3 if learns else 1)
        again += batch * recomputed_flops(tower, train.remat) if learns else 0
        again += forward if train.accumulate > 1 and (learns or (name == "image" and heads_learn)) else 0
    return StepFlops(float(model), float(again))


def teacher_flops(config: ExperimentConfig) -> int:
    """Forward FLOPs that a pair costs in the CLIP whose regret is learnt, but for blocks that run for the model anyway."""
    teacher = regret.teacher(config)
    vision = teacher.clip.arch.vision
    shared = flops.trunk_flops(vision, config.complexity.blocks) if config.complexity.blocks else 0
    heads = sum(flops.head_flops(vision, blocks) for blocks in (teacher.exit, vision.depth))
    captions = flops.text_flops(teacher.clip.arch.text) if teacher.reads_captions else 0
    compared = 6 * teacher.negatives * vision.embed_dim  # the image at both depths with their texts, the text with their images
    return flops.trunk_flops(vision, vision.depth) - shared + heads + captions + compared


def image_flops(arch: VisionArch) -> int:
    """Forward FLOPs of one image, with the heads of all exits."""
    return flops.trunk_flops(arch, arch.depth) + sum(flops.head_flops(arch, blocks) for blocks in arch.all_exits)


def recomputed_flops(tower: VisionArch | TextArch, remat: str) -> int:
    """FLOPs that the backward pass of one image or caption repeats in the blocks of its tower."""
    if remat == "none":
        return 0
    macs = 0
    for block in range(1, tower.depth + 1):
        tokens = tower.tokens_after(block) if isinstance(tower, VisionArch) else tower.context_length
        macs += 2 * tokens * tokens * tower.width  # q k^T and p v
        if remat == "full":
            macs += 4 * tokens * tower.width**2 + tokens * tower.width * tower.mlp_width  # q, k, v, out, the first of the MLP
    return 2 * macs


def logit_flops(arch: ClipArch, batch: int) -> int:
    """Forward FLOPs of the logits [B, B] of all exits."""
    return 2 * batch * batch * arch.vision.embed_dim * len(arch.vision.all_exits)

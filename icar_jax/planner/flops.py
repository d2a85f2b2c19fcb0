"""FLOPs of one training step, counted from the configuration and not from the compiled program."""

from __future__ import annotations

from dataclasses import dataclass

from icar_jax.config import ExperimentConfig
from icar_jax.models import flops
from icar_jax.models.clip import ClipArch
from icar_jax.models.flops import image_flops, recomputed_flops
from icar_jax.models.token_router import ScorerArch
from icar_jax.training import init_weights
from icar_jax.training.start import start_of
from icar_jax.training.tasks import regret
from icar_jax.training.tasks.kinds import kind_of


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step summed over all chips: `model` for the gradient, `recomputed` for remat and other recomputation."""

    model: float
    recomputed: float

    @property
    def total(self) -> float:
        return self.model + self.recomputed


def step_flops(config: ExperimentConfig, arch: ClipArch | ScorerArch) -> StepFlops:
    """Returns the FLOPs of forward and backward pass of both towers with all exits, and of the logits.

    A backward pass costs twice its forward pass; a frozen tower has none. Recomputed are: with remat 'full' the blocks except
    their last product; with 'dots' the attention products; with gradient accumulation the forward pass of trained towers; with
    config.loss.chunk the logits.
    """
    batch, train = config.train.batch_size, config.train
    if not isinstance(arch, ClipArch):
        learns = flops.router_flops(arch)  # trained part: the whole ConvNeXt, or only the head on a frozen tower
        teacher = batch * teacher_flops(config) if isinstance(kind_of(config), regret.RegretRun) else 0
        return StepFlops(batch * (flops.complexity_flops(arch) + 2.0 * learns) + teacher, 0.0)
    matrix = logit_flops(arch, batch) // len(arch.vision.all_exits)
    logits = logit_flops(arch, batch) + (matrix if config.loss.mixed else 0)
    model, again = 3 * logits, logits if config.loss.chunk else 0
    if config.loss.distill_kl:  # the logits exist already; only images of early exits get a gradient
        model += matrix * len(arch.vision.exits)
    if config.loss.distill_init:
        model += batch * flops.vision_flops(init_weights.saved_clip(start_of(config)).vision)
    heads_learn = bool(arch.vision.exits) and "exits" not in train.freeze
    for name, tower in (("image", arch.vision), ("text", arch.text)):
        forward = batch * (image_flops(tower) if name == "image" else flops.text_flops(tower))
        learns = not {name, f"{name}_trunk"} & {*train.freeze}  # heads alone cost next to nothing
        model += forward * (3 if learns else 1)
        again += batch * recomputed_flops(tower, train.remat) if learns else 0
        again += forward if train.accumulate > 1 and (learns or (name == "image" and heads_learn)) else 0
    return StepFlops(float(model), float(again))


def teacher_flops(config: ExperimentConfig) -> int:
    """Returns the forward FLOPs per pair of the CLIP teacher of a regret run, without blocks shared with the router."""
    teacher = regret.teacher(config)
    vision = teacher.clip.arch.vision
    shared = flops.trunk_flops(vision, config.complexity.blocks) if config.complexity.blocks else 0
    heads = sum(flops.head_flops(vision, blocks) for blocks in (teacher.exit, vision.depth))
    captions = flops.text_flops(teacher.clip.arch.text) if teacher.reads_captions else 0
    compared = 6 * teacher.negatives * vision.embed_dim  # logits: image at both depths x texts, and text x images
    return flops.trunk_flops(vision, vision.depth) - shared + heads + captions + compared


def logit_flops(arch: ClipArch, batch: int) -> int:
    """Returns the forward FLOPs of the logits [B, B] of all exits, B = `batch`."""
    return 2 * batch * batch * arch.vision.embed_dim * len(arch.vision.all_exits)

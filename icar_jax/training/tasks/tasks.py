"""What is trained: the model, its loss on a batch, and how the result describes itself.

The loop is the same for every task. A loss is a pure function `(params, batch, key) -> (loss, metrics)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from icar_jax import pytree
from icar_jax.config import ExperimentConfig, unknown
from icar_jax.data import images
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import variants
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.token_router import scorer_class
from icar_jax.models.transformer import Execution, block_scales
from icar_jax.parallel.mesh import batch_sharding
from icar_jax.training import init_weights
from icar_jax.training.losses import contrastive, ring
from icar_jax.training.losses import exits as exit_losses
from icar_jax.training.losses.exits import MIXED
from icar_jax.training.tasks import frozen_trunk, init_teacher, regret

_LAYERS, _MIXED_EXITS = 0, 1  # what the key of a step is folded with for each thing that is drawn
NORMALISE = {
    "half": (images.HALF_MEAN, images.HALF_STD),
    "openai": (images.OPENAI_MEAN, images.OPENAI_STD),
    "imagenet": (images.IMAGENET_MEAN, images.IMAGENET_STD),
}


@dataclass(frozen=True)
class Task:
    """A model to train; `fields` names the batch entries that travel to the device."""

    arch: Any  # ClipArch | ComplexityArch | BlocksArch

    kind: str  # clip | complexity: the kind of the finished checkpoint
    shapes: dict[str, Any]
    init: Callable[[jax.Array], dict[str, Any]]
    loss: Callable[[dict, dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]
    # The same loss in two halves, for accumulation: embed(params, batch) -> embeddings with one row a pair, and
    # contrast(params, embeddings, key) -> (loss, metrics). None where a loss does not compare pairs.
    embed: Callable[[dict, dict], dict[str, Any]] | None
    contrast: Callable[[dict, dict, jax.Array], tuple[jax.Array, dict[str, jax.Array]]] | None
    preprocess: Preprocess
    context_length: int  # tokens per caption; 0 where captions are not read
    fields: tuple[str, ...]
    description: dict[str, Any]
    # Shapes of arrays that every batch carries along and that do not learn: {entry of the batch: tree}.
    given: dict[str, pytree.Tree] = field(default_factory=dict)
    # How the pictures are prepared a second time: {entry of the batch: preprocess}.
    others: dict[str, Preprocess] = field(default_factory=dict)
    # draw(batch, key) -> the batch that `embed` takes, with what is drawn for each row of it beside its entries, and what the
    # given parameters say of each row in their place.
    draw: Callable[[dict, jax.Array], dict] = lambda batch, key: batch


def make_task(
    config: ExperimentConfig,
    tokenizer: Tokenizer | None = None,
    mesh: Mesh | None = None,
    class_counts: tuple[int, int] = (1, 1),
) -> Task:
    """The task that `config.task` names. Raises ConfigError for what does not fit the architecture.

    Without a tokenizer the text tower has CLIP's vocabulary. `mesh` is needed where config.loss.chunk passes texts round it.
    `class_counts` are the simple and complex training images, which config.complexity.class_weights weighs by.
    """
    if config.task == "clip":
        return _clip_task(config, tokenizer, mesh)
    if config.task == "complexity":
        return _complexity_task(config, class_counts)
    raise unknown("config.task", config.task, ("clip", "complexity"))


def _preprocess(config: ExperimentConfig, image_size: int, resize: str) -> Preprocess:
    mean, std = NORMALISE[config.data.normalise]
    return Preprocess(image_size, resize, config.data.interpolation, mean, std)


def clip_arch(config: ExperimentConfig, tokenizer: Tokenizer | None) -> ClipArch:
    """The architecture of the clip task: the variant, the tokenizer's vocabulary, and a logit bias for the sigmoid loss."""
    sizes = (tokenizer.vocab_size, tokenizer.end_id) if tokenizer is not None else ()
    arch = variants.clip_arch(config.clip, *sizes)
    if config.train.init:
        arch = init_weights.adopt(arch, config.train.init)
    return dataclasses.replace(arch, logit_bias=config.loss.kind == "sigmoid")


def _clip_task(config: ExperimentConfig, tokenizer: Tokenizer | None, mesh: Mesh | None) -> Task:
    arch = clip_arch(config, tokenizer)
    # Without it the compiler cuts the width of the activations over fsdp inside a scan.
    sharding = batch_sharding(mesh) if mesh is not None else None
    dtype = jnp.dtype(config.train.dtype)
    clip = Clip.graph(arch, execution=Execution(config.train.remat, config.train.scan_blocks, sharding), dtype=dtype)
    exits = arch.vision.all_exits
    weights = contrastive.exit_weights(config.loss.exit_weights, exits)
    preprocess = _preprocess(config, arch.vision.image_size, config.data.resize)

    form = {"kind": config.loss.kind, "direction": config.loss.direction}
    compare = partial(contrastive.per_exit, **form)
    if config.loss.chunk:
        assert mesh is not None, "config.loss.chunk passes texts round a mesh"
        compare = partial(ring.per_exit, **form, mesh=mesh, chunk=config.loss.chunk)

    dropout = config.train.layer_dropout
    origin = None
    if config.loss.distill_init:
        origin = init_teacher.anchor(config, preprocess, Execution("none", config.train.scan_blocks, sharding), dtype)

    def draw(batch, key):
        batch = batch if origin is None else origin.embed(batch)
        if not dropout:
            return batch
        scales = block_scales(jax.random.fold_in(key, _LAYERS), len(batch["image"]), arch.vision.depth, dropout)
        return {**batch, "block_scales": scales if sharding is None else jax.lax.with_sharding_constraint(scales, sharding)}

    def embed(params, batch):
        pixels = normalise(batch["image"], preprocess.mean, preprocess.std)
        image = clip.encode_image_exits(params, pixels, scales=batch.get("block_scales"))
        # Text keys: JAX orders the keys of a dict, and integers and strings cannot be ordered together.
        found = {"image": {str(e): z for e, z in image.items()}, "text": clip.encode_text(params, batch["tokens"])}
        return found if origin is None else {**found, init_teacher.IMAGE: batch[init_teacher.IMAGE]}

    def contrast(params, embeddings, key):
        image, text, full = {e: embeddings["image"][str(e)] for e in exits}, embeddings["text"], arch.vision.depth
        scales = clip.logit_scales(params)
        biases = clip.logit_biases(params) if arch.logit_bias else None
        if config.loss.mixed:  # one more gallery, at full depth's temperature and bias
            compared = image | {MIXED: exit_losses.mixed_images(image, jax.random.fold_in(key, _MIXED_EXITS))}
            per_exit = compare(compared, text, *({**own, MIXED: own[full]} if own else None for own in (scales, biases)))
        else:
            per_exit = compare(image, text, scales, biases)
        metrics = {f"loss_{e}": per_exit[e] for e in exits}
        metrics |= {f"scale_{e}": scales[e] for e in exits}
        total = sum(weights[e] * per_exit[e] for e in exits)
        if config.loss.mixed:
            metrics["loss_mixed"] = per_exit[MIXED]
            total = total + config.loss.mixed * per_exit[MIXED]
        if config.loss.distill_cosine:
            metrics["distill_cosine"] = exit_losses.distill_cosine(image, full)
            total = total + config.loss.distill_cosine * metrics["distill_cosine"]
        if config.loss.distill_init:
            metrics["distill_init"] = exit_losses.distill_init(image, embeddings[init_teacher.IMAGE], weights)
            total = total + config.loss.distill_init * metrics["distill_init"]
        if config.loss.distill_kl:
            metrics["distill_kl"] = exit_losses.distill_kl(image, text, scales, full)
            total = total + config.loss.distill_kl * metrics["distill_kl"]
        return total, metrics

    def loss(params, batch, key):
        return contrast(params, embed(params, draw(batch, key)), key)

    return Task(
        arch,
        "clip",
        clip.shapes,
        lambda key: Clip.init(key, arch, config.clip.exit_start),
        loss,
        embed,
        contrast,
        preprocess,
        arch.text.context_length,
        ("image", "tokens"),
        {"arch": dataclasses.asdict(arch), "preprocess": preprocess.to_dict()},
        given={} if origin is None else {init_teacher.PARAMS: origin.shapes},
        draw=draw,
    )


def given_params(config: ExperimentConfig, task: Task) -> dict[str, pytree.Tree]:
    """Values of `task.given`, for `initial.place`, from the checkpoints that the configuration names. Raises ConfigError.

    Rivals are not among them: `rivals.embed` makes them of these and of the training set.
    """
    read = {
        regret.CLIP: lambda shapes: regret.params(config, shapes),
        init_teacher.PARAMS: lambda _: init_teacher.params(config),
    }
    return {name: read[name](shapes) for name, shapes in task.given.items() if name in read}


def _complexity_task(config: ExperimentConfig, class_counts: tuple[int, int]) -> Task:
    arch = variants.complexity_arch(config.complexity)
    described = {"arch": dataclasses.asdict(arch)}
    if frozen_trunk.has_tower(config):
        preprocess = frozen_trunk.preprocess(config)
        described["tower"] = frozen_trunk.origin(config)
    else:
        preprocess = _preprocess(config, arch.image_size, config.data.resize)
    model = scorer_class(arch).graph(arch, dtype=config.train.dtype)
    threshold = config.complexity.threshold
    if regret.has_regret(config):
        return _regret_task(config, model, preprocess, described)
    weights = contrastive.class_weights(config.complexity.class_weights, class_counts)

    def loss(params, batch, key):
        pixels = normalise(batch["image"], preprocess.mean, preprocess.std)
        logits = model.logits(params, pixels, key)
        return contrastive.complexity_loss(logits, batch["complexity"], arch.head, threshold, weights), {}

    return _scorer_task(model, loss, preprocess, ("image", "complexity"), described)


def _regret_task(config: ExperimentConfig, model: Graph, preprocess: Preprocess, described: dict[str, Any]) -> Task:
    """The complexity task whose targets are the ranks of the images' regrets in the batch, instead of ratings."""
    arch, teacher = model.arch, regret.teacher(config)
    blocks = arch.blocks if frozen_trunk.has_tower(config) else 0
    others = regret.others(teacher, preprocess, bool(blocks))

    def loss(params, batch, key):
        pixels, tokens = normalise(batch["image"], preprocess.mean, preprocess.std), None
        if blocks:  # both go on from the same tokens
            tokens = model.tokens(params, pixels)
            logits = model.logits_of_tokens(params, tokens, key)
        else:
            logits = model.logits(params, pixels, key)
        target, metrics = teacher.target(batch, tokens, blocks)
        return contrastive.complexity_loss(logits, target, arch.head, 0.0), metrics

    fields = ("image", *others, *(("tokens",) if teacher.reads_captions else ()), *((regret.INDEX,) if teacher.rivals else ()))
    given = {regret.CLIP: teacher.clip.shapes} | ({regret.RIVALS: regret.rival_shapes(teacher)} if teacher.rivals else {})
    described = {**described, "target": "regret", "regret": teacher.description}
    task = _scorer_task(model, loss, preprocess, fields, described)
    length = teacher.clip.arch.text.context_length if teacher.reads_captions else 0
    return dataclasses.replace(task, context_length=length, given=given, others=others)


def _scorer_task(model: Graph, loss: Callable, preprocess: Preprocess, fields: tuple[str, ...], described: dict) -> Task:
    """The task of a complexity model, whose pairs are not compared; it reads no captions."""
    return Task(
        model.arch,
        "complexity",
        model.shapes,
        lambda key: scorer_class(model.arch).init(key, model.arch),
        loss,
        None,
        None,
        preprocess,
        0,
        fields,
        {**described, "preprocess": preprocess.to_dict()},
    )

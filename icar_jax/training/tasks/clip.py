"""Training CLIP with early exits: contrastive losses at every exit and at full depth, and distillation across depths."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from icar_jax import architectures, checkpoint, pytree
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data.loader.kept import KeptOutputs
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.encoders import unit_norm
from icar_jax.models.mesh_attention import attention_on
from icar_jax.models.ops import normalise
from icar_jax.models.transformer import Execution, block_scales
from icar_jax.parallel.mesh import BATCH_AXES, batch_sharding
from icar_jax.training import frozen_outputs, init_weights, start
from icar_jax.training.losses import contrastive, ring
from icar_jax.training.losses import exits as exit_losses
from icar_jax.training.losses.crossget import cross_loss
from icar_jax.training.losses.exits import MIXED
from icar_jax.training.preemption import StopRequest
from icar_jax.training.tasks import init_teacher
from icar_jax.training.tasks.base import NOTHING, Task, preprocess_of
from icar_jax.training.tasks.kind import RunKind, described

IMAGE_IDS = "index"  # entry of the batch: number of the image in its source
CAPTIONS_FOR_TOKENIZER = 20_000  # maximum number of images whose captions a tokenizer is trained on
_LAYERS, _MIXED_EXITS, _SCHEDULE = 0, 1, 2  # folded into the key of a step for each random draw


class ClipRun(RunKind):
    """`config.task` 'clip'."""

    unit: ClassVar[str] = "pairs"
    trains_clip: ClassVar[bool] = True

    @property
    def best_by(self) -> str:
        return "recall"

    def check_architecture(self) -> None:
        architectures.clip_arch(self.config.clip, start=self._start_arch())

    def arch(self, tokenizer: Tokenizer | None) -> ClipArch:
        """Returns the variant with the tokenizer's vocabulary, and a logit bias for the sigmoid loss."""
        config, base = self.config, self._start_arch()
        plain = dataclasses.replace(config.clip, reduce="none")  # a share of FLOPs is solved for the tower that is trained
        if config.clip.variant == architectures.INIT:
            arch = architectures.clip_arch(plain, start=base)
        else:
            sizes = (tokenizer.vocab_size, tokenizer.end_id) if tokenizer is not None else ()
            arch = architectures.clip_arch(plain, *sizes)
        if self.start is not None:
            arch = init_weights.adopt(arch, self.start)
        arch = architectures.reduced_clip(config.clip, arch)
        return dataclasses.replace(arch, logit_bias=config.loss.kind == "sigmoid")

    def _start_arch(self) -> ClipArch | None:
        return None if self.start is None else init_weights.saved_clip(self.start)

    def task(
        self, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None, class_counts: tuple[int, int] = (1, 1)
    ) -> Task:
        described = {} if self.start is None else start.describe(self.start, "clip")
        return _task(self.config, self.arch(tokenizer), mesh, described.get("preprocess", {}))

    def tokenizer(self, source: Source, resumed: Path | None) -> Tokenizer:
        return tokenizer_of(self.config, source, resumed)

    @property
    def still_needs_init(self) -> bool:
        return bool(self.config.loss.distill_init)

    def require_same(self, workdir: Path) -> None:
        init_teacher.require_same(self.config, described(workdir), workdir)

    def kept_outputs(
        self, task: Task, source: Source, tokenizer: Tokenizer | None, params: Mapping[str, Any], mesh: Mesh,
        request: StopRequest,
    ) -> KeptOutputs | None:  # fmt: skip
        if not self.config.train.cache_frozen:
            return KeptOutputs()
        assert tokenizer is not None, "a CLIP run has a tokenizer"
        clip = Clip.graph(task.arch, dtype=jnp.dtype(self.config.train.dtype))
        return frozen_outputs.kept_outputs(self.config, clip, task.preprocess, source, tokenizer, params, mesh, request)

    def frozen_params(self, task: Task) -> dict[str, pytree.Tree]:
        return {init_teacher.PARAMS: init_teacher.params(self.config)} if task.frozen else {}


def tokenizer_of(config: ExperimentConfig, source: Source, resumed: Path | None) -> Tokenizer:
    """Returns the tokenizer of a resumed run, the configured one, that of the start, or one trained on the captions.

    Raises ConfigError if the configured tokenizer does not match that of the start, or if none would match.
    """
    if resumed is not None:
        return Tokenizer.from_file(resumed / checkpoint.TOKENIZER)
    init, file = start.start_of(config), config.data.tokenizer
    named = "" if init is None else start.named(init)
    kept = None if init is None else start.load_tokenizer(init)
    theirs = Tokenizer.from_json(kept, f"the tokenizer of {named}") if kept is not None else None
    if file:
        given = Tokenizer.from_file(file)
        if theirs is not None and not given.same_ids(theirs):
            raise ConfigError(
                f"config.data.tokenizer={file} gives other ids than the tokenizer that the text tower of "
                f"{named} was trained with; leave config.data.tokenizer empty to use that one"
            )
        return given
    if theirs is not None:
        return theirs
    if init is not None:
        raise ConfigError(
            f"{named} has no tokenizer, and one trained on the captions would not match its text tower; pass "
            "the one it was trained with: --config.data.tokenizer=PATH"
        )
    count = min(len(source), CAPTIONS_FOR_TOKENIZER)
    captions = (caption for i in range(count) for caption in source[i].captions)
    return Tokenizer.train(captions, config.data.vocabulary)


def _task(config: ExperimentConfig, arch: ClipArch, mesh: Mesh | None, start_preprocess: Mapping[str, Any]) -> Task:
    # Sharding constraint on the residual stream: without it XLA shards its width over fsdp inside a scan.
    sharding = batch_sharding(mesh) if mesh is not None else None
    dtype = jnp.dtype(config.train.dtype)
    attention = None if mesh is None else attention_on(NamedSharding(mesh, PartitionSpec(BATCH_AXES, None, "tensor")))
    execution = Execution(config.train.remat, config.train.scan_blocks, sharding)
    exits = arch.vision.depths
    # One structure for each schedule of token reduction; all have the same parameters.
    numbers = range(len(arch.vision.schedules) + 1)
    each = [dataclasses.replace(arch, vision=arch.vision.with_schedule(number)) for number in numbers]
    clips = [Clip.graph(own, execution=execution, attention=attention, dtype=dtype) for own in each]
    clip, crossed = clips[0], bool(config.loss.cross)
    weights = contrastive.exit_weights(config.loss.exit_weights, exits)
    preprocess = preprocess_of(config, arch.vision.image_size, start_preprocess)

    form = {"kind": config.loss.kind, "direction": config.loss.direction}
    compare = partial(contrastive.per_exit, **form)
    if config.loss.chunk:
        assert mesh is not None, "config.loss.chunk needs a mesh"
        compare = partial(ring.per_exit, **form, mesh=mesh, chunk=config.loss.chunk)

    dropout = config.train.layer_dropout
    teacher = None
    if config.loss.distill_init:
        teacher = init_teacher.teacher(config, preprocess, Execution("none", config.train.scan_blocks, sharding), dtype)

    def draw(batch, key, frozen=NOTHING):
        batch = batch if teacher is None else {**batch, init_teacher.IMAGE: teacher.embed(frozen, batch["image"])}
        if len(clips) > 1:
            drawn = jax.random.randint(jax.random.fold_in(key, _SCHEDULE), (), 0, len(clips))
            batch = {**batch, "schedule": jnp.broadcast_to(drawn, len(batch["image"]))}
        if not dropout:
            return batch
        scales = block_scales(jax.random.fold_in(key, _LAYERS), len(batch["image"]), arch.vision.depth, dropout)
        return {**batch, "block_scales": scales if sharding is None else jax.lax.with_sharding_constraint(scales, sharding)}

    def embed_images(params, batch):
        if frozen_outputs.IMAGE in batch:
            kept = batch[frozen_outputs.IMAGE]  # [B, blocks, parts, W]
            flat = kept if kept.shape[2] == 2 else kept[:, :, 0]
            found = clip.vision.of_pooled(params["vision"], {n: flat[:, i] for i, n in enumerate(arch.vision.read_blocks)})
            return {e: unit_norm(z) for e, z in found.items()}, ()
        pixels = normalise(batch["image"], preprocess.mean, preprocess.std)
        scales = batch.get("block_scales")

        def encode_image(own):
            if crossed:
                return lambda p, x: own.encode_image_with_cross(p, x, exits, scales)
            return lambda p, x: (own.encode_image_exits(p, x, None, scales), ())

        ways = [encode_image(own) for own in clips]
        return ways[0](params, pixels) if len(ways) == 1 else jax.lax.switch(batch["schedule"][0], ways, params, pixels)

    def embed_texts(params, batch):
        if frozen_outputs.TEXT in batch:
            return unit_norm(clip.text.of_pooled(params["text"], batch[frozen_outputs.TEXT])), ()
        if crossed:
            return clip.encode_text_with_cross(params, batch["tokens"])
        return clip.encode_text(params, batch["tokens"]), ()

    def embed(params, batch):
        image, cross = embed_images(params, batch)
        text = embed_texts(params, batch)
        # String keys: JAX sorts the keys of a dict and cannot sort integers with strings.
        found = {"image": {str(e): z for e, z in image.items()}, "text": text[0]}
        if crossed:
            found["cross"] = (cross, text[1])
        if IMAGE_IDS in batch:
            found[IMAGE_IDS] = batch[IMAGE_IDS]
        return found if teacher is None else {**found, init_teacher.IMAGE: batch[init_teacher.IMAGE]}

    def contrast(params, embeddings, key):
        image, text, full = {e: embeddings["image"][str(e)] for e in exits}, embeddings["text"], arch.vision.depth
        scales = clip.logit_scales(params)
        biases = clip.logit_biases(params) if arch.logit_bias else None
        ids = {"ids": embeddings[IMAGE_IDS]} if IMAGE_IDS in embeddings else {}
        if config.loss.mixed:  # one more set of images, with full depth's temperature and bias
            compared = image | {MIXED: exit_losses.mixed_images(image, jax.random.fold_in(key, _MIXED_EXITS))}
            per_exit = compare(compared, text, *({**own, MIXED: own[full]} if own else None for own in (scales, biases)), **ids)
        else:
            per_exit = compare(image, text, scales, biases, **ids)
        metrics = {f"loss_{e}": per_exit[e] for e in exits}
        metrics |= {f"scale_{e}": scales[e] for e in exits}
        total = sum(weights[e] * per_exit[e] for e in exits)
        if config.loss.mixed:
            metrics["loss_mixed"] = per_exit[MIXED]
            total = total + config.loss.mixed * per_exit[MIXED]
        if crossed:
            metrics["loss_cross"] = cross_loss(*embeddings["cross"], config.loss.cross_form)
            total = total + config.loss.cross * metrics["loss_cross"]
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

    def loss(params, batch, key, frozen=NOTHING):
        return contrast(params, embed(params, draw(batch, key, frozen)), key)

    image_kept, text_kept = frozen_outputs.parts(config, clip.shapes, arch)
    read = (frozen_outputs.IMAGE if image_kept else "image", frozen_outputs.TEXT if text_kept else "tokens")
    return Task(
        arch,
        "clip",
        clip.shapes,
        lambda key: Clip.init(key, arch, config.clip.exit_start),
        loss,
        preprocess,
        (*read, *((IMAGE_IDS,) if config.loss.image_ids else ())),
        {"arch": dataclasses.asdict(arch), "preprocess": preprocess.to_dict()},
        arch.text.context_length,
        draw,
        embed,
        contrast,
        frozen={} if teacher is None else {init_teacher.PARAMS: teacher.shapes},
    )

"""Training a complexity model on ratings, and a summary of the ratings before the run starts."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from icar_jax import architectures, checkpoint
from icar_jax import workdir as files
from icar_jax.config import ConfigError, ExperimentConfig
from icar_jax.data import configured
from icar_jax.data.images import Preprocess
from icar_jax.data.ratings.balance import balance
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.complexity import ComplexityModel
from icar_jax.models.functional import Graph
from icar_jax.models.ops import normalise
from icar_jax.models.token_router import TokenRouter, scorer_class
from icar_jax.models.variants import BLOCKS
from icar_jax.training.losses import contrastive
from icar_jax.training.tasks import frozen_trunk
from icar_jax.training.tasks.base import NOTHING, Task, preprocess_of
from icar_jax.training.tasks.kind import START, RunKind, described

LOOKED_AT = 2000  # maximum number of scenes to survey: generating all of them would take minutes


@dataclass(frozen=True)
class RatingsSummary:
    """Summary of the ratings of a run.

    Attributes:
        lines: text to print.
        splits: content of WORKDIR/splits.json.
        class_counts: numbers of simple and complex training images.
        content: fingerprint of the images and ratings of all splits, independent of their paths.
    """

    lines: tuple[str, ...]
    splits: dict[str, Any]
    class_counts: tuple[int, int]
    content: str

    def write(self, workdir: Path) -> None:
        """Writes WORKDIR/splits.json. Raises OSError."""
        files.write_text(workdir / files.SPLITS, json.dumps(self.splits, indent=1, ensure_ascii=False) + "\n")


class ScorerRun(RunKind):
    """Base of the runs that train a complexity model: a ConvNeXt, or with variant 'blocks' a head on frozen CLIP blocks."""

    @property
    def on_trunk(self) -> bool:
        """Whether the model is a head on the frozen first blocks of a CLIP."""
        return self.config.complexity.variant == BLOCKS

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        return (*self.config.train.freeze, "tower") if self.on_trunk else self.config.train.freeze

    def check_architecture(self) -> None:
        architectures.complexity_arch(self.config.complexity)

    def start_description(self) -> dict[str, Any] | None:
        return checkpoint.describe(frozen_trunk.folder(self.config)) if self.on_trunk else super().start_description()

    @property
    def starts_from_weights(self) -> bool:
        return self.on_trunk or super().starts_from_weights

    def initial_params(self, task: Task, note: Callable[[str], None]) -> Mapping[str, Any]:
        if self.on_trunk:
            return frozen_trunk.params(self.config, task.shapes, self.random_params(task))
        return super().initial_params(task, note)

    def recalled(self, workdir: Path) -> ExperimentConfig:
        config, clip = super().recalled(workdir), self.config.complexity.clip
        if not described(workdir).is_file() or not files.has_checkpoint(workdir):
            return config
        if self.on_trunk and not self.still_needs_clip and not Path(clip).exists():
            config = dataclasses.replace(config, complexity=dataclasses.replace(config.complexity, clip=str(workdir / START)))
        return config

    @property
    def still_needs_clip(self) -> bool:
        """Whether a resumed run still reads the weights of config.complexity.clip."""
        return False

    def model(self) -> tuple[Graph[ComplexityModel] | Graph[TokenRouter], Preprocess, dict[str, Any]]:
        """Returns (model, preprocessing, first entries of the checkpoint description). Raises ConfigError."""
        arch = architectures.complexity_arch(self.config.complexity)
        description: dict[str, Any] = {"arch": dataclasses.asdict(arch)}
        if self.on_trunk:
            preprocess = frozen_trunk.preprocess(self.config)
            description["tower"] = frozen_trunk.origin(self.config)
        else:
            preprocess = preprocess_of(self.config, arch.image_size)
        return scorer_class(arch).graph(arch, dtype=self.config.train.dtype), preprocess, description


def scorer_task(
    model: Graph,
    loss: Callable[..., Any],
    preprocess: Preprocess,
    fields: tuple[str, ...],
    description: Mapping[str, Any],
    **more: Any,
) -> Task:
    """Returns the task of a complexity model; `more` are further fields of Task."""
    init = lambda key: scorer_class(model.arch).init(key, model.arch)
    described = {**description, "preprocess": preprocess.to_dict()}
    return Task(model.arch, "complexity", model.shapes, init, loss, preprocess, fields, described, **more)


class RatingsRun(ScorerRun):
    """`config.task` 'complexity' with `config.complexity.target` 'rating'."""

    @property
    def best_by(self) -> str:
        return "pcc" if self.config.complexity.head == "regression" else "loss"

    def survey(self, source: Source) -> RatingsSummary:
        return survey(self.config, source)

    def task(
        self, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None, class_counts: tuple[int, int] = (1, 1)
    ) -> Task:
        model, preprocess, description = self.model()
        c = self.config.complexity
        weights = contrastive.class_weights(c.class_weights, class_counts)

        def loss(params, batch, key, frozen=NOTHING):
            pixels = normalise(batch["image"], preprocess.mean, preprocess.std)
            logits = model.logits(params, pixels, key)
            return contrastive.complexity_loss(logits, batch["complexity"], model.arch.head, c.threshold, weights), {}

        return scorer_task(model, loss, preprocess, ("image", "complexity"), description)


def survey(config: ExperimentConfig, source: Source) -> RatingsSummary:
    """Returns a summary of the training ratings. Raises ConfigError if a classifier has images of only one class."""
    c = config.complexity
    found = balance(configured.scores(source, LOOKED_AT), c.head, c.threshold, len(source))
    if c.head == "classification" and 0 in found.classes:
        raise ConfigError(
            f"config.complexity.head='classification' needs images of both classes, but of {sum(found.counts)} training images "
            f"{found.classes[0]} are simple and {found.classes[1]} complex; see config.complexity.threshold={c.threshold}"
        )
    rated = configured.rated(config.data)
    if rated is None:
        how = "scenes: drawn from (split, index); no two splits share a scene"
        splits: dict[str, Any] = {"how": how, "counts": {config.data.train_split: len(source)}, "notes": []}
        content: dict[str, Any] = {}
    else:
        names = dict(zip(rated.source.names, rated.split_of, strict=True))
        splits = {"how": rated.how, "counts": rated.counts, "notes": list(rated.notes), "splits": names}
        content = {split: configured.fingerprint(rated.split(split)) for split in sorted(rated.counts)}
    splits = {"training_ratings": found.to_dict(), **splits}
    lines = [*splits["notes"], f"Splits: {_counts(splits['counts'])} ({splits['how']})", *found.lines(c.class_weights)]
    return RatingsSummary(tuple(lines), splits, found.classes, json.dumps(content, sort_keys=True))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in sorted(counts.items()))

"""What differs between the kinds of run. The rest of training asks a `RunKind`, never the configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from icar_jax import checkpoint, pytree
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.training import init_weights
from icar_jax.training.preemption import StopRequest
from icar_jax.training.tasks.base import Frozen, Task

START = "start"  # of a workdir: the description of the checkpoint that the run is initialised from


@dataclasses.dataclass(frozen=True)
class RunKind:
    """One kind of run: `ClipRun`, `RatingsRun` or `RegretRun`, as `kinds.kind_of(config)` picks it."""

    config: ExperimentConfig

    unit: ClassVar[str] = "images"  # that speed is counted in
    trains_clip: ClassVar[bool] = False

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        """Groups of parameters, and regular expressions, that do not learn (training/optimizer.py)."""
        return self.config.train.freeze

    @property
    def best_by(self) -> str:
        """The validation metric that chooses the best checkpoint: 'recall', 'pcc' or 'loss'."""
        raise NotImplementedError

    def check_architecture(self) -> None:
        """Raises ConfigError for an unknown variant, a misplaced exit or a bad size, before any data is opened."""
        raise NotImplementedError

    def task(
        self, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None, class_counts: tuple[int, int] = (1, 1)
    ) -> Task:
        """The task. Raises ConfigError for what does not fit the architecture.

        tokenizer: None gives the text tower CLIP's vocabulary. mesh: needed where config.loss.chunk passes texts round it.
        class_counts: simple and complex training images, which config.complexity.class_weights weighs by.
        """
        raise NotImplementedError

    def tokenizer(self, source: Source, resumed: Path | None) -> Tokenizer | None:
        """The tokenizer of the captions that the run reads; None where it reads none."""
        return None

    def survey(self, source: Source) -> Any | None:
        """The ratings of the training images (`ratings.RatingsSummary`); None where the run learns no ratings."""
        return None

    def require_images(self, count: int) -> None:
        """Raises ConfigError where `count` training images are too few."""

    # --- weights it is initialised from ---

    def initialised_from(self) -> Path | None:
        """The checkpoint that the run is initialised from; None for random weights. Raises ConfigError."""
        init = self.config.train.init
        return init_weights.find(init, self.config.task) if init else None

    @property
    def starts_from_weights(self) -> bool:
        return bool(self.config.train.init)

    def initial_params(self, task: Task, note: Callable[[str], None]) -> Mapping[str, Any]:
        """The parameters that a run starts from where `starts_from_weights`; leaves are read when asked for.

        Raises ConfigError where they do not fit the task's model.
        """
        c = self.config
        init_weights.note_preprocessing(c.train.init, task.kind, task.preprocess, note)
        return init_weights.load_params(
            c.train.init, task.kind, task.arch, task.shapes, self.random_params(task), note, c.clip.exit_start
        )

    def random_params(self, task: Task) -> Callable[[], pytree.Tree]:
        """A function that draws the random parameters of a run without weights."""
        return lambda: jax.device_get(task.init(jax.random.key(self.config.train.seed)))

    @property
    def still_needs_init(self) -> bool:
        """Whether a continued run reads the weights of config.train.init."""
        return False

    def recalled(self, workdir: Path) -> ExperimentConfig:
        """The configuration, with WORKDIR/start for a checkpoint that has gone and that a continued run does not read.

        Only the architecture is read from there.
        """
        if not (files.has_checkpoint(workdir) and described(workdir).is_file()):
            return self.config
        train = self.config.train
        if train.init and not self.still_needs_init and not Path(train.init).exists():
            train = dataclasses.replace(train, init=str(workdir / START))
        return dataclasses.replace(self.config, train=train)

    def remember(self, workdir: Path) -> None:
        """Writes the descriptions of the checkpoints that the run needs, unless it is continued. Raises OSError, ConfigError.

        WORKDIR/start/icar.json is that of the checkpoint it is initialised from.
        """
        copy = described(workdir)
        if files.has_checkpoint(workdir) and copy.is_file():
            return
        if (origin := self.initialised_from()) is not None:
            files.write_text(copy, (origin / checkpoint.DESCRIPTION).read_text(encoding="utf-8"))

    def require_same(self, workdir: Path) -> None:
        """Raises ConfigError where a continued run would learn from another frozen model than before."""

    # --- frozen models beside the one that learns ---

    def frozen_params(self, task: Task) -> dict[str, pytree.Tree]:
        """The entries of `task.frozen` that checkpoints hold, float32 numpy. Raises ConfigError where they are damaged."""
        return {}

    def embedded_params(
        self, task: Task, source: Source, tokenizer: Tokenizer | None, frozen: Frozen, request: StopRequest
    ) -> dict[str, pytree.Tree] | None:
        """The entries of `task.frozen` that the training images give through `frozen`; None where a signal stopped it."""
        return {}


def described(workdir: Path) -> Path:
    """The file that describes the checkpoint which the run in `workdir` was initialised from."""
    return workdir / START / checkpoint.DESCRIPTION

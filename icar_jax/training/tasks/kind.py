"""Base class of the kinds of run. Everything that depends on the kind goes through a `RunKind`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from icar_jax import checkpoint, pytree
from icar_jax import workdir as files
from icar_jax.config import ExperimentConfig
from icar_jax.data.loader.kept import KeptOutputs
from icar_jax.data.records import Source
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.training import init_weights
from icar_jax.training.preemption import StopRequest
from icar_jax.training.start import Start, describe, start_of
from icar_jax.training.tasks.base import Frozen, Task

START = "start"  # folder in a workdir: the description of the checkpoint that the run is initialised from


@dataclasses.dataclass(frozen=True)
class RunKind:
    """One kind of run: `ClipRun`, `RatingsRun` or `RegretRun`, selected by `kinds.kind_of(config)`."""

    config: ExperimentConfig

    unit: ClassVar[str] = "images"  # unit of throughput
    trains_clip: ClassVar[bool] = False

    @property
    def frozen_groups(self) -> tuple[str, ...]:
        """Frozen parameter groups and regular expressions of paths (training/optimizer.py)."""
        return self.config.train.freeze

    @property
    def best_by(self) -> str:
        """The validation metric that selects the best checkpoint: 'recall', 'pcc' or 'loss'."""
        raise NotImplementedError

    def check_architecture(self) -> None:
        """Raises ConfigError for an unknown variant, an invalid exit or size; called before any data is opened."""
        raise NotImplementedError

    def task(
        self, tokenizer: Tokenizer | None = None, mesh: Mesh | None = None, class_counts: tuple[int, int] = (1, 1)
    ) -> Task:
        """Returns the task. Raises ConfigError for settings that are incompatible with the architecture.

        Args:
            tokenizer: None gives the text tower CLIP's vocabulary.
            mesh: required by config.loss.chunk.
            class_counts: numbers of simple and complex training images, for config.complexity.class_weights.
        """
        raise NotImplementedError

    def tokenizer(self, source: Source, resumed: Path | None) -> Tokenizer | None:
        """Returns the tokenizer of the captions; None if the run reads no captions."""
        return None

    def survey(self, source: Source) -> Any | None:
        """Returns a summary of the training ratings (`ratings.RatingsSummary`); None if the run has no ratings."""
        return None

    def require_images(self, count: int) -> None:
        """Raises ConfigError if `count` training images are too few."""

    # --- initial weights ---

    @property
    def start(self) -> Start | None:
        """The checkpoint that the run is initialised from; None for random weights. Raises ConfigError."""
        return start_of(self.config)

    def start_description(self) -> dict[str, Any] | None:
        """Returns the description (icar.json) of `start`; None for random weights. Raises ConfigError."""
        return None if self.start is None else describe(self.start, self.config.task)

    @property
    def starts_from_weights(self) -> bool:
        return bool(self.config.train.init or self.config.train.init_image)

    def initial_params(self, task: Task, note: Callable[[str], None]) -> Mapping[str, Any]:
        """Returns the initial parameters of a run with `starts_from_weights`; leaves are read lazily.

        Raises ConfigError if they are incompatible with the task's model.
        """
        start = self.start
        assert start is not None, "random weights"
        init_weights.note_preprocessing(start, task.kind, task.preprocess, note)
        random, exit_start = self.random_params(task), self.config.clip.exit_start
        return init_weights.load_params(start, task.kind, task.arch, task.shapes, random, note, exit_start)

    def random_params(self, task: Task) -> Callable[[], pytree.Tree]:
        """Returns a function that draws random parameters from config.train.seed, as host arrays."""
        return lambda: jax.device_get(task.init(jax.random.key(self.config.train.seed)))

    @property
    def still_needs_init(self) -> bool:
        """Whether a resumed run still reads the weights of config.train.init."""
        return False

    def recalled(self, workdir: Path) -> ExperimentConfig:
        """Returns the configuration, with WORKDIR/start in place of a deleted checkpoint whose weights are no longer needed.

        Only the architecture is read from WORKDIR/start.
        """
        if not (files.has_checkpoint(workdir) and described(workdir).is_file()):
            return self.config
        train = self.config.train
        sources = [path for path in (train.init, train.init_image, train.init_text) if path]
        if not self.still_needs_init and not all(Path(path).exists() for path in sources):
            train = dataclasses.replace(train, init=str(workdir / START), init_image="", init_text="")
        return dataclasses.replace(self.config, train=train)

    def remember(self, workdir: Path) -> None:
        """Copies the description of the initial checkpoint to WORKDIR/start/icar.json, unless the run is resumed.

        Raises OSError, ConfigError.
        """
        copy = described(workdir)
        if files.has_checkpoint(workdir) and copy.is_file():
            return
        if (description := self.start_description()) is not None:
            files.write_text(copy, json.dumps(description, indent=2) + "\n")

    def require_same(self, workdir: Path) -> None:
        """Raises ConfigError if a resumed run would learn from another frozen model than before."""

    # --- frozen models ---

    def frozen_params(self, task: Task) -> dict[str, pytree.Tree]:
        """Returns the entries of `task.frozen` read from checkpoints, float32 numpy. Raises ConfigError if damaged."""
        return {}

    def kept_outputs(
        self, task: Task, source: Source, tokenizer: Tokenizer | None, params: Mapping[str, Any], mesh: Mesh,
        request: StopRequest,
    ) -> KeptOutputs | None:  # fmt: skip
        """Returns the outputs of frozen trunks that replace images and captions; None if a stop signal arrived."""
        return KeptOutputs()

    def embedded_params(
        self, task: Task, source: Source, tokenizer: Tokenizer | None, frozen: Frozen, request: StopRequest
    ) -> dict[str, pytree.Tree] | None:
        """Returns the entries of `task.frozen` that are embeddings of training images; None if a stop signal arrived."""
        return {}


def described(workdir: Path) -> Path:
    """Returns the file with the description of the checkpoint that the run in `workdir` was initialised from."""
    return workdir / START / checkpoint.DESCRIPTION

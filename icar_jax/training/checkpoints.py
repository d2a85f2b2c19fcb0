"""Training state on disk: asynchronous Orbax checkpoints in WORKDIR/checkpoints, restored onto the present mesh."""

from __future__ import annotations

from pathlib import Path

import orbax.checkpoint as ocp

from icar_jax.training.step import State


class StateStore:
    """Saves and restores the training state; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, keep: int):
        self._manager = ocp.CheckpointManager(
            (workdir / "checkpoints").absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
        )

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *exc) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest completed checkpoint; one cut off while it was written does not count."""
        return self._manager.latest_step()

    def save(self, step: int, state: State) -> None:
        """Starts writing; returns once the arrays may be changed again."""
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, abstract: State) -> State:
        """The state of `step`, laid out as `abstract` says. Raises ValueError where the structures differ."""
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

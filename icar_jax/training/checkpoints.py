"""Training state on disk: asynchronous Orbax checkpoints in WORKDIR/checkpoints, restored onto the present mesh.

And the finished model: gathered and written leaf by leaf, so that no machine holds more than one whole leaf beside its share.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError
from icar_jax.errors import IcarError
from icar_jax.parallel import distributed
from icar_jax.training.step import State
from icar_jax.workdir import CHECKPOINTS


class SaveError(IcarError, RuntimeError):
    """A training state could not be written; the checkpoints that were complete before it stay as they are."""


class StateStore:
    """Saves and restores the training state; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, keep: int):
        self._workdir = workdir
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS).absolute(),
            # Folders of saves that were cut off are never read, but they would fill the disk.
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, enable_async_checkpointing=True, cleanup_tmp_directories=True
            ),
        )
        self._complete = self._manager.latest_step()

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.wait()
        except SaveError:
            if kind is None:  # else the fault that ended the run is the one to report
                raise
        finally:
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """The newest completed checkpoint; one cut off while it was written does not count."""
        return self._complete

    @property
    def newest(self) -> int | None:
        """The newest checkpoint, be it on disk or on its way there."""
        return self._saving or self._complete

    def save(self, step: int, state: State) -> None:
        """Starts writing; returns once the arrays may be changed again. Raises SaveError, for the save before too."""
        self.wait()
        self._saving = step
        try:
            saved = self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            raise self._failed(error) from error
        if not saved:
            raise SaveError(f"the state of step {step} was not written into {self._workdir / CHECKPOINTS}")

    def check(self) -> None:
        """Raises SaveError where the save in the background has failed; does not wait for it."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Returns when everything is on disk; raises SaveError."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._complete, self._saving = self._saving, None

    def restore(self, step: int, abstract: State) -> State:
        """The state of `step`, laid out as `abstract` says. Raises SaveError where the structures differ."""
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except ValueError as error:
            raise SaveError(
                f"the checkpoint of step {step} in {self._workdir / CHECKPOINTS} does not hold what this run needs: "
                f"{_first_line(error)}. It may be of another version of icar_jax, which kept the state of "
                "config.optim.clip_norm=0 otherwise; continue it with that version, or start from its weights in a new "
                "--workdir"
            ) from error

    def _failed(self, error: Exception) -> SaveError:
        step, self._saving = self._saving, None
        intact = f"the one of step {self._complete} is intact" if self._complete else "there is none yet"
        free = shutil.disk_usage(self._workdir).free
        return SaveError(
            f"the checkpoint of step {step} could not be written into {self._workdir / CHECKPOINTS}: "
            f"{_first_line(error)}. Of earlier checkpoints {intact}; {gib(free)} are free on that disk. "
            "Make room, or raise the limit, and run the same command again"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def gib(size: float) -> str:
    """Bytes as text in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def require_space(workdir: Path, abstract: State, keep: int, models: int) -> None:
    """Raises ConfigError where the disk cannot hold what the run will write.

    That is keep + 1 states, as the oldest goes only when the newest is complete, and `models` models with one being
    replaced; what the workdir already holds counts as room.
    """
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    model = sum(4 * leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    need = (keep + 1) * state + (models + 1) * model
    folders = [workdir / CHECKPOINTS, *(workdir / name for name in ("model", "best"))]
    there = sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file())
    existing = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if need > free + there:
        raise ConfigError(
            f"--workdir={workdir}: the run needs {gib(need)} ({keep} + 1 checkpoints of {gib(state)}, and models of "
            f"{gib(model)}), but {gib(free)} are free there; make room, lower config.train.keep={keep}, or choose another disk"
        )


class _Whole:
    """A leaf that becomes a numpy array when it is asked for, once; asking is a collective."""

    def __init__(self, leaf: jax.Array):
        self.shape = leaf.shape
        self._leaf: jax.Array | None = leaf

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.take()
        assert values is not None, "only the main process reads values"
        return np.asarray(values, dtype)

    def take(self) -> np.ndarray | None:
        leaf, self._leaf = self._leaf, None
        return None if leaf is None else distributed.to_main(leaf)


def write_model(
    path: Path, kind: str, description: Mapping[str, Any], params: Mapping[str, Any], tokenizer: str | None
) -> Path:
    """Writes sharded parameters as a self-describing checkpoint; called by every process, written by the first."""
    leaves = {name: _Whole(leaf) for name, leaf in pytree.flatten(params).items()}
    with distributed.together(f"writing {path}"):
        try:
            if distributed.is_main():
                checkpoint.write(path, kind, description, pytree.unflatten(leaves), tokenizer)
        finally:
            for leaf in leaves.values():  # the same order everywhere, also where writing failed on the way
                leaf.take()
    return path

"""Saves and restores the training state (asynchronous Orbax checkpoints in WORKDIR/checkpoints); writes the finished model.

A state is restored onto the current mesh. The model is gathered and written leaf by leaf, so a host holds at most one full
leaf in addition to its own shards.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError
from icar_jax.errors import IcarError
from icar_jax.parallel import distributed
from icar_jax.training.step import State
from icar_jax.workdir import CHECKPOINTS

DAMAGED = "damaged"  # folder in a workdir: checkpoints that could not be read


class SaveError(IcarError, RuntimeError):
    """A training state could not be written or restored; earlier complete checkpoints are not affected."""


class StateStore:
    """Saves and restores the training state; a context manager that waits for the last save."""

    def __init__(self, workdir: Path, keep: int):
        self._workdir = workdir
        self._saving: int | None = None
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS).absolute(),
            # Named, since Orbax guesses it from the newest checkpoint, which may be damaged.
            item_handlers=ocp.StandardCheckpointHandler(),
            # Orbax never reads the folders of interrupted saves, but they would fill the disk.
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
            if kind is None:  # otherwise the exception that ended the run is the one to report
                raise
        finally:
            self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none; interrupted saves do not count."""
        return self._complete

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint, complete or still being written; None if there is none."""
        return self._saving or self._complete

    def save(self, step: int, state: State) -> None:
        """Starts an asynchronous save; returns once the arrays may be donated. Raises SaveError, also for the previous save."""
        self.wait()
        self._saving = step
        try:
            saved = self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
        except Exception as error:
            raise self._failed(error) from error
        if not saved:
            raise SaveError(f"the state of step {step} was not written into {self._workdir / CHECKPOINTS}")

    def check(self) -> None:
        """Raises SaveError if the background save has failed; does not wait for it."""
        try:
            self._manager.check_for_errors()
        except Exception as error:
            raise self._failed(error) from error

    def wait(self) -> None:
        """Blocks until the pending save is on disk. Raises SaveError if it failed."""
        if self._saving is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self._complete, self._saving = self._saving, None

    def restore_newest(self, abstract: State) -> tuple[int, State | None]:
        """Returns (step, state) of the newest checkpoint that can be read, with the shapes, dtypes and shardings of `abstract`.

        (0, None) if nothing was saved. Where the newest ones are damaged, the one before them is read; they are moved to
        WORKDIR/damaged with a warning that names them, so that their steps can be saved again. Raises SaveError if none can be
        read, and where several processes train, for the first that cannot: they have to agree.
        """
        newest = distributed.from_main(self._complete or 0)  # other hosts may see it late on a network disk
        if not newest:
            return 0, None
        faults: dict[int, Exception] = {}
        for step in sorted((step for step in self._manager.all_steps() if step <= newest), reverse=True):
            try:
                with distributed.together(f"reading the checkpoint of step {step}"):
                    state = self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except distributed.PeerError:
                raise
            except Exception as error:  # of Orbax, TensorStore, JSON and the file system, by what is damaged
                faults[step] = error
                if jax.process_count() > 1:
                    break
                continue
            self._move_aside(faults, step)
            self._complete = step
            return step, state
        step, error = next(iter(faults.items()))
        raise SaveError(self._unreadable(step, error)) from error

    def _unreadable(self, step: int, error: Exception) -> str:
        folder = self._workdir / CHECKPOINTS / str(step)
        if "do not match" in str(error) or "does not match" in str(error) or "mismatch" in str(error):
            return (
                f"the checkpoint of step {step} in {folder.parent} does not match the state of this run: {_first_line(error)}. "
                "It may come from another version of icar_jax, which stored the optimizer state for "
                "config.optim.clip_norm=0 differently; resume with that version, or start from its weights in a new "
                "--workdir"
            )
        return (
            f"the checkpoint in {folder} is damaged and cannot be read ({_first_line(error):.200}); delete that folder and run "
            "the same command again, which continues from the checkpoint before it, or from step 0 if there is none"
        )

    def _move_aside(self, faults: Mapping[int, Exception], step: int) -> None:
        for damaged, error in faults.items():
            folder = self._workdir / CHECKPOINTS / str(damaged)
            target = self._workdir / DAMAGED / str(damaged)
            shutil.rmtree(target, ignore_errors=True)  # of an earlier start
            target.parent.mkdir(exist_ok=True)
            folder.rename(target)
            logging.warning(
                "the checkpoint in %s is damaged (%s); the run continues from step %d, and the damaged one was moved to %s",
                folder, _first_line(error)[:200], step, target,
            )  # fmt: skip
        if faults:
            self._manager.reload()

    def _failed(self, error: Exception) -> SaveError:
        step, self._saving = self._saving, None
        intact = f"the checkpoint of step {self._complete} is intact" if self._complete else "there is no earlier checkpoint"
        free = shutil.disk_usage(self._workdir).free
        return SaveError(
            f"the checkpoint of step {step} could not be written into {self._workdir / CHECKPOINTS}: "
            f"{_first_line(error)}; {intact}. {gib(free)} are free on that disk. "
            "Free disk space, or raise the quota, and run the same command again"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def gib(size: float) -> str:
    """Formats a size in bytes as GiB (from 0.1 GiB) or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def require_space(workdir: Path, abstract: State, keep: int, models: int) -> None:
    """Raises ConfigError if the disk has too little free space for the run.

    The run needs keep + 1 states, because the oldest is deleted only after the newest is complete, and `models` + 1 models,
    because one is being replaced. Files that the workdir already holds count as free space.
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
            f"{gib(model)}), but {gib(free)} are free there; free some, lower config.train.keep={keep}, or use another disk"
        )


class _Whole:
    """A sharded leaf that is gathered to a numpy array on first read; the gather is a collective."""

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
    """Writes sharded parameters as a self-describing checkpoint; returns `path`.

    Every process must call it; process 0 writes. Raises OSError, NotFinite, or PeerError where another process failed.
    """
    leaves = {name: _Whole(leaf) for name, leaf in pytree.flatten(params).items()}
    with distributed.together(f"writing {path}"):
        try:
            if distributed.is_main():
                checkpoint.write(path, kind, description, pytree.unflatten(leaves), tokenizer)
        finally:
            for leaf in leaves.values():  # the same order on every process, also if writing failed halfway
                leaf.take()
    return path

"""The workdir of a run: files, locking, and checks that a resumed or evaluated run has the same configuration and data.

WORKDIR/config.json    the ExperimentConfig
WORKDIR/data.json      the training images: their number and a hash of their names
WORKDIR/splits.json    complexity runs only: the split of every image, and the distribution of the ratings
WORKDIR/tokenizer.json, metrics.jsonl, checkpoints/, best/ (with config.train.keep_best), and at the end model/
WORKDIR/.lock          locked while a training runs
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from absl import logging

from icar_jax.config import ConfigError, ExperimentConfig, from_dict, to_json
from icar_jax.files import json_file

CONFIG, DATA, SPLITS, CHECKPOINTS, TOKEN = "config.json", "data.json", "splits.json", "checkpoints", ".processes"
LOCK = ".lock"

# Fields that may change when a run is resumed without changing its result. Fields on how a step is computed (mesh, remat, ...)
# change only rounding, so a run can move to other machines.
FREE_ON_RESUME = (
    "config.train.log_every", "config.train.checkpoint_every", "config.train.keep", "config.train.tensorboard",
    "config.train.eval_every", "config.train.eval_split", "config.train.keep_best", "config.train.patience",
    "config.train.accumulate", "config.train.remat", "config.data.ratings", "config.data.bad_share",
    "config.train.scan_blocks", "config.loss.chunk", "config.mesh", "config.eval",
    "config.data.root", "config.data.json", "config.data.images", "config.data.workers", "config.data.threads",
    "config.data.retries", "config.data.stall_timeout_s",
    "config.data.scenes_kept",
)  # fmt: skip
# Fields that may also change when a run is resumed but do change its result from there on; changes are logged.
STEERING = (
    "config.train.steps", "config.train.epochs", "config.optim.lr", "config.optim.exit_lr", "config.optim.temperature_lr",
    "config.optim.rates", "config.optim.warmup_steps", "config.optim.final_lr", "config.optim.weight_decay",
    "config.optim.clip_norm",
)  # fmt: skip
# Fields that an evaluation does not use. Model and training data must be as in training, or training images could end up in
# the gallery or in the calibration set.
FREE_ON_EVALUATION = (
    "config.train", "config.optim", "config.loss", "config.mesh", "config.eval", "config.complexity",
    "config.data.root", "config.data.json", "config.data.images", "config.data.ratings", "config.data.bad_share",
    "config.data.workers", "config.data.threads", "config.data.retries", "config.data.stall_timeout_s",
    "config.data.scenes_kept",
)  # fmt: skip


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a UTF-8 file atomically: a reader sees either the old or the complete new text. Raises OSError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file atomically: a reader sees either the old or the complete new content. Raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_config(workdir: Path, config: ExperimentConfig) -> None:
    """Writes WORKDIR/config.json. Raises OSError."""
    write_text(workdir / CONFIG, to_json(config) + "\n")


def load_config(workdir: str | os.PathLike) -> ExperimentConfig:
    """Returns the configuration of a run. Raises ConfigError if it is missing, damaged or has unknown fields."""
    file = Path(workdir) / CONFIG
    values = _read(file)
    try:
        return from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{file} not found: {file.parent} is not a workdir of train.py")
    try:
        return json_file.read_object(file, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"{error}: the file is damaged; restore it, or use a new --workdir") from error


def has_checkpoint(workdir: Path) -> bool:
    """Returns whether a training state was saved, so that the run can be resumed."""
    return last_checkpoint(workdir) > 0


def last_checkpoint(workdir: Path) -> int:
    """Returns the step of the newest complete training state; 0 if there is none."""
    folder = workdir / CHECKPOINTS
    return max((int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()), default=0) if folder.is_dir() else 0


def require_same_config(workdir: Path, config: ExperimentConfig, free: Iterable[str]) -> None:
    """Raises ConfigError naming every field not in `free` that differs from the run in `workdir`."""
    found = _changes(dataclasses.asdict(load_config(workdir)), dataclasses.asdict(config), tuple(free))
    if found:
        changed = "; ".join(f"{path} was {then!r}, now {now!r}" for path, (then, now) in found.items())
        raise ConfigError(
            f"{workdir} contains a run with another configuration; pass the flags it was trained with, or use another "
            f"--workdir: {changed}"
        )


def steered(workdir: Path, config: ExperimentConfig) -> dict[str, tuple[Any, Any]]:
    """Returns {field: (old value, new value)} for the fields of STEERING that differ from the run in `workdir`."""
    found = _changes(dataclasses.asdict(load_config(workdir)), dataclasses.asdict(config), ())
    return {path: values for path, values in found.items() if path in STEERING}


def _changes(then: dict, now: dict, free: tuple[str, ...], prefix: str = "config") -> dict[str, tuple[Any, Any]]:
    """{field: (old value, new value)} for the fields not in `free` that differ."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in now.items():
        path = f"{prefix}.{key}"
        if path in free:
            continue
        if isinstance(value, dict):
            found |= _changes(then[key], value, free, path)
        elif then[key] != value:
            found[path] = then[key], value
    return found


def recover(workdir: Path, names: Iterable[str] = ("model", "best")) -> None:
    """Deletes temporary folders of a killed checkpoint writer; restores the old checkpoint if the new one is not in place."""
    for name in names:
        leftovers = sorted(workdir.glob(f".{name}.*"))
        for old in leftovers:
            if old.suffix == ".old" and not (workdir / name).exists():
                os.replace(old, workdir / name)
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)


def save_data(workdir: Path, fingerprint: dict[str, Any]) -> None:
    """Writes the fingerprint of the training images to WORKDIR/data.json. Raises OSError."""
    write_text(workdir / DATA, json.dumps(fingerprint) + "\n")


def require_same_data(workdir: Path, fingerprint: dict[str, Any], otherwise: str = "start again in a new --workdir") -> None:
    """Raises ConfigError if the training images differ from those the run started with.

    The order of batches depends on their number, so a resumed run would not be the same run. Also, images that were trained on
    could be in a held-out split now. `otherwise` is the alternative to restoring them that the message offers.
    """
    before = _read(workdir / DATA)
    if before != fingerprint:
        raise ConfigError(
            f"the training images changed since the run in {workdir} started: {before['images']} images then, "
            f"{fingerprint['images']} now, or other names or ratings; restore them, or {otherwise}"
        )


def trained_on(workdir: Path) -> tuple[set[str], str]:
    """Returns (names of the rated images that a complexity run was trained on, their folder).

    The set is empty if the run was not trained on rated files. Raises ConfigError if `workdir` is not a workdir or is damaged.
    """
    data = load_config(workdir).data
    splits = _read(workdir / SPLITS).get("splits", {}) if (workdir / SPLITS).is_file() else {}
    return {name for name, split in splits.items() if split in data.train_split.split("+")}, data.root


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Context manager that locks `workdir`, because two training processes would mix their checkpoints.

    Raises ConfigError if another process holds the lock, OSError if the folder cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it when the process ends
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"--workdir={workdir} is in use: another training writes to it ({file.read().strip() or 'unknown'}); "
                "wait for it or stop it, or use another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s cannot be locked (%s): make sure that no other training writes to it", workdir, error.strerror)
        with suppress(OSError):  # the text is informational
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def write_token(workdir: Path, token: int) -> None:
    """Writes a random number that the other processes of a run must read. Raises OSError."""
    write_text(workdir / TOKEN, str(token))


def require_token(workdir: Path, token: int, wait_s: float = 90.0) -> None:
    """Raises ConfigError if the number written by process 0 cannot be read, so `workdir` is not a shared folder.

    Waits up to `wait_s` seconds, because NFS caches a missing name for up to 60 s.
    """
    file, until = workdir / TOKEN, time.monotonic() + wait_s
    while True:
        try:
            if file.read_text(encoding="utf-8") == str(token):
                return
        except OSError:
            pass
        if time.monotonic() > until:
            raise ConfigError(
                f"--workdir={workdir} is not the same folder in all processes: a file written by process 0 is not visible "
                "here; use a folder on a file system that all machines share"
            )
        time.sleep(0.2)

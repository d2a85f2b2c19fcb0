"""The folder of a run: its configuration as JSON, compared when the run is continued or evaluated.

WORKDIR/config.json    the ExperimentConfig
WORKDIR/data.json      what was trained on: number of images and a hash of their names
WORKDIR/splits.json    of a complexity run: the split of every image, and how the ratings are spread
WORKDIR/tokenizer.json, metrics.jsonl, checkpoints/, best/ where it was asked for, and at the end model/
WORKDIR/.lock          held while a training runs
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

CONFIG, DATA, SPLITS, CHECKPOINTS, TOKEN = "config.json", "data.json", "splits.json", "checkpoints", ".processes"
LOCK = ".lock"

# Fields that may change when a run is continued; a change of any other would make it another run. Those on how a step is
# computed (the mesh, remat, ...) change nothing but rounding, so that a run can move to other machines.
FREE_ON_RESUME = (
    "config.train.log_every", "config.train.checkpoint_every", "config.train.keep", "config.train.tensorboard",
    "config.train.eval_every", "config.train.eval_split", "config.train.keep_best", "config.train.patience",
    "config.train.accumulate", "config.train.remat", "config.data.ratings", "config.data.bad_share",
    "config.train.scan_blocks", "config.loss.chunk", "config.mesh", "config.eval",
    "config.data.root", "config.data.workers", "config.data.threads", "config.data.retries", "config.data.stall_timeout_s",
    "config.data.scenes_kept",
)  # fmt: skip
# Fields that steer a run from where it stands. They may change too, which makes it another run from there on, and so is logged.
STEERING = (
    "config.train.steps", "config.train.epochs", "config.optim.lr", "config.optim.exit_lr", "config.optim.temperature_lr",
    "config.optim.rates", "config.optim.warmup_steps", "config.optim.final_lr", "config.optim.weight_decay",
    "config.optim.clip_norm",
)  # fmt: skip
# Fields that an evaluation does not use. What the model is and what it was trained on must be as in training, or images
# that were trained on could end up in the gallery or in the calibration set.
FREE_ON_EVALUATION = (
    "config.train", "config.optim", "config.loss", "config.mesh", "config.eval", "config.complexity",
    "config.data.root", "config.data.ratings", "config.data.bad_share", "config.data.workers", "config.data.threads",
    "config.data.retries", "config.data.stall_timeout_s", "config.data.scenes_kept",
)  # fmt: skip


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file in one step: a reader sees the old text or the whole new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """The same of bytes."""
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
    write_text(workdir / CONFIG, to_json(config) + "\n")


def load_config(workdir: str | os.PathLike) -> ExperimentConfig:
    """The configuration a run was started with. Raises ConfigError where it is missing, unreadable or unknown."""
    return from_dict(_read(Path(workdir) / CONFIG))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ConfigError(f"{file} not found: {file.parent} is no workdir of train.py")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); restore it, or use a new --workdir") from error


def has_checkpoint(workdir: Path) -> bool:
    """Whether a training state was saved; until then the workdir holds no run that could be continued."""
    return last_checkpoint(workdir) > 0


def last_checkpoint(workdir: Path) -> int:
    """Step of the newest training state that is complete; 0 where there is none."""
    folder = workdir / CHECKPOINTS
    return max((int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()), default=0) if folder.is_dir() else 0


def require_same_config(workdir: Path, config: ExperimentConfig, free: Iterable[str]) -> None:
    """Raises ConfigError naming every field, outside `free`, that differs from the run in `workdir`."""
    found = _changes(dataclasses.asdict(load_config(workdir)), dataclasses.asdict(config), tuple(free))
    if found:
        changed = "; ".join(f"{path} was {then!r}, now {now!r}" for path, (then, now) in found.items())
        raise ConfigError(
            f"{workdir} holds a run with another configuration; pass the flags it was trained with, or use another "
            f"--workdir: {changed}"
        )


def steered(workdir: Path, config: ExperimentConfig) -> dict[str, tuple[Any, Any]]:
    """Fields of STEERING that differ from the run in `workdir` -> (what they were, what they are now)."""
    found = _changes(dataclasses.asdict(load_config(workdir)), dataclasses.asdict(config), ())
    return {path: values for path, values in found.items() if path in STEERING}


def _changes(then: dict, now: dict, free: tuple[str, ...], prefix: str = "config") -> dict[str, tuple[Any, Any]]:
    """Fields outside `free` that differ -> (what they were, what they are now)."""
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
    """Clears away what a killed writer of checkpoint folders left, and puts back the old one if it had just been moved."""
    for name in names:
        leftovers = sorted(workdir.glob(f".{name}.*"))
        for old in leftovers:
            if old.suffix == ".old" and not (workdir / name).exists():
                os.replace(old, workdir / name)
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)


def save_data(workdir: Path, fingerprint: dict[str, Any]) -> None:
    write_text(workdir / DATA, json.dumps(fingerprint) + "\n")


def require_same_data(workdir: Path, fingerprint: dict[str, Any], otherwise: str = "start again in a new --workdir") -> None:
    """Raises ConfigError where the training images are no longer those the run was started on.

    The order is a function of their number, so with other images a continued run would not be the same run; and images that
    were trained on could be among those that are held out now. `otherwise` is what the message offers beside restoring them.
    """
    before = _read(workdir / DATA)
    if before != fingerprint:
        raise ConfigError(
            f"the training images changed since the run in {workdir} began: {before['images']} images then, "
            f"{fingerprint['images']} now, or other names or ratings; restore them, or {otherwise}"
        )


def trained_on(workdir: Path) -> tuple[set[str], str]:
    """(names of the rated images that a complexity run was trained on, the folder they were in).

    No names where the images were not files of ratings. Raises ConfigError for what is no workdir, or a damaged one.
    """
    data = load_config(workdir).data
    splits = _read(workdir / SPLITS).get("splits", {}) if (workdir / SPLITS).is_file() else {}
    return {name for name, split in splits.items() if split in data.train_split.split("+")}, data.root


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Held by the process that trains in `workdir`: two would mix their checkpoints.

    Raises ConfigError while another process holds it, OSError where the folder cannot be written.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with (workdir / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"--workdir={workdir} is in use: another training writes to it ({file.read().strip() or 'unknown'}); "
                "wait for it or stop it, or use another --workdir"
            ) from None
        except OSError as error:
            logging.warning("%s has no locks (%s): see to it that no other training writes to it", workdir, error.strerror)
        with suppress(OSError):  # it only says who it is
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def write_token(workdir: Path, token: int) -> None:
    """Leaves a number for the other processes of a run to find."""
    write_text(workdir / TOKEN, str(token))


def require_token(workdir: Path, token: int, wait_s: float = 90.0) -> None:
    """Raises ConfigError where the number that process 0 left is not seen: then this is not the same folder.

    Waits a while: NFS looks again for a name that it did not find after up to 60 s.
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
                f"--workdir={workdir} is not the same folder in all processes: what process 0 wrote there is not seen here; "
                "use a folder on a file system that all machines share"
            )
        time.sleep(0.2)

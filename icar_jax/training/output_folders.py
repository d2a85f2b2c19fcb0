"""The folders in which outputs of frozen trunks are kept: their place, their bound, and the writing of their rows."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax import program_cache
from icar_jax.config import ConfigError, TrainConfig
from icar_jax.data.loader.kept import DONE, FIRST, ROWS, KeptRows
from icar_jax.workdir import write_text

_PROGRESS = "progress.json"


def root_of(config: TrainConfig) -> Path:
    """Returns config.train.cache_folder, or its place in the user's cache folder. Raises ConfigError if that is off."""
    if given := config.cache_folder:
        return Path(given).absolute()
    user = program_cache.user_folder()
    if user is None:
        raise ConfigError(
            f"config.train.cache_frozen=True keeps outputs in the user's cache folder, which {program_cache.VARIABLE} switches "
            "off; name another with config.train.cache_folder"
        )
    return user / "outputs"


def folder_of(root: Path, kind: str, about: Mapping[str, Any]) -> Path:
    """Returns the folder of an output, named by a hash of all that it depends on. Raises ConfigError if it cannot be made."""
    folder = root / f"{kind}-{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"{root} cannot be written: {error.strerror}"
        raise ConfigError(f"config.train.cache_folder: {why}; name another folder") from error
    return folder


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks a folder while its rows are computed; another run waits and then finds them."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make_room(root: Path, keep: list[Path], size: int, gigabytes: float) -> None:
    """Removes the least recently used folders, other than `keep`, until `size` more bytes fit.

    Raises ConfigError if they cannot fit the bound, or the disk.
    """
    bound = gigabytes * 1e9
    folders = [path for path in root.iterdir() if path.is_dir() and path.name.startswith(("image-", "text-"))]
    sizes = {path: sum(file.stat().st_size for file in path.iterdir() if file.is_file()) for path in folders}
    needed = size + sum(sizes[path] for path in keep if path in sizes)
    if needed > bound:
        raise ConfigError(
            f"config.train.cache_gb={gigabytes:g}, but the outputs of this run need {needed / 1e9:.2g} GB; raise it, or set "
            "config.train.cache_frozen=False"
        )
    free = shutil.disk_usage(root).free
    for path in sorted(sizes.keys() - {*keep}, key=lambda path: path.stat().st_mtime):
        if sum(sizes.values()) + size <= bound and free >= size:
            break
        shutil.rmtree(path, ignore_errors=True)
        free += sizes.pop(path)
    if free < size:
        raise ConfigError(
            f"{root} has {free / 1e9:.1f} GB of free disk, and the outputs of this run need {size / 1e9:.1f} GB; free some, or "
            "name another folder with config.train.cache_folder"
        )


class RowWriter:
    """Writes rows one after the other; what was written before an interruption is kept.

    Attributes:
        done: images that were read. rows: rows that were written.
        places: int64 [images], the row of each; -1 for those without.
    """

    def __init__(self, rows: KeptRows, images: int):
        self._folder, self._bytes = rows.folder, rows.row_bytes
        self.done = self.rows = 0
        self.places = np.full(images, -1, np.int64)
        with contextlib.suppress(OSError, ValueError, KeyError):
            if images:
                state = json.loads((self._folder / _PROGRESS).read_text(encoding="utf-8"))
                places = np.fromfile(self._folder / FIRST, np.int64)
                if len(places) == images and os.path.getsize(self._folder / ROWS) >= state["rows"] * self._bytes:
                    self.done, self.rows = state["done"], state["rows"]
                    self.places = np.where(np.arange(images) < self.done, places, -1)

    def __enter__(self) -> RowWriter:
        self._file = (self._folder / ROWS).open("r+b" if self.rows else "wb")
        self._file.truncate(self.rows * self._bytes)
        self._file.seek(self.rows * self._bytes)
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def add(self, output: np.ndarray, indices: np.ndarray | None) -> None:
        """Appends rows; `indices` of their images, None for captions."""
        self._file.write(np.ascontiguousarray(output).tobytes())
        if indices is not None:
            self.places[indices] = np.arange(self.rows, self.rows + len(indices))
        self.rows += len(output)

    def advance(self, images: int, save: bool) -> None:
        """Counts images as read; `save` makes that a state to resume from."""
        self.done += images
        if save:
            self._flush()
            (self._folder / FIRST).write_bytes(self.places.tobytes())
            write_text(self._folder / _PROGRESS, json.dumps({"done": self.done, "rows": self.rows}))

    def finish(self, first: np.ndarray) -> None:
        """Writes the numbers of the first rows, and that all is complete."""
        self._flush()
        (self._folder / FIRST).write_bytes(first.astype(np.int64).tobytes())
        write_text(self._folder / DONE, json.dumps({"rows": self.rows}))
        (self._folder / _PROGRESS).unlink(missing_ok=True)

    def _flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

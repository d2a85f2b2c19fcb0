"""The folder of a profile: DIR/summary.json and DIR/trace; further processes have theirs in DIR/process_I."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from icar_jax import workdir as files
from icar_jax.errors import ConfigError, DataError
from icar_jax.files import json_file

SUMMARY, TRACE = "summary.json", "trace"
MADE_BY = {"made_by": "icar --profile"}


def require_usable(folder: Path) -> None:
    """Raises ConfigError if `folder` holds something else than an earlier profile or cannot be written; changes nothing."""
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--profile={folder} is a file; name a folder")
        if folder.exists() and any(folder.iterdir()) and not _is_profile(folder):
            raise ConfigError(
                f"--profile={folder} exists, is not empty and holds no earlier profile; name another folder as --profile=DIR"
            )
        nearest = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise _unwritable(folder, f"{nearest} is {'read-only for this user' if nearest.is_dir() else 'a file'}")


def claim(folder: Path) -> None:
    """Makes `folder` and deletes the trace of an earlier profile in it. Raises ConfigError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / TRACE, ignore_errors=True)
        files.write_text(folder / SUMMARY, json.dumps({**MADE_BY, "finished": False}) + "\n")
    except OSError as error:
        raise _unwritable(folder, error) from error


def _is_profile(folder: Path) -> bool:
    try:
        found = json_file.read_object(folder / SUMMARY)
    except DataError:
        return False
    return MADE_BY.items() <= found.items()


def _unwritable(folder: Path, why: object) -> ConfigError:
    return ConfigError(f"--profile={folder} cannot be written: {why}; name another folder as --profile=DIR")

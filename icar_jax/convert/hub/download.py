"""Downloads a model that is named on the Hugging Face hub into the hub's own cache.

Downloads, the cache and its folder, the token, progress bars and HF_HUB_OFFLINE are those of huggingface_hub. Only the files
that are read are fetched, and interrupted downloads go on where they stopped.
"""

from __future__ import annotations

import errno
import glob
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import ModuleType

from absl import logging

from icar_jax import extras
from icar_jax.config import HubName, hub_name
from icar_jax.convert import folder as folders
from icar_jax.convert.fields import ConvertError, read_json

_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(/|$)")
_FILES = (*folders.SUFFIXES, ".json", ".gz", ".npz")  # endings that tell a path from a name
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # raise where the hub cannot be reached


def local(path: str | os.PathLike) -> Path:
    """`path`, or where it does not exist and names a repository on the hub, the folder (or file) that this was downloaded to.

    A string owner/name is a name unless it exists, its first part is a folder here, or it ends as a file does; a path object is
    never one. Raises ConvertError where the repository cannot be downloaded, ConfigError for a broken hf:// name.
    """
    if os.path.exists(path) or (name := hub_name(path)) is None:
        return Path(path)
    if not name.explicit and (os.path.isdir(str(path).partition("/")[0]) or str(path).endswith(_FILES)):
        return Path(path)
    return _download(name)


def origin_of(file: Path) -> dict[str, str]:
    """{"repository": owner/name, "commit": hash} of a file in a cache of the hub; empty for any other file."""
    found = _SNAPSHOT.search(str(file.absolute()))
    return {"repository": f"{found['owner']}/{found['name']}", "commit": found["commit"]} if found else {}


def library(name: HubName) -> ModuleType:
    """huggingface_hub. Raises ConvertError where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ModuleNotFoundError as error:
        if error.name != "huggingface_hub":
            raise
        missing = "" if name.explicit else f"{name} is neither a file nor a folder here; "
        what = extras.advice("a name on the Hugging Face hub", "huggingface_hub", extras.EXTRAS["huggingface_hub"])
        raise ConvertError(missing + what) from error
    return huggingface_hub


class Unreachable(ConvertError):
    """The hub does not answer, or must not be asked."""


@contextmanager
def errors(name: HubName, doing: str) -> Iterator[None]:
    """Raises errors of huggingface_hub and of its network as ConvertErrors of one line; `doing` is 'download' or 'upload'."""
    hub = library(name)
    known, place = hub.errors, f"{hub.constants.ENDPOINT}/{name.repository}"
    try:
        yield
    except known.GatedRepoError as error:
        raise ConvertError(
            f"{name} is gated: accept its terms at {place}, and log in with `hf auth login` or set HF_TOKEN; then try again"
        ) from error
    except known.RepositoryNotFoundError as error:
        here = "" if name.explicit else ", and no file or folder here has this name"
        raise ConvertError(
            f"{name.repository} is no repository on the Hugging Face hub{here}; check the name at {place}. If it is private, "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except known.RevisionNotFoundError as error:
        raise ConvertError(
            f"{name.repository} has no revision {name.revision!r}; expected a branch, tag or commit of {place}"
        ) from error
    except known.OfflineModeIsEnabled as error:
        raise Unreachable(
            f"cannot {doing} {name}: HF_HUB_OFFLINE is set; unset it, or give a folder of this machine"
        ) from error
    except known.HFValidationError as error:
        raise ConvertError(f"{name} is no name of a repository: {_line(error)}") from error
    except known.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "")
        how = "; log in with `hf auth login` or set HF_TOKEN with the right to write" if status in (401, 403) else ""
        raise _kind_of(status)(f"cannot {doing} {name}: the hub answered {status}: {_line(error)}{how}") from error
    # The accelerated transfer raises RuntimeError, also for a full disk.
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or "no space left" in str(error).lower():
            where = hub.constants.HF_HUB_CACHE
            raise ConvertError(
                f"cannot {doing} {name}: no space left on the disk of {where}; free some and try again, which goes on where it "
                "stopped, or set HF_HOME to a folder on another disk"
            ) from error
        if type(error).__module__.partition(".")[0] in _CLIENTS or isinstance(error, TimeoutError):
            raise Unreachable(
                f"cannot {doing} {name}: the hub cannot be reached ({_line(error) or type(error).__name__}); check the "
                "connection and try again, which goes on where it stopped"
            ) from error
        if isinstance(error, OSError | RuntimeError) or type(error).__module__.startswith("huggingface_hub"):
            raise ConvertError(f"cannot {doing} {name}: {_line(error)}; try again, which goes on where it stopped") from error
        raise


def _kind_of(status: int | str) -> Callable[[str], ConvertError]:
    return Unreachable if isinstance(status, int) and status >= 500 else ConvertError


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _download(name: HubName) -> Path:
    """The file or folder of the cache with everything that is read of the repository."""
    hub = library(name)
    try:
        with errors(name, "download"):
            wait = hub.constants.HF_HUB_ETAG_TIMEOUT  # seconds; of the environment
            info = hub.HfApi().model_info(name.repository, revision=name.revision or None, timeout=wait)
    except Unreachable as error:
        return _cached(name, error)
    names = [entry.rfilename for entry in info.siblings or ()]
    inside, wanted = _wanted(name, names, str(name))
    folder = _fetch(name, wanted)
    if shards := [shard for entry in wanted if entry.endswith(".index.json") for shard in _shards(folder, entry)]:
        _fetch(name, shards)
    return folder / inside if inside else folder


def _shards(folder: Path, index: str) -> list[str]:
    """The files that an index lists, as far as it can be read; reading the weights says what is wrong with it."""
    listed = read_json(folder / index).get("weight_map")
    names = {name for name in listed.values() if isinstance(name, str)} if isinstance(listed, dict) else set()
    return sorted((PurePosixPath(index).parent / name).as_posix() for name in names)


def _wanted(name: HubName, names: list[str], where: str) -> tuple[str, list[str]]:
    """(what the name names inside the repository, the files of the repository that are read)."""
    inside = name.inside.strip("/")
    folder, file = inside, ""
    if inside in names:
        folder, _, file = inside.rpartition("/")
    prefix = f"{folder}/" if folder else ""
    below = [entry.removeprefix(prefix) for entry in names if entry.startswith(prefix)]
    if inside and not below:
        raise ConvertError(f"{name} has neither a file nor a folder {inside!r}; it holds {', '.join(sorted(names)[:20])}")
    return inside, [prefix + entry for entry in folders.needed(below, where, file)]


def _fetch(name: HubName, files: list[str]) -> Path:
    hub = library(name)
    with errors(name, "download"):
        patterns = [glob.escape(file) for file in files]
        return Path(hub.snapshot_download(name.repository, revision=name.revision or None, allow_patterns=patterns))


def _cached(name: HubName, why: Unreachable) -> Path:
    """The repository as an earlier run downloaded it. Raises `why` where none did."""
    hub = library(name)
    try:
        found = hub.snapshot_download(
            name.repository, revision=name.revision or None, allow_patterns=[], local_files_only=True
        )  # fmt: skip
    except hub.errors.LocalEntryNotFoundError:
        raise Unreachable(f"{why}; the hub's cache {hub.constants.HF_HUB_CACHE} does not hold it") from why
    folder = Path(found)
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    try:
        inside, _ = _wanted(name, names, f"the cache of {name}")
    except ConvertError as error:
        raise Unreachable(f"{why}; the hub's cache holds only a part of it: {error}") from why
    logging.warning("%s; taken from the hub's cache: commit %s", why, folder.name)
    return folder / inside if inside else folder

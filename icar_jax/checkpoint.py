"""Reads and writes self-describing checkpoints: a folder with everything needed to use the model.

    model/
      icar.json            kind, architecture, exits, preprocessing, activation, source, hashes
      params.safetensors   float32 parameters by path
      tokenizer.json       if the model has a text tower

A *bundle* is a folder with an icar.json of kind 'bundle' (exits and thresholds) and two such folders, clip/ and complexity/.
A *workdir* of train.py contains model/, and bundle/ after calibration; `find` accepts any of the three.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from icar_jax import program_cache, pytree, tensorfile
from icar_jax.config import not_local
from icar_jax.errors import IcarError, ModelError
from icar_jax.files import json_file, limits
from icar_jax.files.opening import make_staging, open_regular, read_regular

FORMAT = 1
DESCRIPTION, WEIGHTS, TOKENIZER = "icar.json", "params.safetensors", "tokenizer.json"
TOWERS = ("clip", "vision", "text")  # kinds that embed images, texts or both
KINDS = (*TOWERS, "complexity", "convnext", "bundle")


class CheckpointError(IcarError, ValueError):
    """A checkpoint is missing, damaged or of the wrong kind; the message names the path and the fix."""


class NotFinite(IcarError, ValueError):
    """Parameters contain NaN or infinity; `names` lists their paths."""

    def __init__(self, where: str | os.PathLike, names: list[str]):
        super().__init__(f"cannot write {where}: not finite: {', '.join(names[:5])} ({len(names)} parameters)")
        self.names = names


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        path: its folder.
        kind: 'clip', 'vision' or 'text' (one tower), 'complexity' or 'convnext'.
        description: parsed icar.json.
        params: nested dict of float32 numpy arrays.
        tokenizer: text of tokenizer.json; None if there is none.
    """

    path: Path
    kind: str
    description: dict[str, Any]
    params: pytree.Tree
    tokenizer: str | None


def write(
    path: str | os.PathLike,
    kind: str,
    description: Mapping[str, Any],
    params: Mapping[str, Any],
    tokenizer: str | None = None,
    on_leaf: Callable[[str], None] = lambda name: None,
) -> Path:
    """Writes a checkpoint atomically and returns `path`; an existing checkpoint is replaced only once the new one is complete.

    Leaves are arrays, or objects with `shape` and `__array__`, each read once; `on_leaf(name)` is called after each. Raises
    NotFinite (a ValueError) naming the parameters that are not finite, CheckpointError if `path` cannot be replaced.
    """
    flat = pytree.flatten(params)

    def fill(folder: Path) -> None:
        written = tensorfile.write(folder / WEIGHTS, flat, on_leaf=on_leaf)
        if written.not_finite:
            raise NotFinite(path, written.not_finite)
        hashes = {WEIGHTS: written.sha256}
        if tokenizer is not None:
            (folder / TOKENIZER).write_text(tokenizer, encoding="utf-8")
            hashes[TOKENIZER] = sha256(folder / TOKENIZER)
        _describe(folder, kind, {**description, "hashes": hashes})

    return _replace_folder(Path(path), kind, fill)


def write_bundle(path: str | os.PathLike, description: Mapping[str, Any], clip: Path, complexity: Path) -> Path:
    """Writes a bundle: copies of two checkpoints and a `description` (exits, thresholds and their calibration).

    Returns `path`. Raises CheckpointError if `path` cannot be replaced.
    """

    def fill(folder: Path) -> None:
        for part, source in (("clip", clip), ("complexity", complexity)):
            (folder / part).mkdir()
            for name in (DESCRIPTION, WEIGHTS, TOKENIZER):
                if (Path(source) / name).is_file():
                    shutil.copy2(Path(source) / name, folder / part / name)
        _describe(folder, "bundle", description)

    return _replace_folder(Path(path), "bundle", fill)


def _describe(folder: Path, kind: str, description: Mapping[str, Any]) -> None:
    text = json.dumps({"format": FORMAT, "kind": kind, **description}, indent=2, allow_nan=False)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def amend(folder: str | os.PathLike, changes: Mapping[str, Any]) -> None:
    """Atomically sets entries of a checkpoint's description; weights are not touched.

    Raises CheckpointError if `folder` is not a checkpoint, ValueError for the entries format, kind and hashes.
    """
    old = describe(folder)
    if reserved := {"format", "kind", "hashes"} & set(changes):
        raise ValueError(f"{', '.join(sorted(reserved))} describe the weights and cannot be amended")
    target = Path(folder).resolve() / DESCRIPTION
    text = json.dumps({**old, **changes}, indent=2, allow_nan=False) + "\n"
    descriptor, temporary = tempfile.mkstemp(prefix=f".{DESCRIPTION}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, target.stat().st_mode)  # mkstemp creates files with mode 0600
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def require_replaceable(path: str | os.PathLike, kind: str) -> None:
    """Raises CheckpointError if `path` exists and is not an empty folder or a checkpoint of the same kind."""
    _require_local(path)
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / DESCRIPTION).is_file():
        raise CheckpointError(f"{path} exists and is not a checkpoint; choose another path or remove it")
    found = describe(path)["kind"]
    if found != kind:
        raise CheckpointError(f"{path} is a checkpoint of kind {found!r}, not {kind!r}; choose another path or remove it")


def _replace_folder(path: Path, kind: str, fill: Callable[[Path], None]) -> Path:
    require_replaceable(path, kind)
    target = path.resolve()  # a symbolic link is kept and its target is replaced
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise CheckpointError(f"cannot create the folder {path}: {target.parent} is a file or lies below one") from error
    staging = make_staging(target)
    old = staging.with_name(staging.name + ".old")
    try:
        fill(staging)
        if target.exists():
            os.replace(target, old)
        try:
            os.replace(staging, target)
        except OSError:
            if old.exists():
                os.replace(old, target)
            raise
        if old.exists():
            _keep_strangers(old, target)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return path


def _keep_strangers(old: Path, new: Path) -> None:
    """Moves files that are not part of the checkpoint (figures, notes, other weights) to the new folder."""
    for entry in old.iterdir():
        if entry.name not in (DESCRIPTION, WEIGHTS, TOKENIZER, "clip", "complexity") and not (new / entry.name).exists():
            os.replace(entry, new / entry.name)


def _require_local(path: str | os.PathLike) -> None:
    if (why := not_local(path)) is not None:
        raise CheckpointError(f"{why}; copy the checkpoint to a local disk, or mount the bucket and pass the mounted folder")


def find(path: str | os.PathLike, kinds: tuple[str, ...] = KINDS) -> Path:
    """Returns the checkpoint folder for `path`: `path` itself, else bundle/ or model/ of a workdir, in that order.

    For a finished complexity run, best/ comes before model/: it was selected on a validation split that is neither trained nor
    reported on. A CLIP's best/ was selected on the evaluated split, so it must be passed explicitly.
    Raises CheckpointError if there is no checkpoint of one of `kinds`, listing what was found.
    """
    _require_local(path)
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a bundle, a checkpoint or a workdir of train.py")
    seen = []
    finished = (path / "model" / DESCRIPTION).is_file()
    for folder in (path, path / "bundle", path / "best", path / "model"):
        if (folder / DESCRIPTION).is_file():
            kind = describe(folder)["kind"]
            if folder.name == "best" and folder != path and not (finished and kind == "complexity"):
                continue
            if kind in kinds:
                return folder
            seen.append(f"{folder} ({kind})")
    if seen:
        raise CheckpointError(f"no checkpoint of kind {' or '.join(kinds)} in {path}; found {', '.join(seen)}")
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"the training run in {path} is not finished; run the same train.py command again to complete it")
    raise CheckpointError(f"{path} has no {DESCRIPTION}; expected a bundle, a checkpoint or a workdir of train.py")


def is_own(path: str | os.PathLike) -> bool:
    """Returns whether `path` is a checkpoint, bundle or workdir of this library."""
    folder = Path(path)
    places = (folder, folder / "bundle", folder / "best", folder / "model")
    return any((place / DESCRIPTION).is_file() for place in places) or (folder / "checkpoints").is_dir()


class _Fields(json_file.Fields):
    error = CheckpointError


class _Description(dict[str, Any]):
    """An icar.json whose missing entries are named, with the file, where a program needs them."""

    file: Path | None = None

    def __missing__(self, name: str) -> Any:
        raise CheckpointError(f"{self.file}: {name} is missing; write the checkpoint again, or copy the whole folder again")


def describe(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns the parsed icar.json of a checkpoint folder, whose entries have the types that programs rely on.

    Raises CheckpointError, naming the file and the entry, if it is unreadable, of unknown format, or lacks an entry.
    """
    file = Path(folder) / DESCRIPTION
    fields = _Fields.read(file)
    description = _Description(fields.content)
    description.file = file
    if description.get("format") != FORMAT or description.get("kind") not in KINDS:
        raise CheckpointError(
            f"{file} has format {description.get('format')!r:.80} and kind {description.get('kind')!r:.80}; "
            f"this version reads format {FORMAT} of {', '.join(KINDS)}"
        )
    hashes = fields.section("hashes")
    for name in hashes.content:
        if name not in (WEIGHTS, TOKENIZER):
            raise CheckpointError(f"{file}: hashes has an entry {name!r:.80}; expected {WEIGHTS} and {TOKENIZER}")
        hashes.required(name, str)
    for name in ("arch", "preprocess", "source", "tower", "regret", "routing", "hashes"):
        if not fields.section(name):
            description.pop(name, None)  # null and {} say no more than a missing entry
    fields.get("threshold", float)
    if "routing" in description:
        routing = fields.section("routing")
        routing.section("found")
        routing.get("scores", str)
        exits, thresholds = routing.numbers("exits", int), routing.numbers("thresholds", float)
        if len(thresholds) != len(exits) - 1:
            raise CheckpointError(
                f"{file}: routing has {len(thresholds)} thresholds and {len(exits)} exits; expected one for each exit but the "
                "last; calibrate the bundle again"
            )
    return description


def read(folder: str | os.PathLike, kind: str) -> Checkpoint:
    """Returns the checkpoint of kind `kind` in `folder` after checking its hashes. Raises CheckpointError naming the fault."""
    folder = Path(folder)
    description = describe(folder)
    if description["kind"] != kind:
        raise CheckpointError(f"{folder} is of kind {description['kind']!r}, expected {kind!r}")
    require_undamaged(folder, description)
    try:
        with open_regular(folder / WEIGHTS):  # the library would wait for a pipe
            params = pytree.unflatten(load_file(folder / WEIGHTS))
    # The library also raises KeyError for a dtype that numpy lacks, and ValueError for impossible sizes.
    except (OSError, SafetensorError, ModelError, KeyError, ValueError, TypeError, MemoryError, OverflowError) as error:
        raise CheckpointError(f"cannot read {folder / WEIGHTS}: {error}") from error
    return Checkpoint(folder, kind, description, params, read_tokenizer(folder))


def read_tokenizer(folder: Path) -> str | None:
    """Returns the text of a checkpoint's tokenizer.json; None if there is none. Raises CheckpointError if it is unreadable."""
    file = folder / TOKENIZER
    if not file.is_file():
        return None
    try:
        return read_regular(file, limits.TOKENIZER_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error


def require_undamaged(folder: Path, description: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless the files of a checkpoint have the hashes of its description."""
    for name, expected in description.get("hashes", {}).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; copy the whole folder again")
        if not program_cache.verified(folder / name, expected, sha256):
            raise CheckpointError(f"{folder / name} is damaged: its SHA-256 differs from the one in {DESCRIPTION}")


def identity(description: Mapping[str, Any]) -> str:
    """Returns the hex SHA-256 of everything that determines a model's output: weights, architecture and preprocessing."""
    what = {key: description.get(key) for key in ("kind", "arch", "preprocess")}
    what["weights"] = description.get("hashes", {}).get(WEIGHTS)
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def role(kind: str) -> str:
    """Returns what a checkpoint of this kind does in a model: 'clip' embeds (a tower alone too), 'complexity' scores."""
    return "clip" if kind in TOWERS else kind


def identities(path: str | os.PathLike) -> dict[str, str]:
    """Returns {role: identity} of the checkpoint or the parts of the bundle at `path`, read from icar.json only.

    Raises CheckpointError if there is none.
    """
    folder = find(path)
    kind = describe(folder)["kind"]
    parts = {"clip": folder / "clip", "complexity": folder / "complexity"} if kind == "bundle" else {role(kind): folder}
    return {kind: identity(describe(part)) for kind, part in parts.items()}


def sha256(file: str | os.PathLike) -> str:
    """Returns the hex SHA-256 of a file, read in chunks. Raises OSError."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

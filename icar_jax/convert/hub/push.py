"""`icar push`: uploads a checkpoint or an export to a repository on the Hugging Face hub, with its model card."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from icar_jax import checkpoint
from icar_jax.config import HUB_FORMS, hub_name
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.folder import OWN
from icar_jax.convert.hub import card
from icar_jax.convert.hub.download import errors, library


@dataclass(frozen=True)
class Pushed:
    """What was uploaded, in one commit."""

    address: str  # of the commit
    files: list[str]  # names in the repository, sorted


def push(folder: str | os.PathLike, repository: str, private: bool = False) -> Pushed:
    """Uploads the checkpoint, bundle, workdir or export in `folder` to `repository` (owner/name), which is created if need be.

    The card is the README.md of an export or beside a checkpoint; a checkpoint without one gets one in the repository alone.
    Raises ConvertError and CheckpointError where the folder is neither, is damaged, or the hub refuses. Nothing is committed
    then.
    """
    name = hub_name(str(repository))
    if name is None or name.inside:
        raise ConvertError(f"{repository} names no repository; expected owner/name, or owner/name@branch (not {HUB_FORMS})")
    folder = Path(folder)
    if not folder.is_dir():
        raise ConvertError(f"{folder} is no folder; expected a checkpoint, or a folder that `icar export` wrote")
    files = _files_of(folder)
    hub = library(name)
    with errors(name, "upload to"):
        api = hub.HfApi()
        # Text is made bytes, for a str would be taken for a path.
        made = [hub.CommitOperationAdd(path, data.encode() if isinstance(data, str) else str(data))
                for path, data in _with_name(files, name.repository).items()]  # fmt: skip
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        done = api.create_commit(name.repository, made, commit_message="Upload with icar push", revision=name.revision or None)
    return Pushed(str(done.commit_url), sorted(files))


def _files_of(folder: Path) -> dict[str, Path | str]:
    """{name in the repository: file, or text}. Raises ConvertError for a folder of another kind, CheckpointError for damage."""
    readme = folder / card.FILE
    about = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    if not checkpoint.is_own(folder) or card.MARK in about:
        if card.MARK not in about:
            raise ConvertError(
                f"{folder} is neither a checkpoint ({checkpoint.DESCRIPTION}) nor an export with its {card.FILE}; "
                "`icar export CHECKPOINT --to LAYOUT` writes one"
            )
        found = (file for file in sorted(folder.rglob("*")) if file.is_file())
        below = {file.relative_to(folder).as_posix(): file for file in found}
        return {path: file for path, file in below.items() if not any(p.startswith(".") for p in path.split("/"))}
    own = checkpoint.find(folder)
    bundle = checkpoint.describe(own)["kind"] == "bundle"
    parts = [own / "clip", own / "complexity"] if bundle else [own]
    for part in parts:
        checkpoint.require_undamaged(part, checkpoint.describe(part))
    files = [file for part in dict.fromkeys([own, *parts]) for name in OWN if (file := part / name).is_file()]
    words: Path | str = readme if about else card.of_checkpoint(own)
    return {file.relative_to(own).as_posix(): file for file in files} | {card.FILE: words}


def _with_name(files: dict[str, Path | str], repository: str) -> dict[str, Path | str]:
    """The files, with the repository's name in the card."""
    words = files[card.FILE]
    text = words if isinstance(words, str) else words.read_text(encoding="utf-8")
    return files | {card.FILE: text.replace(card.PLACE, repository)}

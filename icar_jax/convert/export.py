"""`icar export`: writes a checkpoint in another library's layout, with the configuration and tokenizer files that it reads,
and a model card.

The rule tables are applied backwards, so that conversion and export give the same float32 bits. A part that a layout cannot
hold is refused where its removal would change the embeddings, and otherwise left out and named in the notes (early exits).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from icar_jax import checkpoint, tensorfile
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.torch_writer import write_torch
from icar_jax.convert.hub import card
from icar_jax.convert.layouts import registry
from icar_jax.convert.layouts.base import Export, ExportFiles, ExportSource, Layout, arch_of
from icar_jax.files.opening import make_staging


@dataclass(frozen=True)
class ExportResult:
    """The folder that was written."""

    path: Path
    files: list[str]  # names, sorted
    notes: list[str]  # what was left out


def export(source: str | os.PathLike, dest: str | os.PathLike, layout: str) -> ExportResult:
    """Writes the checkpoint at `source` (a folder, workdir or bundle) in `layout` into the new folder `dest`.

    Raises ConvertError for an unknown layout, a model that the layout cannot express, or a `dest` that exists already.
    """
    known = registry.exports()
    if layout not in known:
        raise ConvertError(f"--to={layout} must be one of {', '.join(known)}, stablehlo")
    dest = Path(dest)
    with new_folder(dest) as staging:
        opened = _open(Path(source), known[layout])
        chosen = _choose(opened, known[layout])
        made = chosen.files(opened)
        notes = made.notes + _left_behind(Path(source), known[layout])
        words = card.card({opened.loaded.kind: opened.description}, layout, notes, keeps_exits=chosen.keeps_exits)
        _write(ExportFiles({**made.files, card.FILE: words}), staging)
    return ExportResult(dest, sorted(file.name for file in dest.iterdir()), notes)


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A temporary folder, moved to `dest` at the end and removed after an error. Raises ConvertError where `dest` exists."""
    if dest.exists():
        raise ConvertError(f"{dest} exists already; remove it or name another folder")
    dest.parent.mkdir(parents=True, exist_ok=True)
    staging = make_staging(dest)
    try:
        yield staging
        os.replace(staging, dest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _open(source: Path, layouts: Sequence[Layout]) -> ExportSource:
    kinds = tuple(dict.fromkeys(layout.kind for layout in layouts))
    folder = checkpoint.find(source, (*kinds, "bundle") if "clip" in kinds else kinds)
    if checkpoint.describe(folder)["kind"] == "bundle":
        folder = folder / "clip"
    loaded = checkpoint.read(folder, checkpoint.describe(folder)["kind"])
    return ExportSource(loaded, arch_of(loaded.kind, loaded.description["arch"], f"{loaded.path}: arch"))


def _choose(source: ExportSource, layouts: Sequence[Layout]) -> Export:
    """Of layouts that share a name in --to, the one that holds this model; the one it came from is asked first."""
    origin = source.description.get("source", {}).get("layout")
    fitting = [layout for layout in layouts if layout.export and layout.kind == source.loaded.kind]
    candidates = [layout.export for layout in sorted(fitting, key=lambda layout: layout.name != origin)]
    for export in candidates:
        if export.holds(source.arch):
            return export
    raise ConvertError(f"{source.where}: no layout of --to={candidates[0].to} holds this model")


def _write(made: ExportFiles, folder: Path) -> None:
    for name, content in made.files.items():
        file = folder / name
        if isinstance(content, str):
            file.write_text(content, encoding="utf-8")
        elif file.suffix == ".safetensors":
            tensorfile.write(file, content, metadata={"format": "pt"})
        elif file.suffix == ".json":
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        else:
            write_torch(file, content)


def _left_behind(source: Path, layouts: Sequence[Layout]) -> list[str]:
    folder = checkpoint.find(source)
    if checkpoint.describe(folder)["kind"] != "bundle":
        return []
    to = next((layout.export.to for layout in layouts if layout.export and layout.kind == "complexity"), "")
    how = f"; `icar export {shlex.quote(str(folder / 'complexity'))} --to {to}` writes it" if to else ""
    return [f"the bundle's complexity model and thresholds were left out{how}"]

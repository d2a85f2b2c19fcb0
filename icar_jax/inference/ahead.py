"""Programs traced ahead of time: `icar compile` writes them beside a checkpoint, and `load` uses them.

    CHECKPOINT/programs/
      programs.json       for which weights, dtype, platforms and version of this package
      NAME.stablehlo      jax.export's serialised program, for any batch size; weights are an argument

They replace tracing the towers in Python. XLA still compiles them, once for each processor: see icar_jax/program_cache.py.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

import icar_jax.models
from icar_jax.checkpoint import DESCRIPTION
from icar_jax.errors import ConfigError, DataError
from icar_jax.files import json_file
from icar_jax.files.opening import make_staging
from icar_jax.models.reduction.tokens import Tokens
from icar_jax.version import VERSION

FOLDER, ABOUT, SUFFIX = "programs", "programs.json", ".stablehlo"
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

jax.export.register_namedtuple_serialization(Tokens, serialized_name="icar_jax.Tokens")


class Programs:
    """Where a model takes its programs from; this class traces each function."""

    def use(self, name: str, fn: Callable, params: Any, rows: Any) -> Callable:
        """The program `name`, equal to fn(params, batch); `rows` has the shape and dtype of a row of the batch."""
        return fn

    def file(self, name: str) -> Path | None:
        """The file of a program; None if there is none."""
        return None


class WrittenPrograms(Programs):
    """Programs of a folder; a function that is not among them is traced."""

    def __init__(self, folder: Path):
        self._folder = folder

    def use(self, name: str, fn: Callable, params: Any, rows: Any) -> Callable:
        if (file := self.file(name)) is None:
            return fn
        try:
            exported = jax.export.deserialize(bytearray(file.read_bytes()))
            exported.mlir_module()  # parses it
            return exported.call
        except Exception as error:  # damaged, or of a version of JAX that this one cannot read
            logging.warning("%s is not used: it cannot be read (%s); make it again with `icar compile`", file, error)
            return fn

    def file(self, name: str) -> Path | None:
        file = self._folder / f"{name}{SUFFIX}"
        return file if file.is_file() else None


class ExportedPrograms(Programs):
    """Collects the functions of a model; `write` exports them."""

    def __init__(self) -> None:
        self._functions: dict[str, tuple[Callable, Any, Any]] = {}

    def use(self, name: str, fn: Callable, params: Any, rows: Any) -> Callable:
        self._functions[name] = fn, params, rows
        return fn

    def write(
        self, checkpoint: Path, identity: Mapping[str, str], dtype: str, platforms: Sequence[str], say: Callable[[str], None]
    ) -> list[Path]:
        """Writes every program, calling `say` with the name of each before, and returns the files.

        identity: Model.identity. Replaces an earlier folder. Raises ConfigError for unknown platforms.
        """
        if unknown := sorted(set(platforms) - set(PLATFORMS)):
            raise ConfigError(f"--platforms {' '.join(unknown)}: expected some of {', '.join(PLATFORMS)}")
        about = {
            "version": VERSION, "code": code(), "identity": dict(identity), "dtype": dtype, "platforms": list(platforms),
        }  # fmt: skip
        made = make_staging(checkpoint / FOLDER)
        try:
            for name in self._functions:
                say(name)
                (made / f"{name}{SUFFIX}").write_bytes(self.exported(name, platforms))
            (made / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            if (checkpoint / FOLDER).exists():
                shutil.rmtree(checkpoint / FOLDER)
            made.rename(checkpoint / FOLDER)
        finally:
            shutil.rmtree(made, ignore_errors=True)
        return sorted((checkpoint / FOLDER).iterdir())

    def has(self, name: str) -> bool:
        """Whether the model has this function: a tower alone has those of the other one not."""
        return name in self._functions

    def exported(self, name: str, platforms: Sequence[str]) -> bytes:
        """The program `name`, serialised for any batch size."""
        fn, params, rows = self._functions[name]
        (batch,) = jax.export.symbolic_shape("batch")
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        batches = jax.tree.map(lambda row: jax.ShapeDtypeStruct((batch, *row.shape), row.dtype), rows)
        return bytes(jax.export.export(jax.jit(fn), platforms=tuple(platforms))(shapes, batches).serialize())


def find(checkpoint: str | os.PathLike, identity: Mapping[str, str], dtype: str) -> Programs:
    """The programs beside a checkpoint, or beside the bundle it is part of, for a model with this Model.identity.

    Logs why programs that are there do not fit the model or this machine, and ignores them.
    """
    beside, outer = Path(checkpoint), Path(checkpoint).resolve().parent
    for folder in (beside / FOLDER, *([outer / FOLDER] if _is_bundle(outer) else [])):
        if (folder / ABOUT).is_file():
            if (why := _unfit(folder / ABOUT, identity, dtype)) is None:
                return WrittenPrograms(folder)
            logging.warning("the programs in %s are not used: %s; `icar compile` makes them again", folder, why)
    return Programs()


def _unfit(file: Path, identity: Mapping[str, str], dtype: str) -> str | None:
    """Why the programs that `file` describes do not fit; None if they do."""
    try:
        about = json_file.read_object(file)
        version, made_for, platforms = about["version"], about["identity"], about["platforms"]
        if version != VERSION:
            return f"they were made by icar_jax {version}, and this is {VERSION}"
        if about["code"] != code():
            return "they were traced with other code of icar_jax or other settings of JAX"
        if any(made_for.get(part) != one for part, one in identity.items()):
            return "they were made for other weights"
        if about["dtype"] != dtype:
            return f"they compute in {about['dtype']}, not in {dtype}"
        if (here := platform()) not in platforms:
            return f"they were made for {', '.join(platforms)}, and this is {here}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{file.name} cannot be read ({error})"
    return None


def _is_bundle(folder: Path) -> bool:
    try:
        return json_file.read_object(folder / DESCRIPTION).get("kind") == "bundle"
    except DataError:
        return False


@functools.cache
def _sources() -> str:
    package = Path(icar_jax.models.__path__[0]).parent
    files = [*sorted((package / "models").rglob("*.py")), *sorted((package / "inference").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def code() -> str:
    """A hash of what tracing depends on besides the model: the code of the towers, and settings of JAX."""
    settings = [str(getattr(jax.config, name)) for name in ("jax_default_matmul_precision", "jax_enable_x64")]
    return hashlib.sha256(json.dumps([_sources(), *settings]).encode()).hexdigest()[:32]


def platform() -> str:
    """The default backend as jax.export names it."""
    backend = jax.default_backend()
    return {"gpu": "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"}.get(backend, backend)

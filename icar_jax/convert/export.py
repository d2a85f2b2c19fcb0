"""`icar export`: a checkpoint written in another library's layout, with the configuration and tokenizer files it reads.

The rule tables are read backwards, so converting there and back gives the same float32 bits. What a layout cannot hold is
refused where leaving it out would change the embeddings, and named in the notes where it would not (early exits).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from icar_jax import checkpoint, pytree, tensorfile
from icar_jax.checkpoint import Checkpoint
from icar_jax.config import from_dict
from icar_jax.convert import rules as engine
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.torch_writer import write_torch
from icar_jax.convert.layouts import export_configs, hf, icar, open_clip, siglip, timm
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import ClipArch
from icar_jax.models.complexity import ComplexityArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.token_router import scorer_arch


@dataclass(frozen=True)
class ExportResult:
    """The folder that was written, its files, and what was left out."""

    path: Path
    files: list[str]
    notes: list[str]


def export(source: str | os.PathLike, dest: str | os.PathLike, layout: str) -> ExportResult:
    """Writes the checkpoint at `source` (a folder, workdir or bundle) in `layout` into the new folder `dest`.

    Raises ConvertError for an unknown layout, a model that the layout cannot express, or a `dest` that exists already.
    """
    if layout not in WRITERS:
        raise ConvertError(f"--to={layout} must be one of {', '.join(WRITERS)}, stablehlo")
    writer, dest = WRITERS[layout], Path(dest)
    with new_folder(dest) as staging:
        notes = writer(_open(Path(source), layout), staging) + _left_behind(Path(source), layout)
    return ExportResult(dest, sorted(file.name for file in dest.iterdir()), notes)


@contextmanager
def new_folder(dest: Path) -> Iterator[Path]:
    """A folder to fill, moved to `dest` at the end; after an error nothing is left. Raises ConvertError where `dest` exists."""
    if dest.exists():
        raise ConvertError(f"{dest} exists already; remove it or name another folder")
    dest.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp makes it private
        os.replace(staging, dest)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _open(source: Path, layout: str) -> Checkpoint:
    kinds = {"icar": ("clip", "complexity"), "timm": ("convnext",)}.get(layout, ("clip",))
    folder = checkpoint.find(source, kinds if layout == "timm" else (*kinds, "bundle"))
    if checkpoint.describe(folder)["kind"] == "bundle":
        folder = folder / "clip"
    return checkpoint.read(folder, checkpoint.describe(folder)["kind"])


def _left_behind(source: Path, layout: str) -> list[str]:
    folder = checkpoint.find(source)
    if checkpoint.describe(folder)["kind"] != "bundle":
        return []
    how = f"; `icar export {shlex.quote(str(folder / 'complexity'))} --to icar` writes it" if layout == "icar" else ""
    return [f"the bundle's complexity model and thresholds were left out{how}"]


def _clip_parts(loaded: Checkpoint) -> tuple[ClipArch, Preprocess, Tokenizer | None]:
    d = loaded.description
    tokenizer = Tokenizer.from_json(loaded.tokenizer) if loaded.tokenizer is not None else None
    return from_dict(d["arch"], ClipArch, f"{loaded.path}: arch"), Preprocess.from_dict(d["preprocess"]), tokenizer


def _without_exits(arch: ClipArch, params: Mapping[str, Any]) -> tuple[pytree.Tree, list[str]]:
    flat = {p: a for p, a in pytree.flatten(params).items() if not p.startswith(("vision/exits/", "exit_logit_"))}
    if not arch.vision.exits:
        return pytree.unflatten(flat), []
    exits = ", ".join(map(str, arch.vision.exits))
    return pytree.unflatten(flat), [f"this layout holds no early exits: those after {exits} blocks were left out"]


def _hf(loaded: Checkpoint, folder: Path) -> list[str]:
    arch, preprocess, tokenizer = _clip_parts(loaded)
    is_siglip = arch.vision.head == "map"
    config = export_configs.hf_config(arch, preprocess)
    params, notes = _without_exits(arch, loaded.params)
    rules = siglip.rules() if is_siglip else hf.clip_rules()
    leaves = engine.export_weights(params, rules, str(loaded.path))
    tensorfile.write(folder / "model.safetensors", leaves, metadata={"format": "pt"})
    _json(folder / "config.json", config)
    _json(folder / "preprocessor_config.json", export_configs.hf_preprocessor(preprocess, is_siglip))
    if tokenizer is None:
        return [*notes, "the checkpoint holds no tokenizer, so none was written"]
    (folder / "tokenizer.json").write_text(export_configs.hf_tokenizer_json(tokenizer), encoding="utf-8")
    _json(folder / "tokenizer_config.json", export_configs.hf_tokenizer_config(tokenizer, arch))
    return notes


def _open_clip(loaded: Checkpoint, folder: Path) -> list[str]:
    arch, preprocess, tokenizer = _clip_parts(loaded)
    config = export_configs.open_clip_config(arch, preprocess, loaded.params)
    params, notes = _without_exits(arch, loaded.params)
    leaves = engine.export_weights(params, open_clip.open_clip_rules(), str(loaded.path))
    tensorfile.write(folder / "open_clip_model.safetensors", leaves, metadata={"format": "pt"})
    _json(folder / "open_clip_config.json", config)
    return notes + _tokenizer(tokenizer, folder)


def _openai(loaded: Checkpoint, folder: Path) -> list[str]:
    arch, preprocess, tokenizer = _clip_parts(loaded)
    export_configs.require_openai(arch, preprocess)
    params, notes = _without_exits(arch, loaded.params)
    leaves: dict[str, Any] = dict(engine.export_weights(params, open_clip.open_clip_rules(), str(loaded.path)))
    sizes = {
        "input_resolution": arch.vision.image_size,
        "context_length": arch.text.context_length,
        "vocab_size": arch.text.vocabulary,
    }
    leaves |= {name: np.array(size, np.int64) for name, size in sizes.items()}
    write_torch(folder / "model.pt", leaves)
    return notes + _tokenizer(tokenizer, folder)


def _icar(loaded: Checkpoint, folder: Path) -> list[str]:
    if loaded.kind == "complexity":
        return _icc(loaded, folder)
    arch, preprocess, tokenizer = _clip_parts(loaded)
    export_configs.require_icar(arch)
    (exit,) = arch.vision.exits
    leaves: dict[str, Any] = dict(engine.export_weights(loaded.params, icar.rules(exit), str(loaded.path)))
    leaves["temp_clamp"] = np.array(100.0, np.float32)
    source = loaded.description.get("source", {})
    config = {
        "model_name": source.get("model_name") or export_configs.open_clip_name(arch),
        "pretrained": source.get("pretrained", ""),
        "early_exit_layer": exit - 1,
    }
    write_torch(folder / "ICAR.pt", {"epoch": 0, "global_step": 0, "model_state_dict": leaves, "metrics": {}, "config": config})
    return _tokenizer(tokenizer, folder)


def _icc(loaded: Checkpoint, folder: Path) -> list[str]:
    d = loaded.description
    arch = scorer_arch(d["arch"], f"{loaded.path}: arch")
    if not isinstance(arch, ComplexityArch):
        raise ConvertError(f"{loaded.path} is a head on the blocks of a CLIP; the ICC layout holds a ConvNeXt classifier")
    if arch.head != "classification":
        raise ConvertError(f"{loaded.path} scores by regression; the ICC layout holds a classifier of two classes")
    conv_mlp = d.get("conv_mlp", timm.uses_conv_mlp(arch.backbone))
    leaves = engine.export_weights(loaded.params, timm.classifier_rules(conv_mlp), str(loaded.path))
    name = export_configs.timm_name(arch.backbone)
    hparams = {"model_name": name, "num_classes": 2, "feature_dim": arch.backbone.dims[3]}
    if "threshold" in d:
        hparams["threshold"] = d["threshold"]
    write_torch(folder / "ICC.pt", {"state_dict": leaves, "hparams": hparams, "model_architecture": name})
    return []


def _timm(loaded: Checkpoint, folder: Path) -> list[str]:
    d = loaded.description
    arch = from_dict(d["arch"], ConvNeXtArch, f"{loaded.path}: arch")
    conv_mlp = d.get("conv_mlp", timm.uses_conv_mlp(arch))
    leaves = engine.export_weights(loaded.params, timm.rules(conv_mlp), str(loaded.path))
    tensorfile.write(folder / "model.safetensors", leaves, metadata={"format": "pt"})
    _json(folder / "config.json", export_configs.timm_config(arch, Preprocess.from_dict(d["preprocess"])))
    return []


def _tokenizer(tokenizer: Tokenizer | None, folder: Path) -> list[str]:
    if tokenizer is None:
        return ["the checkpoint holds no tokenizer, so none was written"]
    (folder / "tokenizer.json").write_text(export_configs.hf_tokenizer_json(tokenizer), encoding="utf-8")
    return []


def _json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


WRITERS: dict[str, Callable[[Checkpoint, Path], list[str]]] = {
    "openai": _openai,
    "open_clip": _open_clip,
    "hf": _hf,
    "icar": _icar,
    "timm": _timm,
}

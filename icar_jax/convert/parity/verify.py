"""Compares the outputs of a converted model with those of the source's own library.

A reference is an .npz file that `icar_jax.convert.parity.reference` writes with PyTorch. It holds inputs and the original
weights' outputs:

    images                 float32 [N, S, S, 3], normalised              all but text
    tokens                 int32 [M, L]                                  clip and text
    image_embeds           float32 [N, D], unit norm                     clip only
    text_embeds            float32 [M, D], unit norm                     clip only
    exit_<blocks>          float32 [N, D], unit norm, after that many blocks
    logit_scale, logit_bias, exit_<blocks>_logit_scale                   scalars, where the source has them
    logits | features      float32 [N, classes] | [N, C]                 classifiers | backbones and towers without classes
    meta                   JSON text: layout, libraries, seed, file, sha256, model

The comparison needs no torch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from icar_jax.checkpoint import sha256
from icar_jax.convert.fields import ConvertError, Fields, read_json
from icar_jax.files import json_file
from icar_jax.files.arrays import read_npz
from icar_jax.models import convnext
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.vision import VisionArch, VisionTower

TOLERANCE = 1e-4
META = "meta"
_LARGEST = 1 << 32  # bytes, unpacked
_EXIT = re.compile(r"exit_(\d+)")
_EXIT_SCALE = re.compile(r"exit_(\d+)_logit_scale")
_DIMS = {
    "images": 4,
    "tokens": 2,
    "image_embeds": 2,
    "text_embeds": 2,
    "logits": 2,
    "features": 2,
    "logit_scale": 0,
    "logit_bias": 0,
}
_REMEDY = "write it again with `icar reference`"


@dataclass(frozen=True)
class Reference:
    """Inputs and outputs of the original weights: `arrays` by their name in the file, `meta` as parsed JSON."""

    path: Path
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    @property
    def exits(self) -> tuple[int, ...]:
        """Executed blocks of every exit in the file, ascending."""
        return tuple(sorted(int(match[1]) for name in self.arrays if (match := _EXIT.fullmatch(name))))


@dataclass(frozen=True)
class Difference:
    """The comparison of one output: absolute differences over all values, and the lowest cosine between two rows.

    `part` is 'image', 'text', 'exit <blocks>', 'logits', 'features', or the name of a scalar parameter.
    """

    part: str
    largest: float
    mean: float
    cosine_min: float
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """Whether the largest difference is within the tolerance; False for NaN."""
        return self.largest <= self.tolerance


def read_reference(path: str | os.PathLike) -> Reference:
    """The reference in the file at `path`, checked as far as possible without the model.

    Raises ConvertError for a file that is missing, damaged or of another kind, and for arrays that are missing, of the wrong
    kind or dimensions, or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise ConvertError(f"reference {path} does not exist; write one with `icar reference` where torch is installed")
    try:
        arrays = read_npz(path, ConvertError, _LARGEST)
    except ConvertError as error:
        raise ConvertError(f"reference {error}; {_REMEDY}") from error
    meta = _parse_meta(path, arrays.pop(META, None))
    faults = [line for name, array in arrays.items() for line in _array_faults(name, array)]
    if "images" not in arrays and not {"tokens", "features"} <= arrays.keys():  # the latter of a text encoder
        faults.append("images: missing")
    elif not faults:
        faults = _row_faults(arrays)
    if faults:
        raise ConvertError(f"reference {path} cannot be used; {_REMEDY}:\n  " + "\n  ".join(faults))
    return Reference(path, arrays, meta)


def weights_sha256(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file of weights; for an index (.json) it covers the index and all its shards."""
    path = Path(path)
    if path.suffix != ".json":
        return sha256(path)
    listed = Fields(str(path), read_json(path)).section("weight_map")
    shards = sorted({listed.required(name, str) for name in listed.content})
    lines = [sha256(path), *(sha256(path.parent / name) for name in shards)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def compare(kind: str, arch: Any, params: Mapping[str, Any], reference: Reference, source_sha256: str = "") -> list[Difference]:
    """The differences of our outputs from the reference's: one for each output in the reference, computed in float32.

    `kind` is 'clip', 'vision', 'text', 'complexity' or 'convnext', with the architecture of that kind; `params` are float32
    arrays of NumPy or JAX. Exits that the conversion added have no counterpart and are not compared.

    Raises ConvertError where the reference was made from other weights (its SHA-256 is not `source_sha256`), or does not fit
    the architecture: an output is missing, or image size, context length, vocabulary, exits or widths differ.
    """
    found = reference.meta.get("sha256")
    if source_sha256 and found and found != source_sha256:
        raise ConvertError(
            f"reference {reference.path} was made from another file: its source {reference.meta.get('file')!r} has the SHA-256 "
            f"{found}, the weights being converted have {source_sha256}; write a reference of this file with `icar reference`"
        )
    outputs = {
        "clip": _clip_outputs,
        "vision": _vision_outputs,
        "text": _text_outputs,
        "complexity": _complexity_outputs,
        "convnext": _convnext_outputs,
    }
    if kind not in outputs:
        raise ConvertError(f"cannot compare a model of kind {kind!r}; expected one of {', '.join(outputs)}")
    with jax.default_matmul_precision("highest"):  # GPUs and TPUs would round the operands of convolutions
        return [_measure(reference, part, name, output) for part, name, output in outputs[kind](arch, params, reference)]


def format_table(differences: Sequence[Difference]) -> str:
    """A table with one line for each output, under a header; no trailing newline."""
    rows = [("output", "largest", "mean", "lowest cosine", "")]
    for d in differences:
        rows.append((d.part, f"{d.largest:.2e}", f"{d.mean:.2e}", f"{d.cosine_min:.7f}", "ok" if d.ok else "DIFFERS"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  ".join((row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4])).rstrip() for row in rows
    ]
    return "\n".join([*lines, f"absolute differences in float32; the largest may be {TOLERANCE:.0e}"])


def require_equal(differences: Sequence[Difference], where: str = "verification") -> None:
    """Raises ConvertError where an output differs by more than its tolerance or is NaN, and where nothing was compared."""
    if not differences:
        raise ConvertError(f"{where}: nothing was compared; {_REMEDY}")
    wrong = [d for d in differences if not d.ok]
    if not wrong:
        return
    shown = ", ".join(f"{d.part} {d.largest:.2e}" for d in wrong)
    hints = [_NAN] if any(np.isnan(d.largest) for d in wrong) else []
    hints += dict.fromkeys(_hint(d.part) for d in wrong if not np.isnan(d.largest))
    raise ConvertError(
        f"{where}: the converted model differs from the original by more than {TOLERANCE:.0e}: {shown}.\n  "
        + "\n  ".join(hints)
    )


_NAN = "NaN in the outputs: weights that overflow, or a damaged file."


def _hint(part: str) -> str:
    if part in ("logits", "features"):
        return "logits, features: usually another variant (GRN or layer scale), another image size, or a head of another kind."
    if part in ("image", "text"):
        return (
            "image, text: usually another activation (gelu, gelu_tanh or quick_gelu: --activation), another number of heads "
            "(head width 64, 80, 88 or 104), resized positions, or for text another pooled token."
        )
    if part.startswith("exit"):
        return "exits: usually another pooled token (cls, mean, first_patch), or one block more or less than the head expects."
    return "scalars: usually a temperature or bias taken from another parameter, or its exponential in place of its logarithm."


def _parse_meta(path: Path, value: np.ndarray | None) -> dict[str, Any]:
    if value is None or value.ndim:
        raise ConvertError(f"reference {path}: expected {META!r} to hold JSON text, found {value!r:.60}; {_REMEDY}")
    try:
        meta = json_file.parse(str(value[()]), f"reference {path}: {META}", ConvertError)
    except ConvertError as error:
        raise ConvertError(f"{error}: expected {META!r} to hold JSON text; {_REMEDY}") from error
    if not isinstance(meta, dict) or not isinstance(meta.get("layout"), str):
        raise ConvertError(f"reference {path}: expected {META!r} to name the layout, found {meta!r:.60}; {_REMEDY}")
    return meta


def _array_faults(name: str, array: np.ndarray) -> list[str]:
    dims = _DIMS.get(name, 2 if _EXIT.fullmatch(name) else 0 if _EXIT_SCALE.fullmatch(name) else None)
    if dims is None:
        return [f"{name}: no output of this name is known"]
    want = np.integer if name == "tokens" else np.floating
    if not np.issubdtype(array.dtype, want):
        return [f"{name}: expected {'integers' if name == 'tokens' else 'floats'}, found {array.dtype}"]
    if array.ndim != dims or 0 in array.shape:
        return [f"{name}: expected {dims} dimensions, none of them empty, found shape {array.shape}"]
    if not np.isfinite(array).all():
        return [f"{name}: {np.count_nonzero(~np.isfinite(array))} of {array.size} values are NaN or infinite"]
    return []


def _row_faults(arrays: Mapping[str, np.ndarray]) -> list[str]:
    images = arrays.get("images")
    faults = []
    if images is not None and (images.shape[1] != images.shape[2] or images.shape[3] != 3):
        faults.append(f"images: expected [N, S, S, 3], found shape {images.shape}")
    for name, array in arrays.items():
        if array.ndim != 2 or name == "tokens":
            continue
        source = "tokens" if name == "text_embeds" or images is None else "images"
        rows = len(arrays[source]) if source in arrays else 0
        if len(array) != rows:
            faults.append(f"{name}: expected {rows} rows, one for each of {source}, found {len(array)}")
    return faults


Output = tuple[str, str, Any]  # part, name of the reference's array, our output


def _clip_outputs(arch: ClipArch, params: Mapping[str, Any], reference: Reference) -> Iterator[Output]:
    _require(reference, ("images", "tokens", "image_embeds", "text_embeds"))
    _require_clip_inputs(arch, reference)
    model, depth, arrays = Clip.graph(arch), arch.vision.depth, reference.arrays
    encode_image = jax.jit(lambda p, images: model.encode_image_exits(p, images, (*reference.exits, depth)))
    embeds = encode_image(params, jnp.asarray(arrays["images"], jnp.float32))
    yield "image", "image_embeds", embeds[depth]
    for blocks in reference.exits:
        yield f"exit {blocks}", f"exit_{blocks}", embeds[blocks]
    tokens = jnp.asarray(arrays["tokens"], jnp.int32)
    yield "text", "text_embeds", jax.jit(model.encode_text)(params, tokens)
    for name in arrays:
        match = _EXIT_SCALE.fullmatch(name)
        if match or name in ("logit_scale", "logit_bias"):
            path = f"exit_logit_scale/{match[1]}" if match else name
            yield path, name, _scalar(params, reference, path)


def _require_clip_inputs(arch: ClipArch, reference: Reference) -> None:
    exits = arch.vision.all_exits
    # An image may have rows beyond the last whole patch, which the patch embedding drops.
    _require_size(reference, arch.vision.image_size, arch.vision.patch_size)
    _require_tokens(reference, arch.text)
    if not set(reference.exits) <= set(exits):
        raise _unfit(reference, "exits after blocks", f"some of {exits}", reference.exits)
    if reference.meta["layout"] == "icar" and not reference.exits:
        raise ConvertError(f"reference {reference.path} of an ICAR checkpoint holds no exit_<blocks>; {_REMEDY}")


def _vision_outputs(arch: VisionArch, params: Mapping[str, Any], reference: Reference) -> Iterator[Output]:
    _require(reference, ("images", "features"))
    _require_size(reference, arch.image_size, arch.patch_size)
    images = jnp.asarray(reference.arrays["images"], jnp.float32)
    tower = VisionTower.graph(arch)
    yield "image", "features", jax.jit(lambda p, x: tower(p, x, (arch.depth,)))(params["vision"], images)[arch.depth]


def _text_outputs(arch: TextArch, params: Mapping[str, Any], reference: Reference) -> Iterator[Output]:
    _require(reference, ("tokens", "features"))
    _require_tokens(reference, arch)
    tokens = jnp.asarray(reference.arrays["tokens"], jnp.int32)
    yield "text", "features", jax.jit(TextTower.graph(arch))(params["text"], tokens)


def _complexity_outputs(arch: ComplexityArch, params: Mapping[str, Any], reference: Reference) -> Iterator[Output]:
    _require(reference, ("images", "logits"))
    _require_size(reference, arch.image_size)
    images = jnp.asarray(reference.arrays["images"], jnp.float32)
    yield "logits", "logits", jax.jit(ComplexityModel.graph(arch).logits)(params, images)


def _convnext_outputs(arch: Any, params: Mapping[str, Any], reference: Reference) -> Iterator[Output]:
    name = "logits" if arch.num_classes else "features"
    _require(reference, ("images", name))
    if reference.arrays["images"].shape[1] < 32:  # the total stride; the weights fit every size above it
        raise _unfit(reference, "image size", "at least 32", reference.arrays["images"].shape[1])
    yield name, name, jax.jit(convnext.ConvNeXt.graph(arch))(params, jnp.asarray(reference.arrays["images"], jnp.float32))


def _scalar(params: Mapping[str, Any], reference: Reference, path: str) -> np.ndarray:
    node: Any = params
    for key in path.split("/"):
        if not isinstance(node, Mapping) or key not in node:
            raise ConvertError(f"reference {reference.path} holds {path}, which the converted model lacks")
        node = node[key]
    return np.asarray(node, np.float32)


def _measure(reference: Reference, part: str, name: str, output: Any) -> Difference:
    want, have = np.asarray(reference.arrays[name], np.float64), np.asarray(output, np.float64)
    if want.size != have.size or (want.ndim == 2 and want.shape != have.shape):
        raise _unfit(reference, f"shape of {name}", have.shape, want.shape)
    if want.ndim != 2:
        have = have.reshape(want.shape)
    apart = np.abs(have - want)
    rows, ours = np.atleast_2d(want), np.atleast_2d(have)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(ours, axis=1)
    same = np.all(rows == ours, axis=1)  # two zero rows have no angle, and agree
    cosine = np.where(same, 1.0, np.sum(rows * ours, axis=1) / np.where(lengths == 0, np.inf, lengths))
    return Difference(part, float(apart.max()), float(apart.mean()), float(cosine.min()))


def _require(reference: Reference, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in reference.arrays]
    if missing:
        raise ConvertError(
            f"reference {reference.path} (layout {reference.meta['layout']!r}) does not fit this model: it lacks "
            f"{', '.join(missing)} and holds {', '.join(sorted(reference.arrays))}; {_REMEDY} from the same source"
        )


def _require_size(reference: Reference, size: int, patch: int = 1) -> None:
    found = reference.arrays["images"].shape[1]
    if found // patch != size // patch:
        raise _unfit(reference, "image size", size, found)


def _require_tokens(reference: Reference, text: TextArch) -> None:
    tokens = reference.arrays["tokens"]
    if tokens.shape[1] != text.context_length:
        raise _unfit(reference, "context length", text.context_length, tokens.shape[1])
    if tokens.min() < 0 or tokens.max() >= text.vocabulary:
        raise _unfit(reference, "token ids", f"0 to {text.vocabulary - 1}", f"{tokens.min()} to {tokens.max()}")


def _unfit(reference: Reference, what: str, expected: Any, found: Any) -> ConvertError:
    return ConvertError(
        f"reference {reference.path} does not fit this model: {what}: expected {expected}, found {found}; "
        f"{_REMEDY} from the same source with the same options"
    )

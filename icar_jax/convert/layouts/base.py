"""The contract of a weight layout: what convert.py, export.py and source.py need to know about one.

A new layout is one file in this folder that ends in a `LAYOUT = Layout(...)`, and one line in registry.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icar_jax import pytree
from icar_jax.checkpoint import Checkpoint
from icar_jax.config import from_dict
from icar_jax.convert.adapters import Adapter
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.files.tensors import Tensor, Weights
from icar_jax.convert.rules import Rule
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import ClipArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch
from icar_jax.models.token_router import scorer_arch
from icar_jax.models.vision import VisionArch

TOWER_OPTIONS = frozenset({"activation", "preprocess", "exits", "pool", "heads", "image_size"})  # of vision towers
KINDS = ("clip", "vision", "text", "complexity", "convnext")  # of checkpoints that weights are converted to


@dataclass(frozen=True)
class Options:
    """What the user specifies about a source; a field may stay empty where the source specifies it."""

    activation: str = ""  # gelu | gelu_tanh | quick_gelu
    preprocess: str = ""  # preset of settings.PRESETS, or a JSON file
    exits: tuple[int, ...] = ()  # numbers of blocks; a plain CLIP gets new exits, initialised from the final head
    pool: str = ""  # token that new exits read; empty: that of full depth
    heads: tuple[int, ...] = ()  # attention heads: (vision, text), or of a single tower
    image_size: int = 0  # pixels; another size than the source's resizes the position embeddings
    tokenizer: str = ""  # tokenizer.json or CLIP's merges file
    context_length: int = 0  # tokens of a text; fewer than the source's keep its first positions
    text_pool: str = ""  # pooling of a text encoder: first | mean
    base: str = ""  # base weights of a source that is a LoRA adapter alone
    weights: str = ""  # ema | plain, of a file that holds averaged weights beside the others
    reduce: str = ""  # of CrossGET's checkpoints: crossget | none
    image_r: int = -1  # tokens that each block of the vision tower merges; -1: not given
    text_r: int = -1  # the same of the text tower
    no_exits: bool = False  # leave out the exit of an ICAR checkpoint

    def given(self) -> set[str]:
        """Names of the fields that were set."""
        return {f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


@dataclass(frozen=True)
class Source:
    """Opened weights. `path` is what the user named, `configs` holds the JSON files beside the weights by file name.

    `layout` is the name of the detected layout, and empty during detection.
    """

    path: Path
    layout: str
    weights: Weights
    configs: dict[str, dict[str, Any]]
    adapter: Adapter | None = None  # that was merged into the weights

    @property
    def folder(self) -> Path:
        """The folder that the weights lie in."""
        return self.weights.path.parent

    @property
    def tensors(self) -> dict[str, Tensor]:
        """{name: tensor}; values are read when a tensor's `load` is called."""
        return self.weights.tensors

    def has(self, *prefixes: str) -> bool:
        """Whether a tensor's name begins with one of `prefixes`."""
        return any(name.startswith(prefixes) for name in self.tensors)

    def config(self, file: str) -> Fields:
        """The JSON file of that name beside the weights; empty where there is none."""
        return Fields(file, self.configs.get(file, {}))


@dataclass(frozen=True)
class Details:
    """What a source states beyond architecture and preprocessing."""

    origin: dict[str, Any] = field(default_factory=dict)  # added to `source` of icar.json
    extra: dict[str, Any] = field(default_factory=dict)  # more fields of icar.json
    notes: list[str] = field(default_factory=list)  # warnings for the user


_ARCHS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "clip": lambda values, where: from_dict(values, ClipArch, where),
    "vision": lambda values, where: from_dict(values, VisionArch, where),
    "text": lambda values, where: from_dict(values, TextArch, where),
    "complexity": scorer_arch,
    "convnext": lambda values, where: from_dict(values, ConvNeXtArch, where),
}


def arch_of(kind: str, values: dict[str, Any], where: str) -> Any:
    """The architecture of a checkpoint of this kind, from the `arch` of its icar.json. Raises ConfigError naming `where`."""
    return _ARCHS[kind](values, where)


@dataclass(frozen=True)
class ExportSource:
    """A checkpoint of this library that is written in another layout."""

    loaded: Checkpoint
    arch: Any  # ClipArch, VisionArch, ComplexityArch, BlocksArch or ConvNeXtArch

    @property
    def where(self) -> str:
        """The checkpoint's path, for messages."""
        return str(self.loaded.path)

    @property
    def description(self) -> dict[str, Any]:
        """The content of icar.json."""
        return self.loaded.description

    @property
    def params(self) -> pytree.Tree:
        """float32 parameters as a nested dict."""
        return self.loaded.params

    @property
    def preprocess(self) -> Preprocess:
        """How images are prepared."""
        return Preprocess.from_dict(self.description["preprocess"], f"{self.where}: preprocess")

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None where the checkpoint has none."""
        return Tokenizer.from_json(self.loaded.tokenizer) if self.loaded.tokenizer is not None else None


@dataclass(frozen=True)
class ExportFiles:
    """Files of an export by name, and what was left out.

    A file's suffix says how its content is written: .safetensors {name: tensor}, .pt whatever `write_torch` takes, .json an
    object, or text as it is.
    """

    files: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Export:
    """How a model is written in a layout.

    `to` is the name in `icar export --to`. Layouts may share one: of those whose checkpoint kind fits and whose `holds` is true
    of the architecture, the one that the checkpoint came from writes the model, else the first. `files` raises ConvertError for
    a model that the layout cannot express.
    """

    to: str
    files: Callable[[ExportSource], ExportFiles]
    holds: Callable[[Any], bool] = lambda arch: True
    keeps_exits: bool = False  # whether early exits are written; else they are left out or refused


_OF_TEXT = {"context_length", "text_pool"}  # options of layouts of text encoders
OF_SOURCES = {"base", "weights"}  # options that say what is read, whatever its layout
_OF_CROSSGET = {"reduce", "image_r", "text_r"}  # options of CrossGET's checkpoints
_OF_ICAR = {"no_exits"}
_ALL_OPTIONS = frozenset(f.name for f in dataclasses.fields(Options)) - _OF_TEXT - _OF_CROSSGET - _OF_ICAR


def no_details(source: Source, options: Options) -> Details:
    """For layouts whose sources state nothing more."""
    return Details()


@dataclass(frozen=True)
class Layout:
    """Everything this library knows about one weight layout.

    Functions raise ConvertError where something is missing, contradictory or not supported. None of them reads values:
    they see names, shapes, dtypes and configuration files.
    """

    name: str  # as printed, and as stored in icar.json
    kind: str  # of the checkpoint: one of KINDS
    # From names of tensors and configs; names come without wrappers (source.py). Raises for a variant that is not supported.
    detect: Callable[[Source], bool]
    arch: Callable[[Source, Options], Any]  # ClipArch, VisionArch, ComplexityArch or ConvNeXtArch
    # (source, architecture) -> rules. The architecture is None where it cannot be read and unknown names are to be listed.
    rules: Callable[[Source, Any], list[Rule]]
    # (source, options, architecture) -> preprocessing of images; None for a text tower.
    preprocess: Callable[[Source, Options, Any], Preprocess | None] = lambda source, options, arch: None
    details: Callable[[Source, Options], Details] = no_details
    # Whether the library antialiases positions for another image size, as OpenCLIP and timm do.
    antialiased: Callable[[Any], bool] = lambda arch: True
    # (source, the user's file or "", text tower) -> (tokenizer, its origin) or (None, a warning). For CLIPs alone.
    # Without one, vocabulary.find_tokenizer.
    tokenizer: Callable[[Source, str, TextArch], tuple[Tokenizer | None, str]] | None = None
    export: Export | None = None  # None: `icar export` does not write this layout
    options: frozenset[str] = _ALL_OPTIONS  # fields of Options that have an effect; others are refused
    weight_files: tuple[str, ...] = ()  # names of weight files besides those of folder.py, tried in a folder
    config_files: tuple[str, ...] = ()  # JSON files to read beside the weights
    precedence: int = 0  # layouts of a higher one are tried first


def shape_of(source: Source, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that the architecture is read from. Raises ConvertError where it is missing or of another rank."""
    tensor = source.tensors.get(name)
    if tensor is None:
        raise ConvertError(f"{source.path} ({source.layout} layout) lacks {name}, which the architecture is read from")
    if len(tensor.shape) != rank or 0 in tensor.shape:
        raise ConvertError(f"{source.path}: {name} has shape {tensor.shape}, expected {rank} axes")
    return tensor.shape


def square_side(source: Source, name: str, tokens: int) -> int:
    """The side of a square grid of `tokens` patches. Raises ConvertError for any other count."""
    side = round(tokens**0.5)
    if side < 1 or side * side != tokens:
        raise ConvertError(f"{source.path}: {name} holds {tokens} patch positions, which is not a square grid")
    return side


def require_agreement(source: Source, file: str, pairs: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ConvertError where a config contradicts the shapes; pairs: {field: (value in the config or None, found)}."""
    wrong = [f"{k}: {file} says {said}, the weights say {found}" for k, (said, found) in pairs.items()
             if said is not None and said != found]  # fmt: skip
    if wrong:
        raise ConvertError(f"{source.path}: the weights are not those of the config beside them:\n  " + "\n  ".join(wrong))

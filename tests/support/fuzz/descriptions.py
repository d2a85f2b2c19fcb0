"""Checkpoints, corpora, configurations, settings and filters as inputs."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.fuzz.mutations import VALUES, change_json
from tests.support.fuzz.reader import NOT_OBJECTS, Reader, WrongSilence, refused

# Checkpoints of this package


def small_clip(folder: Path) -> Path:
    from tests.support import runs
    from tests.support.small_clip import ARCH

    return runs.random_clip(folder, dataclasses.replace(ARCH.vision, embed_dim=24, depth=2, exits=(1,)))


def small_scorer(folder: Path) -> Path:
    from icar_jax import checkpoint
    from icar_jax.data.images import Preprocess
    from icar_jax.models.complexity import ComplexityArch, ComplexityModel
    from icar_jax.models.convnext import ConvNeXtArch
    from tests.support import drawn

    arch = ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), "regression", 32)
    about = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    return checkpoint.write(folder, "complexity", about, drawn.params(ComplexityModel.graph(arch).shapes, 0))


def bundle_file(file: str, folder: Path) -> list[bytes]:
    """Writes a bundle, and returns the content of one of its files."""
    from icar_jax import checkpoint

    if not (folder / "bundle").exists():
        parts = small_clip(folder / "clip"), small_scorer(folder / "scorer")
        routing = {"exits": [1, 2], "thresholds": [0.5], "found": {"cost": 0.7}}
        checkpoint.write_bundle(folder / "bundle", {"routing": routing}, *parts)
    return [(folder / "bundle" / file).read_bytes()]


def read_bundle(file: str, folder: Path, data: bytes) -> None:
    from icar_jax.evaluation.routing.calibration import bundle_costs
    from icar_jax.inference.loading import load
    from icar_jax.inference.text_model import TextModel

    (folder / "bundle" / file).write_bytes(data)
    load(folder / "bundle")
    bundle_costs(folder / "bundle")
    TextModel.open(folder / "bundle" / "clip", batch_size=4, dtype="float32")


ABSURD = json.dumps({"format": 1, "kind": "clip", "arch": {"vision": {"depth": 10**9}}, "preprocess": {}}).encode()


def corpus_seeds(folder: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from icar_jax.inference.files.corpus import SCHEMA

    np.save(folder / "000000.npy", np.ones((2, 4), np.float16))
    row = {"path": "a.jpg", "sha256": "0", "complexity": 0.5, "exit": 1, "milliseconds": 1.0}
    pq.write_table(pa.Table.from_pylist([row, row], SCHEMA), folder / "000000.parquet")
    about = {"format": 1, "model": {"clip": "x"}, "encoding": {"exit": None}, "embed_dim": 4, "shard_rows": 2, "complete": True}
    return [json.dumps(about).encode()]


def read_corpus(folder: Path, data: bytes) -> list[int]:
    from icar_jax.inference.files.corpus import open_corpus

    (folder / "corpus.json").write_bytes(data)
    corpus = open_corpus(folder)
    return [len(corpus), corpus[:2].shape[1], corpus.rows().num_rows]


def shard_seeds(folder: Path) -> list[bytes]:
    (folder / "corpus.json").write_bytes(corpus_seeds(folder)[0])
    return [(folder / "000000.npy").read_bytes()]


def read_shard(folder: Path, data: bytes) -> None:
    from icar_jax.inference.files.corpus import open_corpus

    (folder / "000000.npy").write_bytes(data)
    corpus = open_corpus(folder)
    corpus[: len(corpus)]


# Configurations


def run_seeds(folder: Path) -> list[bytes]:
    from icar_jax.config import to_json
    from tests.support.runs import tiny_config

    return [to_json(tiny_config()).encode(), to_json(tiny_config("complexity")).encode()]


def read_run(folder: Path, data: bytes) -> None:
    from icar_jax.config import validate
    from icar_jax.workdir import load_config

    (folder / "config.json").write_bytes(data)
    validate(load_config(folder))


def setting_seeds(folder: Path) -> list[bytes]:
    return [b'["config.optim.lr", 0.001]']


def change_setting(rng: random.Random, seeds: list[bytes]) -> tuple[bytes, str]:
    names = [name for name, _ in settings()]
    hostile = [math.inf, -math.inf, math.nan, 1e300, -1e300, 10**24, -(10**24), 2**63, 99_999_999_999]
    value = rng.choice(hostile if rng.random() < 0.5 else VALUES)
    return json.dumps([rng.choice(names), [value] if rng.random() < 0.2 else value]).encode(), "setting"


@functools.cache
def settings() -> list[tuple[str, Any]]:
    """(name, default) of every field."""
    from icar_jax.config import ExperimentConfig

    def below(node: Any, prefix: str) -> list[tuple[str, Any]]:
        pairs = [(f"{prefix}.{f.name}", getattr(node, f.name)) for f in dataclasses.fields(node)]
        return [
            each
            for name, value in pairs
            for each in (below(value, name) if dataclasses.is_dataclass(value) else [(name, value)])
        ]

    return below(ExperimentConfig(), "config")


def read_setting(folder: Path, data: bytes) -> None:
    from icar_jax.config import ExperimentConfig, validate

    name, value = json.loads(data)
    config = node = ExperimentConfig()
    *groups, field = name.split(".")[1:]
    for group in groups:
        node = getattr(node, group)
    setattr(node, field, tuple(value) if isinstance(value, list) else value)
    validate(config)
    numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
    if any(not abs(number) <= 1e12 for number in numbers):
        raise WrongSilence(f"{name}={value} is accepted")


# Weights of other libraries with their configuration

SOURCES = {
    "hf_gelu": ("config.json", "preprocessor_config.json"), "siglip": ("config.json", "preprocessor_config.json"),
    "open_clip_gelu": ("open_clip_config.json",), "timm_vit": ("config.json",), "hf_dinov2": ("config.json",),
    "bert": ("config.json",),
}  # fmt: skip


def source_seeds(case: str, file: str, folder: Path) -> list[bytes]:
    from tests.support import parity_cases

    parity_cases.write_source(parity_cases.load(case), folder / "source")
    found = folder / "source" / file
    return [found.read_bytes()]


def read_source(case: str, file: str, folder: Path, data: bytes) -> None:
    from icar_jax.convert import convert
    from tests.support import parity_cases

    (folder / "source" / file).write_bytes(data)
    convert.in_memory(folder / "source", convert.Options(**parity_cases.load(case).options))


def sources() -> list[Reader]:
    return [
        Reader(f"{case} {file}", functools.partial(source_seeds, case, file), functools.partial(read_source, case, file),
               change_json, make_handmade=functools.partial(refused, **NOT_OBJECTS))
        for case, files in SOURCES.items() for file in files
    ]  # fmt: skip


# Filters of searches


def filter_seeds(folder: Path) -> list[bytes]:
    return [b"path LIKE '%.jpg' AND (complexity > 0.5 OR exit IN (3, 6))", b"sha256 = 'ab''c'"]


def read_filter(folder: Path, data: bytes) -> None:
    from icar_jax.search import filters

    filters.fault_of(data.decode("utf-8", "replace"))

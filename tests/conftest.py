"""Small trained pieces that several tests share; made once a session."""

import dataclasses
import gc
import json

import compiling

compiling.prepare()  # before jax is imported anywhere

import drawn
import pytest

from icar_jax import checkpoint
from icar_jax.config import (
    ClipConfig,
    ComplexityConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    OptimConfig,
    TrainConfig,
)
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import registry
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch

# What most training tests train: as little of everything as shows an exit below full depth.
registry.CLIP["vit_tests"] = ClipArch(
    VisionArch(64, 32, 128, 3, 4, 256, 64), TextArch(77, 49408, 64, 1, 4, 128, 64)
)  # fmt: skip
registry.CONVNEXT["convnextv2_tests"] = ConvNeXtArch((1, 1, 1, 1), (8, 8, 16, 16), 2)
CAPTIONS = ["a small red circle on the left", "two blue squares above a large green star", "stripes"]

# Tracing makes objects by the million, and a third of its time went into looking for cycles among them.
gc.collect()
gc.freeze()
gc.set_threshold(200_000, 20, 20)


def metric_lines(workdir):
    """What a run has logged, a dict a line."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tiny_config(task="clip", **train):
    """A run of seconds: a small tower on scenes."""
    steps = {"steps": 4, "batch_size": 8, "dtype": "float32", "log_every": 1, "checkpoint_every": 2, **train}
    return ExperimentConfig(
        task=task,
        clip=ClipConfig(variant="vit_tests", exits=(2,), context_length=16),
        complexity=ComplexityConfig(variant="convnextv2_tests", image_size=32),
        data=DataConfig(source="scenes", scenes_size=200, calibration_size=40, vocabulary=300),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(**steps),
        eval=EvalConfig(split="val", size=30, batch_size=8, bootstrap=100, random_draws=3),
    )


def random_clip(folder, vision):
    """Writes a CLIP with random weights and a small text tower; `vision` embeds into 24 dimensions."""
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    text = TextArch(16, tokenizer.vocab_size, 16, 1, 2, 32, 24, end_id=tokenizer.end_id)
    arch = ClipArch(vision, text)
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(vision.image_size, "squash").to_dict()}
    return checkpoint.write(folder, "clip", description, drawn.params(Clip.graph(arch).shapes, 0), tokenizer.to_json())


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP checkpoint with exits after 1, 2 and 3 blocks."""
    vision = VisionArch(32, 8, 32, 3, 4, 64, 24, exits=(1, 2))
    return random_clip(tmp_path_factory.mktemp("clip") / "model", vision)


@pytest.fixture(scope="session")
def complexity_folder(tmp_path_factory):
    """A random complexity checkpoint."""
    arch = ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (8, 8, 8, 8)), "regression", 32)
    description = {"arch": dataclasses.asdict(arch), "preprocess": Preprocess(32, "squash").to_dict()}
    params = drawn.params(ComplexityModel.graph(arch).shapes, 3)
    # A fresh head scores nearly all images alike; a steeper last layer spreads them.
    params["head"]["fc3"]["kernel"] = params["head"]["fc3"]["kernel"] * 8
    return checkpoint.write(tmp_path_factory.mktemp("complexity") / "model", "complexity", description, params)

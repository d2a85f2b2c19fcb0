"""Small runs and models that many tests use."""

import dataclasses
import json

import numpy as np

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
from icar_jax.models import variants
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch
from icar_jax.models.vision import VisionArch
from tests.support import drawn

# What most training tests train: as little of everything as shows an exit below full depth.
variants.CLIP["vit_tests"] = ClipArch(
    VisionArch(64, 32, 128, 3, 4, 256, 64), TextArch(77, 49408, 64, 1, 4, 128, 64)
)  # fmt: skip
variants.CONVNEXT["convnextv2_tests"] = ConvNeXtArch((1, 1, 1, 1), (8, 8, 16, 16), 2)
CAPTIONS = ["a small red circle on the left", "two blue squares above a large green star", "stripes"]


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


def regret_config(clip, variant="blocks", **fields):
    config = tiny_config("complexity", **fields)
    config.data.scenes_pixels = 32
    config.complexity.clip, config.complexity.target, config.complexity.variant = str(clip), "regret", variant
    config.complexity.blocks = 1 if variant == "blocks" else 0
    return config


def among_rivals(clip):
    """Enough of them to be cut over fsdp."""
    config = regret_config(clip, steps=2, batch_size=16)
    config.complexity.rivals, config.complexity.regret, config.data.scenes_size = 2800, "kl", 3000
    return config


def batch_of(tokenizer, task, rows=8):
    data = np.random.default_rng(0)
    captions = [CAPTIONS[i % 3] + " two" * (i % 4) for i in range(rows)]
    images = data.integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
    return {"image": images, "tokens": tokenizer(captions, task.context_length)}

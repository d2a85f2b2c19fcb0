"""Pairs per second of the ViT-B/32 dual-path training step, compared with PyTorch in the same run.

    python benchmarks/train_step.py [--quick] [--batch 16] [--steps 5] [--dtypes bf16 f32] [--json out.json]

The step is that of train.py: one pass through both towers with an exit after 6 of 12 blocks, symmetric loss at both depths,
global-norm clipping, AdamW, float32 weights, donated state. The PyTorch row needs torch and open_clip_torch; it encodes each
image twice, as the reference recipe does. The two are interleaved, and the fastest step of each counts. Data is in memory.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import jax
import numpy as np
from torch_step import BLOCKS_RUN, import_open_clip
from torch_step import make_step as make_torch_step

from icar_jax import architectures
from icar_jax import config as cfg
from icar_jax.models.clip import ClipArch
from icar_jax.parallel.mesh import make_mesh
from icar_jax.training.optimizer import make_optimizer
from icar_jax.training.step import init_state, make_step, parameter_count, put_batch
from icar_jax.training.tasks.kinds import kind_of

DTYPES = {"bf16": "bfloat16", "f32": "float32"}


class Vocabulary:
    """CLIP's vocabulary size and end token, which is all that the step needs from a tokenizer."""

    vocab_size, end_id = 49408, 49407


def experiment(variant: str, batch: int, dtype: str) -> cfg.ExperimentConfig:
    config = cfg.ExperimentConfig(clip=cfg.ClipConfig(variant=variant, exits=(BLOCKS_RUN,)))
    config.train.batch_size, config.train.dtype = batch, DTYPES[dtype]
    return cfg.validate(config)


def random_batch(arch: ClipArch, batch: int) -> dict[str, np.ndarray]:
    """Returns random uint8 images and captions of 20 tokens."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((batch, arch.text.context_length), np.int32)
    tokens[:, :20] = rng.integers(1, arch.text.vocabulary - 2, (batch, 20))
    tokens[:, 20] = arch.text.end_id
    side = arch.vision.image_size
    return {"image": rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8), "tokens": tokens}


class JaxStep:
    """The compiled step with its state; `time` runs it."""

    def __init__(self, batch: int, dtype: str, variant: str = "vit_b32"):
        config = experiment(variant, batch, dtype)
        self.task = kind_of(config).task(Vocabulary)
        self.mesh = make_mesh(config.mesh)
        optimizer = make_optimizer(config.optim, 1000)
        self.state = init_state(self.task, optimizer, self.mesh, config)
        self.step = make_step(self.task, optimizer, self.mesh, config)
        self.data = random_batch(architectures.clip_arch(config.clip), batch)
        start = time.perf_counter()
        self.time(1)
        self.compile_s = time.perf_counter() - start

    def time(self, steps: int) -> list[float]:
        """Runs `steps` steps and returns the seconds of each."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            self.state, metrics = self.step(self.state, put_batch(self.data, self.task.fields, self.mesh), {})
            jax.block_until_ready((self.state, metrics))
            times.append(time.perf_counter() - start)
        return times


def has_torch() -> str | None:
    """Returns None if PyTorch's row can be measured, otherwise what is missing."""
    try:
        import_open_clip()
    except ImportError as error:
        return str(error)
    return None


def benchmark_steps(batch: int, steps: int, dtypes: list[str], rounds: int = 2) -> list[dict]:
    """Returns one row per framework and dtype; the frameworks are interleaved for `rounds` rounds."""
    missing = has_torch()
    if missing:
        print(f"without the PyTorch rows: {missing}")
    rows = []
    for dtype in dtypes:
        ours, theirs = JaxStep(batch, dtype), None if missing else make_torch_step(batch, dtype)
        if theirs:
            theirs()  # the first step allocates
        times: dict[str, list[float]] = {"icar_jax": [], "torch": []}
        for _ in range(rounds):
            times["icar_jax"] += ours.time(steps)
            for _ in range(steps if theirs else 0):
                start = time.perf_counter()
                theirs()
                times["torch"].append(time.perf_counter() - start)
        best = {name: batch / min(seconds) for name, seconds in times.items() if seconds}
        for name, rate in best.items():
            row = {"framework": name, "dtype": dtype, "batch": batch, "pairs_per_s": rate, "step_s": times[name]}
            if "torch" in best:
                row["ratio_to_torch"] = rate / best["torch"]
            if name == "icar_jax":
                row |= {"compile_s": ours.compile_s, "parameters": parameter_count(ours.task)}
            rows.append(row)
        del ours, theirs
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bf16 only, one round of three steps")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", choices=tuple(DTYPES), default=["bf16", "f32"])
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    rows = benchmark_steps(args.batch, 3, ["bf16"], 1) if args.quick else benchmark_steps(args.batch, args.steps, args.dtypes)
    print(f"ViT-B/32, exit after {BLOCKS_RUN} of 12 blocks, batch {args.batch}, {jax.default_backend()}, jax {jax.__version__}")
    print(f"{'framework':>10} {'dtype':>6} {'pairs/s':>9} {'x torch':>8}")
    for row in rows:
        ratio = f"{row['ratio_to_torch']:8.2f}" if "ratio_to_torch" in row else "       -"
        print(f"{row['framework']:>10} {row['dtype']:>6} {row['pairs_per_s']:9.2f} {ratio}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Shapes of benchmarks/accelerator.py, its clock for device programs, and the peak speed of the device."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from icar_jax import pytree
from icar_jax.models.clip import ClipArch
from icar_jax.models.text import TextArch
from icar_jax.models.variants import CLIP
from icar_jax.models.vision import VisionArch
from icar_jax.planner.chips import CHIPS

# Names of JAX's device kinds that do not contain the chip's name.
_KINDS = {"v5 lite": "v5e", "v6 lite": "v6e", "v5": "v5p"}


@dataclass(frozen=True)
class Size:
    """Everything that differs between a real run and a dry run.

    Attributes:
        arch: CLIP of the training part; its exits are trained.
        exits: early exits of the encoding part.
        batches: first and last batch size of the training part by remat, doubled in between.
        encode: images per batch and batches per routed pass.
        attention: (batch, tokens, heads, head dimension, causal) of each case of the attention part.
        op: (batch, tokens, heads, head dimension) of the inputs of single operations.
        conv: sides of the image and of the kernel of the depthwise convolution.
        product: side of the square matrix product that measures the device.
        steps: fewest and most timed steps.
        seconds: timed steps end after this time, once there are enough.
    """

    name: str
    arch: ClipArch
    exits: tuple[int, ...]
    batches: dict[str, tuple[int, int]]
    encode: tuple[int, int]
    attention: tuple[tuple[int, int, int, int, bool], ...]
    op: tuple[int, int, int, int]
    conv: tuple[int, int]
    product: int
    steps: tuple[int, int]
    seconds: float


def _with_exits(arch: ClipArch, exits: tuple[int, ...]) -> ClipArch:
    return dataclasses.replace(arch, vision=dataclasses.replace(arch.vision, exits=exits))


SIZES = {
    "full": Size(
        name="full",
        arch=_with_exits(CLIP["vit_l14"], (12,)),
        exits=(6, 12, 18),
        batches={"full": (512, 8192), "dots": (256, 4096), "none": (256, 2048)},
        encode=(512, 8),
        attention=(
            (128, 257, 16, 64, False), (32, 1025, 16, 64, False), (256, 77, 12, 64, True), (64, 577, 16, 64, False),
            (64, 729, 16, 72, False), (8, 4096, 16, 64, False),
        ),
        op=(8, 257, 16, 64),
        conv=(14, 7),
        product=8192,
        steps=(5, 20),
        seconds=2.0,
    ),
    "tiny": Size(
        name="tiny",
        arch=ClipArch(VisionArch(16, 8, 16, 3, 2, 32, 16, exits=(1,)), TextArch(8, 32, 16, 1, 2, 32, 16, end_id=31)),
        exits=(1, 2),
        batches={"full": (2, 4), "none": (2, 2)},
        encode=(4, 2),
        attention=((2, 9, 2, 8, False), (1, 6, 2, 8, True)),
        op=(2, 9, 2, 8),
        conv=(3, 3),
        product=64,
        steps=(2, 3),
        seconds=0.05,
    ),
}  # fmt: skip


def size_of(name: str | None) -> Size:
    """Returns the named size; None is 'tiny' on a CPU and 'full' elsewhere."""
    return SIZES[name or ("tiny" if jax.default_backend() == "cpu" else "full")]


def about(size: Size) -> dict[str, Any]:
    """Returns what must not differ between runs that share a file."""
    return {"size": size.name, "device_kind": jax.devices()[0].device_kind, "jax": jax.__version__}


def peak_flops(kind: str | None = None) -> float | None:
    """Returns the bf16 FLOP/s of a device kind (None: this device) by its data sheet; None if it is unknown."""
    kind = (kind or jax.devices()[0].device_kind).lower()
    names = {**{name: name for name in CHIPS}, **_KINDS}
    found = [chip for text, chip in names.items() if text in kind]
    return CHIPS[found[0]].bf16_flops if found else None


def random_weights(shapes: Any) -> Any:
    """Returns random weights, small enough for finite activations: repeated numbers, since drawing all of them takes long."""
    numbers = 0.02 * np.random.default_rng(1).standard_normal(1_000_003, np.float32)
    leaf = lambda path, s: jax.device_put(np.resize(numbers, s.shape) + np.float32(path.endswith("scale")))
    return pytree.map_with_path(leaf, shapes)


@dataclass
class Timed:
    """A compiled program: seconds of its compilation, bytes that it needs according to the compiler."""

    run: Callable[..., Any]
    compile_s: float
    needed_bytes: int


def compiled(function: Callable, *args: Any, **options: Any) -> Timed:
    """Compiles `function` for the arguments; `options` are those of jax.jit."""
    start = time.perf_counter()
    program = jax.jit(function, **options).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory = program.memory_analysis()
    needed = 0
    if memory is not None:
        needed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed += memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    return Timed(program, seconds, needed)


def time_steps(step: Callable[[], Any], size: Size) -> dict[str, Any]:
    """Returns the median of several timed calls of `step` after two that are not timed; each waits for its result."""
    for _ in range(2):
        jax.block_until_ready(step())
    fewest, most = size.steps
    times: list[float] = []
    while len(times) < fewest or (len(times) < most and sum(times) < size.seconds):
        start = time.perf_counter()
        jax.block_until_ready(step())
        times.append(time.perf_counter() - start)
    return {"median_s": statistics.median(times), "fastest_s": min(times), "slowest_s": max(times), "steps": len(times)}


def speed(flops: float, seconds: float) -> dict[str, Any]:
    """Returns TFLOP/s of counted FLOPs, and their share of the device's peak (None if that is unknown)."""
    peak = peak_flops()
    return {"tflops": flops / seconds / 1e12, "of_peak": flops / seconds / peak if peak else None}


def memory_bytes(name: str) -> int | None:
    """Returns an entry of the device's memory statistics; None where it has none."""
    return (jax.devices()[0].memory_stats() or {}).get(name)

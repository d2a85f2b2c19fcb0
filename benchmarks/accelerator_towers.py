"""Parts of benchmarks/accelerator.py about whole towers: training step, encoding, trace."""

from __future__ import annotations

import dataclasses
import gzip
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from accelerator_ops import ATTENTIONS
from accelerator_sizes import Size, Timed, compiled, memory_bytes, random_weights, speed, time_steps

from icar_jax.config import OptimConfig
from icar_jax.inference.forward import Forward
from icar_jax.inference.router import Router
from icar_jax.models import flops
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.fused_attention import cudnn_obstacle, gpu_capability
from icar_jax.models.ops import normalise
from icar_jax.models.transformer import Execution
from icar_jax.training.losses.contrastive import per_exit
from icar_jax.training.optimizer import make_optimizer

MEAN = STD = (0.5, 0.5, 0.5)
CONTAINERS = ("while", "call", "conditional")
LONGEST = 10  # operations in the summary of a trace
Named = dict[str, Any]


# --- training ----------------------------------------------------------------------------------------------------------------


class TrainStep:
    """The step of a CLIP with early exits: bf16, float32 weights, softmax loss at every exit, clipping, AdamW, donated state.

    Programs are kept: the trace runs one that the training part has compiled.
    """

    programs: ClassVar[dict[tuple, Timed]] = {}

    def __init__(self, arch: ClipArch, batch: int, attention: str, remat: str):
        self.arch, self.batch = arch, batch
        execution = Execution(remat, scan=True)
        clip = Clip.graph(arch, execution=execution, attention=ATTENTIONS[attention], dtype=jnp.bfloat16)
        optimizer = make_optimizer(OptimConfig(), 1000)

        def loss(params: Any, data: Any) -> jax.Array:
            images = clip.encode_image_exits(params, normalise(data["image"], MEAN, STD))
            scales = clip.logit_scales(params)
            losses = per_exit(
                images, clip.encode_text(params, data["tokens"]), scales, None, kind="softmax", direction="symmetric"
            )
            return sum(losses.values()) / len(losses)

        def step(state: Any, data: Any) -> Any:
            value, gradient = jax.value_and_grad(loss)(state["params"], data)
            updates, moments = optimizer.update(gradient, state["moments"], state["params"])
            return {"params": optax.apply_updates(state["params"], updates), "moments": moments}, value

        params = random_weights(clip.shapes)
        self.state = {"params": params, "moments": jax.jit(optimizer.init)(params)}
        self.data = jax.device_put(random_pairs(arch, batch))
        key = arch, batch, attention, remat
        if key not in self.programs:
            self.programs[key] = compiled(step, self.state, self.data, donate_argnums=0)
        self.program = self.programs[key]

    def run(self) -> Any:
        """Runs one step; returns everything to wait for."""
        self.state, self.loss = self.program.run(self.state, self.data)
        return self.state, self.loss


def random_pairs(arch: ClipArch, batch: int) -> dict[str, np.ndarray]:
    """Returns random uint8 images and captions that fill a quarter of the context."""
    rng, side, end = np.random.default_rng(0), arch.vision.image_size, arch.text.context_length // 4
    tokens = np.zeros((batch, arch.text.context_length), np.int32)
    tokens[:, :end] = rng.integers(1, arch.text.end_id - 1, (batch, end))
    tokens[:, end] = arch.text.end_id
    return {"image": rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8), "tokens": tokens}


def training(size: Size, done: Named) -> Iterator[tuple[str, Callable[[], Named]]]:
    """Doubles the batch of every combination in turn, so that a run that ends early has all of them at some batch."""
    name_of = lambda attention, remat, batch: f"{attention} remat {remat} batch {batch}"
    rounds = 1 + max((last // first).bit_length() - 1 for first, last in size.batches.values())
    for turn in range(rounds):
        for remat, (first, last) in size.batches.items():
            batch = first << turn
            for attention in ("cudnn", "xla"):
                smaller = [done.get(name_of(attention, remat, first << i), {}) for i in range(turn)]
                if batch <= last and not any({"error", "skipped"} & found.keys() for found in smaller):
                    yield name_of(attention, remat, batch), partial(time_training, size, attention, remat, batch)


def time_training(size: Size, attention: str, remat: str, batch: int) -> Named:
    """Times the training step. `tflops` counts what the gradient needs, `recomputed_tflops` what remat computes again."""
    arch = size.arch
    if attention == "cudnn" and (why := cudnn_obstacle_of(arch)):
        return {"skipped": why}
    before = memory_bytes("peak_bytes_in_use")
    step = TrainStep(arch, batch, attention, remat)
    found = time_steps(step.run, size)
    seconds, peak, loss = found["median_s"], memory_bytes("peak_bytes_in_use"), float(step.loss)
    if not np.isfinite(loss):
        raise ArithmeticError(f"the loss is {loss}")
    needed = 3 * batch * (flops.image_flops(arch.vision) + flops.text_flops(arch.text))
    again = batch * sum(flops.recomputed_flops(tower, remat) for tower in (arch.vision, arch.text))
    return {
        "pairs_per_s": batch / seconds, "batch": batch, "compile_s": step.program.compile_s, **found, **speed(needed, seconds),
        "recomputed_tflops": again / seconds / 1e12, "needed_bytes": step.program.needed_bytes,
        # The device's peak is that of the process: it tells about this case only if it grew.
        "peak_bytes": peak if peak is not None and peak != before else None, "last_loss": loss,
    }  # fmt: skip


def cudnn_obstacle_of(arch: ClipArch) -> str:
    """Returns why cuDNN's attention cannot be used in both towers, or ""."""
    towers = ((arch.vision.tokens, arch.vision), (arch.text.context_length, arch.text))
    found = (cudnn_obstacle(jnp.bfloat16, t.width // t.heads, (n, n), gpu_capability()) for n, t in towers)
    return next(filter(None, found), "")


# --- encoding ----------------------------------------------------------------------------------------------------------------


def encoding(size: Size, done: Named) -> Iterator[tuple[str, Callable[[], Named]]]:
    made: dict[str, Encoder] = {}

    def encoder() -> Encoder:
        if not made:
            made["encoder"] = Encoder(size)
        return made["encoder"]

    exits = (size.arch.vision.depth, *size.exits)
    for exit in exits:
        yield f"{exit} blocks", lambda exit=exit: encoder().time_exit(exit)
    yield "routed, equal shares", lambda: encoder().time_routed(done)


class Encoder:
    """The image tower with exits as they are served: the default attention, bf16, uint8 images."""

    def __init__(self, size: Size):
        self.size, (self.batch, self.batches) = size, size.encode
        self.arch = dataclasses.replace(size.arch, vision=dataclasses.replace(size.arch.vision, exits=size.exits))
        self.clip = Clip.graph(self.arch, execution=Execution(scan=True), dtype=jnp.bfloat16)
        self.params = random_weights(self.clip.shapes)

    def encode(self, exit: int, params: Any, pixels: jax.Array) -> jax.Array:
        return self.clip.encode_image(params, normalise(pixels, MEAN, STD), exit)

    def pixels(self, count: int) -> np.ndarray:
        """uint8 images; the first value of each counts through the exits."""
        side, exits = self.arch.vision.image_size, len(self.arch.vision.all_exits)
        pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
        pixels[:, 0, 0, 0] = np.arange(count) % exits
        return pixels

    def time_exit(self, exit: int) -> Named:
        """Times one batch that lies on the device already."""
        pixels = jax.device_put(self.pixels(self.batch))
        program = compiled(partial(self.encode, exit), self.params, pixels)
        found = time_steps(lambda: program.run(self.params, pixels), self.size)
        rate = speed(self.batch * flops.vision_flops(self.arch.vision, exit), found["median_s"])
        return {
            "images_per_s": self.batch / found["median_s"], "batch": self.batch, "compile_s": program.compile_s,
            "peak_bytes": program.needed_bytes, **found, **rate,
        }  # fmt: skip

    def time_routed(self, done: Named) -> Named:
        """Times the router on images in host memory, an equal share to each exit; `of_parts`: of the speed of full batches."""
        vision = self.arch.vision
        towers = {e: Forward(partial(self.encode, e), self.params, (self.batch,)) for e in vision.all_exits}
        score = Forward(lambda _, pixels: pixels[:, 0, 0, 0].astype(jnp.float32), {}, (self.batch,))
        count = self.batch * self.batches * len(towers) // 2
        pixels = self.pixels(count)
        batches = [(part, part) for part in (pixels[i : i + self.batch] for i in range(0, count, self.batch))]
        thresholds = tuple(i + 0.5 for i in range(len(towers) - 1))
        router = Router(towers, score, thresholds, self.batch)
        start = time.perf_counter()
        router.embed_batches(batches, vision.embed_dim)
        first_s = time.perf_counter() - start
        found = time_steps(lambda: router.embed_batches(batches, vision.embed_dim).embeddings, self.size)
        share = {e: count // len(towers) for e in towers}
        needed = sum(n * flops.vision_flops(vision, e) for e, n in share.items())
        result = {
            "images_per_s": count / found["median_s"], "images": count, "compile_s": first_s, **found,
            **speed(needed, found["median_s"]),
        }  # fmt: skip
        alone = [done.get(f"{e} blocks", {}).get("images_per_s") for e in towers]
        if all(alone):
            result["of_parts"] = result["images_per_s"] * sum(1 / rate for rate in alone) / len(towers)
        return result


# --- trace -------------------------------------------------------------------------------------------------------------------


def trace(size: Size, done: Named) -> Iterator[tuple[str, Callable[[], Named]]]:
    batch = size.batches["full"][0]
    for attention in ("cudnn", "xla"):
        yield f"step {attention} remat full batch {batch}", partial(trace_step, size, attention, batch)


def trace_step(size: Size, attention: str, batch: int) -> Named:
    """Records one training step with jax.profiler and returns its longest operations."""
    if attention == "cudnn" and (why := cudnn_obstacle_of(size.arch)):
        return {"skipped": why}
    step = TrainStep(size.arch, batch, attention, "full")
    for _ in range(2):
        jax.block_until_ready(step.run())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of Python would fill the trace
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        jax.block_until_ready(step.run())
        jax.profiler.stop_trace()
        files = sorted(Path(folder).rglob("*.trace.json.gz"))
        if not files:
            raise FileNotFoundError("the profiler wrote no .trace.json.gz")
        with gzip.open(files[0], "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    return {"compile_s": step.program.compile_s, "batch": batch, **longest_operations(events)}


def longest_operations(events: list[Named]) -> Named:
    """Returns the operations with the largest total time, from a trace in Chrome's format.

    Those of the device count if it has a process in the trace, and of its threads those of operations where they are told from
    modules and steps; else those of XLA's threads on the host, without what contains others. Names that differ in a number
    only are added up.
    """
    names = {("process_name", e["pid"]): e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    on_device = {pid for (_, pid), name in names.items() if name.startswith("/device:")}
    chosen = {at for at, name in threads.items() if at[0] in on_device and ("Stream" in name or name == "XLA Ops")}
    if not chosen:
        chosen = {at for at, name in threads.items() if at[0] not in on_device and "XLA" in name}
    taken: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in events:
        if event.get("ph") == "X" and (event.get("pid"), event.get("tid")) in chosen:
            name = str(event["name"]).rstrip("0123456789").rstrip("._")
            if name in CONTAINERS or "::" in name:
                continue
            total = taken[name]
            total[0] += event.get("dur", 0) / 1e3
            total[1] += 1
    whole = sum(ms for ms, _ in taken.values())
    order = sorted(taken.items(), key=lambda item: -item[1][0])[:LONGEST]
    longest = [
        {"name": name, "ms": ms, "count": int(count), "share": ms / whole if whole else 0.0} for name, (ms, count) in order
    ]
    return {"traced_ms": whole, "longest": longest}

"""Plans a training step for hardware that is not available: memory, traffic, and a bound on speed.

The real training step is compiled ahead of time for abstract inputs. The TPU compiler does this for any slice without a TPU.
Without it, CPU devices represent the chips, and memory figures are those of the CPU compiler.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from icar_jax import config as cfg
from icar_jax.config import ExperimentConfig
from icar_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh
from icar_jax.parallel.rules import shardings
from icar_jax.planner import cost, hlo
from icar_jax.planner.chips import Chip
from icar_jax.planner.cost import Collective
from icar_jax.planner.flops import step_flops
from icar_jax.training.optimizer import make_optimizer, require_matches
from icar_jax.training.step import abstract_state, make_step
from icar_jax.training.tasks import regret
from icar_jax.training.tasks.base import Task
from icar_jax.training.tasks.kinds import kind_of

GIB = 2**30
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes per chip. The first four follow from shapes and shardings, the others from the compiler (0 if it failed)."""

    params: int
    optimizer: int
    ema: int
    batch: int
    temporaries: int = 0  # activations, gradients and all other buffers that live within the step
    other: int = 0  # program code, padding of inputs to the chip's tiles, results that do not reuse an input buffer
    needed: int = 0  # if the step does not fit: the total in the compiler's error message

    @property
    def state(self) -> int:
        return self.params + self.optimizer + self.ema + self.batch

    @property
    def total(self) -> int:
        return max(self.state + self.temporaries + self.other, self.needed)


@dataclass(frozen=True)
class Plan:
    """Result of planning one step. FLOPs, bytes and seconds are per chip and step; seconds are bounds, not measurements."""

    chip: Chip
    mesh: dict[str, int]
    batch_size: int
    remat: str
    scan: bool
    compiler: str  # TPU | CPU
    lower_s: float
    compile_s: float  # wall clock
    compile_cpu_s: float  # processor time of all threads, which does not depend on the machine's load
    memory: Memory
    model_flops: float
    step_flops: float  # including recomputation
    collectives: tuple[Collective, ...] = ()
    traffic_bytes: int = 0  # read from and written to the chip's memory
    cycles: int = 0  # the TPU compiler's estimate for all instructions in sequence; 0 for other compilers
    kernels: int = 0  # runs of kernels that `cycles` leaves out
    unknown_loops: int = 0  # number of loops with unknown trip count, which are counted once
    error: str = ""  # error message of the compiler if the step does not fit

    @property
    def devices(self) -> int:
        return self.mesh["data"] * self.mesh["fsdp"] * self.mesh["tensor"]

    @property
    def fits(self) -> bool:
        return not self.error and self.memory.total <= self.chip.usable_bytes

    @property
    def compute_s(self) -> float:
        return self.step_flops / self.chip.bf16_flops

    @property
    def memory_s(self) -> float:
        return self.traffic_bytes / self.chip.hbm_bytes_s

    @property
    def links_s(self) -> float:
        return sum(c.sent_bytes for c in self.collectives) / self.chip.link_bytes_s

    @property
    def roofline_s(self) -> float:
        """Roofline: the maximum of compute, memory and link time, as if they overlapped fully and each ran at its peak."""
        return max(self.compute_s, self.memory_s, self.links_s)

    @property
    def schedule_s(self) -> float:
        """Sum of the TPU compiler's cycle estimates in seconds, without waiting for other chips; 0 if there are none."""
        return self.cycles / self.chip.clock_hz if self.cycles else 0.0

    @property
    def step_s(self) -> float:
        """Estimated seconds per step, by which plans are ranked: the maximum of roofline and compiler schedule."""
        return max(self.roofline_s, self.schedule_s)

    @property
    def pairs_per_s(self) -> float:
        return self.batch_size / self.step_s

    @property
    def peak_share(self) -> float:
        """Model FLOPs utilisation (MFU): model FLOPs without recomputation / (peak FLOP/s x estimated seconds per step)."""
        return self.model_flops / self.chip.bf16_flops / self.step_s

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        derived = (
            "devices", "fits", "compute_s", "memory_s", "links_s", "roofline_s", "schedule_s", "step_s",
            "pairs_per_s", "peak_share",
        )  # fmt: skip
        values = dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}
        values["memory"] |= {"total": self.memory.total}
        return values | {"chip": self.chip.name}


def plan(config: ExperimentConfig, devices: list, chip: Chip, compiler: str = "TPU") -> Plan:
    """Compiles the training step of `config` for `devices` (of a TPU topology, or CPU devices in their place).

    Returns a plan; if the step does not fit, its `fits` is False. Raises ConfigError for an invalid configuration.
    """
    config = checked(config)
    mesh = make_mesh(config.mesh, devices)
    cfg.validate_batch(config.train.batch_size, batch_shards(mesh))
    kind = kind_of(config)
    task = kind.task(mesh=mesh)
    require_matches(config.train.freeze, config.optim.rates, task.shapes)
    optimizer = make_optimizer(config.optim, config.train.steps, kind.frozen_groups)
    state, batch = abstract_state(task, optimizer, mesh, config), abstract_batch(config, task, mesh)
    frozen = abstract_frozen(task, mesh)
    work = step_flops(config, task.arch)
    memory = Memory(
        bytes_per_device(state["params"]), bytes_per_device(state["opt_state"]), bytes_per_device(state.get("ema", {})),
        bytes_per_device(batch) + bytes_per_device(frozen),
    )  # fmt: skip
    made = Plan(
        chip, dict(mesh.shape), config.train.batch_size, config.train.remat, config.train.scan_blocks, compiler, 0.0, 0.0, 0.0,
        memory, work.model / len(devices), work.total / len(devices),
    )  # fmt: skip
    if memory.state > chip.usable_bytes:
        return dataclasses.replace(made, error="parameters, optimizer state and batch alone exceed the chip's memory")
    return _compile(made, make_step(task, optimizer, mesh, config), (state, batch, frozen))


def _compile(made: Plan, step: Any, arguments: tuple[Any, ...]) -> Plan:
    start = time.perf_counter()
    lowered = step.lower(*arguments)
    lower_s, start, start_cpu = time.perf_counter() - start, time.perf_counter(), time.process_time()
    compiled, error = None, ""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as failure:
        error = str(failure)
        if "RESOURCE_EXHAUSTED" not in error:
            raise
    made = dataclasses.replace(
        made, lower_s=lower_s, compile_s=time.perf_counter() - start, compile_cpu_s=time.process_time() - start_cpu
    )
    if compiled is None:
        memory = dataclasses.replace(made.memory, needed=needed_bytes(error))
        return dataclasses.replace(made, memory=memory, error=error)
    found, state_bytes = compiled.memory_analysis(), made.memory.state
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    other = found.argument_size_in_bytes - state_bytes + kept + found.generated_code_size_in_bytes
    module = hlo.parse(compiled.as_text())
    return dataclasses.replace(
        made,
        memory=dataclasses.replace(made.memory, temporaries=found.temp_size_in_bytes, other=max(other, 0)),
        collectives=cost.collectives(module),
        traffic_bytes=cost.memory_traffic(module),
        cycles=cost.cycles(module) if made.compiler == "TPU" else 0,
        kernels=cost.kernels_without_estimate(module),
        unknown_loops=len(set(module.unknown_loops)),
    )


def checked(config: ExperimentConfig) -> ExperimentConfig:
    """Returns a validated copy of `config`; data.root may be empty, because planning reads no data. Raises ConfigError."""
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, root=config.data.root or "not read"))
    return cfg.validate(config)


def abstract_batch(config: ExperimentConfig, task: Task, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the global batch as ShapeDtypeStructs with shardings."""
    n, size = config.train.batch_size, task.preprocess.image_size
    entries = {
        "image": ((n, size, size, 3), jnp.uint8),
        "tokens": ((n, task.context_length), jnp.int32),
        "complexity": ((n,), jnp.float32),
        regret.INDEX: ((n,), jnp.int32),
        **{name: ((n, p.image_size, p.image_size, 3), jnp.uint8) for name, p in task.others.items()},
    }
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*entries[name], sharding=sharding) for name in task.fields}


def abstract_frozen(task: Task, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Returns the arrays of `task.frozen` as ShapeDtypeStructs with shardings."""
    placed = lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
    return {name: jax.tree.map(placed, tree, shardings(tree, mesh)) for name, tree in task.frozen.items()}


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes per device of a tree of ShapeDtypeStructs with shardings, without padding."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def needed_bytes(message: str) -> int:
    """Returns the bytes needed according to the compiler's RESOURCE_EXHAUSTED message; 0 if it has no such number."""
    for pattern in (r"\(([\d.]+)([KMGT]?)B?\) exceeds", r"Used ([\d.]+)([KMGT]?)B? of"):
        if match := re.search(pattern, message):
            return int(float(match[1]) * _UNITS[match[2]])
    return 0

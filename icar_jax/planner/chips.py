"""Accelerator chips by their public figures, and the devices a plan is compiled for without having them.

Bandwidth and compute: Cloud TPU documentation and NVIDIA data sheets, per chip, bf16 without sparsity. Links are counted in one
direction, half of the bidirectional figure. Usable memory of a TPU is what its compiler accepts (its own message names it); of
a GPU what the driver leaves, of which XLA takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from dataclasses import dataclass

import jax

from icar_jax.config import ConfigError, unknown
from icar_jax.errors import IcarError

EXAMPLES = "v5e:16x16, v5p:4x4x4, v4:2x2x2, v6e:8x8"
PROCESS_FLAGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu would ask the machine's metadata service, which only a TPU host has
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # read at load time only; silences a complaint about the missing host
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may be made at once: no device is opened
}


@dataclass(frozen=True)
class Chip:
    """One accelerator chip. FLOP/s and bytes/s per chip; memory in GiB."""

    name: str
    memory_gib: float
    usable_gib: float
    bf16_flops: float
    hbm_bytes_s: float
    link_bytes_s: float  # sent to other chips: ICI of a TPU slice, NVLink within a node of GPUs
    clock_hz: float = 0.0  # of the matrix units, for the TPU compiler's cycle estimates; 0 where there are none
    dimensions: int = 0  # of a TPU slice's topology; 0 for a GPU
    largest: int = 0  # chips in the largest slice, where the compiler itself would accept more

    @property
    def usable_bytes(self) -> float:
        return self.usable_gib * 2**30


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 32, 30.75, 275e12, 1228e9, 300e9, 1.05e9, 3),
        Chip("v5e", 16, 15.75, 197e12, 819e9, 200e9, 1.5e9, 2, 256),
        Chip("v5p", 95.74, 95.73, 459e12, 2765e9, 600e9, 1.75e9, 3),
        Chip("v6e", 32, 31.24, 918e12, 1640e9, 400e9, 1.75e9, 2, 256),
        Chip("h100", 79.6, 78.0, 989e12, 3350e9, 450e9),
        Chip("h200", 140.4, 139.0, 989e12, 4800e9, 450e9),
    )
}
DEFAULT_CHIP = "v5e"


class PlanError(IcarError, RuntimeError):
    """A plan cannot be made on this machine, or the compiled program cannot be read."""


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """'v5e:16x16' -> the chip and the slice's shape; 'v5e' alone -> the chip and (). Raises ConfigError with examples."""
    name, colon, grid = text.strip().lower().partition(":")
    if name not in CHIPS:
        error = unknown("--topology", name, CHIPS)
        raise ConfigError(f"{error}; with the slice's shape: {EXAMPLES}")
    chip = CHIPS[name]
    if not colon:
        return chip, ()
    if not chip.dimensions:
        raise ConfigError(f"--topology={text}: {name} is a GPU and has no slice; write --topology={name} --devices 8")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid) or grid.count("x") != chip.dimensions - 1:
        raise ConfigError(
            f"--topology={text}: a slice of {name} has {chip.dimensions} dimensions, such as {EXAMPLES}; found {grid!r}"
        )
    shape = tuple(int(n) for n in grid.split("x"))
    if chip.largest and math.prod(shape) > chip.largest:
        raise ConfigError(f"--topology={text} has {math.prod(shape)} chips; the largest slice of {name} has {chip.largest}")
    return chip, shape


def tpu_devices(chip: Chip, shape: tuple[int, ...]) -> list:
    """The devices of a TPU slice that is not there, for the TPU compiler alone.

    Raises PlanError where libtpu is not installed, ConfigError where the compiler knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"planning for {chip.name} needs the TPU compiler, which comes without a TPU: pip install libtpu "
            "(x86-64 Linux); or compare with CPU devices: --devices 8"
        )
    for name, value in PROCESS_FLAGS.items():
        os.environ.setdefault(name, value)
    _stay_on_cpu()
    from jax.experimental import topologies

    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}  # else each of its two cores is a device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology={name} is no slice that the TPU compiler knows ({error}); examples: {EXAMPLES}")
    return list(found.devices)


def cpu_devices(count: int) -> list:
    """`count` CPU devices of one process, made if jax has not started yet. Raises PlanError where it has fewer."""
    if count < 1:
        raise ConfigError(f"--devices={count} must be at least 1")
    _stay_on_cpu()
    try:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax has started: what is there has to do
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise PlanError(
            f"--devices={count}, but jax already runs with {len(devices)} CPU devices; start a new process, or set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _stay_on_cpu() -> None:
    """Planning opens no accelerator, even where there is one: another program may be using it."""
    try:
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass


def target(topology: str, devices: int) -> tuple[Chip, list, str]:
    """The chip, the devices to compile for, and the compiler's name ('TPU' or 'CPU').

    `topology` names a slice ('v5e:16x16'); with `devices` CPU devices stand in for the chips it names ('h100', 'v5e', or
    'v5e:2x4' of as many chips; empty: v5e). Raises ConfigError, PlanError.
    """
    if devices:
        chip, shape = parse_topology(topology or DEFAULT_CHIP)
        if shape and math.prod(shape) != devices:
            raise ConfigError(
                f"--topology={topology} has {math.prod(shape)} chips, but --devices={devices}; "
                f"write --topology={chip.name} --devices {devices}"
            )
        return chip, cpu_devices(devices), "CPU"
    if not topology:
        raise ConfigError(f"--topology names no slice; examples: {EXAMPLES}; or --devices 8 for CPU devices")
    chip, shape = parse_topology(topology)
    if not shape:
        how = f"write --topology={chip.name} --devices 8"
        if chip.dimensions:
            how = f"such as {EXAMPLES}; or for CPU devices in its place, {how}"
        raise ConfigError(f"--topology={topology} has no shape; {how}")
    return chip, tpu_devices(chip, shape), "TPU"

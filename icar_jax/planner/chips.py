"""Specifications of accelerator chips, and abstract devices to compile for without owning them.

Bandwidth and compute are from Cloud TPU documentation and NVIDIA data sheets, per chip, bf16 without sparsity. Link bandwidth
is for one direction, half of the bidirectional figure. Usable memory of a TPU is the limit in the compiler's error message; of
a GPU it is what the driver leaves, of which XLA takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
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
    "TPU_SKIP_MDS_QUERY": "1",  # do not query the metadata service, which only TPU hosts have
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # only read when libtpu loads; avoids a warning about the missing host
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans may run at once, because no device is opened
}


@dataclass(frozen=True)
class Chip:
    """Specification of an accelerator chip: FLOP/s and bytes/s per chip, memory in GiB."""

    name: str
    memory_gib: float
    usable_gib: float
    bf16_flops: float
    hbm_bytes_s: float
    link_bytes_s: float  # to other chips, one direction: ICI of a TPU slice, NVLink within a GPU node
    clock_hz: float = 0.0  # of the matrix units, for the TPU compiler's cycle estimates; 0 for GPUs
    dimensions: int = 0  # dimensions of a TPU slice's topology; 0 for GPUs
    largest: int = 0  # chips in the largest slice, if the compiler would accept larger ones; else 0

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
    """Planning is not possible on this machine, or the compiled program cannot be parsed."""


def parse_topology(text: str) -> tuple[Chip, tuple[int, ...]]:
    """Parses 'v5e:16x16' into (chip, shape of the slice), and 'v5e' into (chip, ()). Raises ConfigError with examples."""
    name, colon, grid = text.strip().lower().partition(":")
    if name not in CHIPS:
        error = unknown("--topology", name, CHIPS)
        raise ConfigError(f"{error}; add the shape of the slice, such as {EXAMPLES}")
    chip = CHIPS[name]
    if not colon:
        return chip, ()
    if not chip.dimensions:
        raise ConfigError(f"--topology={text}: {name} is a GPU and has no slice; write --topology={name} --devices 8")
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", grid) or grid.count("x") != chip.dimensions - 1:
        raise ConfigError(
            f"--topology={text}: a slice of {name} has {chip.dimensions} dimensions, such as {EXAMPLES}; got {grid!r}"
        )
    shape = tuple(int(n) for n in grid.split("x"))
    if chip.largest and math.prod(shape) > chip.largest:
        raise ConfigError(f"--topology={text} has {math.prod(shape)} chips; the largest slice of {name} has {chip.largest}")
    return chip, shape


def tpu_devices(chip: Chip, shape: tuple[int, ...]) -> list:
    """Returns abstract devices of a TPU slice, for compilation only.

    Raises PlanError if libtpu is not installed, ConfigError if the compiler does not support the slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"planning for {chip.name} needs the TPU compiler, which does not need a TPU: pip install libtpu "
            "(x86-64 Linux); or plan with CPU devices: --devices 8"
        )
    for name, value in PROCESS_FLAGS.items():
        os.environ.setdefault(name, value)
    _stay_on_cpu()
    from jax.experimental import topologies

    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    options = {"chip_config_name": "megacore"} if chip.name == "v4" else {}  # without it each of two cores is a device
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"--topology={name} is not supported by the TPU compiler ({error}); examples: {EXAMPLES}")
    return list(found.devices)


def cpu_devices(count: int) -> list:
    """Returns `count` CPU devices of this process, created if JAX is not initialised yet.

    Raises ConfigError for a count below 1, PlanError if JAX is already initialised with fewer.
    """
    if count < 1:
        raise ConfigError(f"--devices={count} must be at least 1")
    _stay_on_cpu()
    try:
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax is initialised: use the existing devices
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise PlanError(
            f"--devices={count}, but jax already runs with {len(devices)} CPU devices; start a new process, or set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


def _stay_on_cpu() -> None:
    """Makes JAX use the CPU only, because another program may be using an accelerator of this machine."""
    try:
        jax.config.update("jax_platforms", "cpu")
    except RuntimeError:
        pass


def target(topology: str, devices: int) -> tuple[Chip, list, str]:
    """Returns (chip, devices to compile for, name of the compiler: 'TPU' or 'CPU').

    With `devices` 0, `topology` must be a TPU slice ('v5e:16x16'). Otherwise `devices` CPU devices represent the chips of
    `topology` ('h100', 'v5e', or 'v5e:2x4' with as many chips; empty is v5e). Raises ConfigError, PlanError.
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
        raise ConfigError(f"--topology needs a slice, such as {EXAMPLES}; or use --devices 8 for CPU devices")
    chip, shape = parse_topology(topology)
    if not shape:
        how = f"write --topology={chip.name} --devices 8"
        if chip.dimensions:
            how = f"such as {EXAMPLES}; or with CPU devices, {how}"
        raise ConfigError(f"--topology={topology} has no shape; {how}")
    return chip, tpu_devices(chip, shape), "TPU"

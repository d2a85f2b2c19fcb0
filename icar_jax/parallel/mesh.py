"""The device mesh with axes data, fsdp and tensor; a single device is a mesh of size 1."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from icar_jax.config import ConfigError, MeshConfig

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """Builds the mesh of `config` over `devices` (default: all); an axis of -1 takes the devices left by the other axes.

    Raises ConfigError if the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in AXES}
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"config.mesh.{free[1]}=-1: only one axis may be -1, and config.mesh.{free[0]} already is")
    bad = [axis for axis, size in sizes.items() if size != -1 and size < 1]
    if bad:
        raise ConfigError(f"config.mesh.{bad[0]}={sizes[bad[0]]} must be a positive number of devices, or -1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            raise ConfigError(
                f"config.mesh={sizes} does not divide {len(devices)} devices: the fixed axes multiply to {fixed}; "
                f"choose sizes whose product divides {len(devices)}"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ConfigError(
            f"config.mesh={sizes} needs {fixed} devices, found {len(devices)}; set one axis to -1 to use the rest"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: the leading axis is split over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds in full."""
    return NamedSharding(mesh, PartitionSpec())

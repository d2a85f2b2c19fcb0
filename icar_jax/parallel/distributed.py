"""Several processes: how they start, agree, and end together.

Every process runs the same program on its own devices. A collective that one of them does not reach keeps the others waiting,
so what can fail in one process alone (reading, writing) goes inside `together`, which tells all of them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from icar_jax.config import ConfigError
from icar_jax.errors import IcarError

_T = TypeVar("_T")
FLAGS = "--coordinator=HOST:PORT --processes=N --process=I"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # set by srun only
_MPI_SIZE, _MPI_RANK, _MPI_ADDRESS = "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_MCA_orte_hnp_uri"


class StartError(IcarError, RuntimeError):
    """The processes of a run did not find each other."""


class PeerError(IcarError, RuntimeError):
    """Another process of the run failed, was lost, or was started differently; the reason is in its own output."""


def start(coordinator: str = "", processes: int = 0, process: int = -1, *, timeout_s: int = 300) -> None:
    """Joins the processes of a run; call it before anything touches a device.

    With all three arguments: process `process` of `processes`, which meet at `coordinator` (host:port of process 0).
    With none: a TPU pod, `srun` and Open MPI's `mpirun` are found by themselves; anywhere else this is a run of one process.
    Where the launcher numbers the processes but tells no address, `coordinator` alone is enough.

    Raises ConfigError for flags that are incomplete or contradict each other, StartError where the processes cannot be
    joined. A peer that does not come within `timeout_s` ends the program with a message.
    """
    found = cluster(os.environ)
    given = {"--coordinator": coordinator != "", "--processes": processes != 0, "--process": process != -1}
    if not any(given.values()):
        if found is None:
            return
        if found == "Open MPI" and _MPI_ADDRESS not in os.environ:
            raise ConfigError(
                f"started by Open MPI as process {os.environ[_MPI_RANK]} of {os.environ[_MPI_SIZE]}, but this version of it "
                "announces no address; pass --coordinator=HOST:PORT of the first process"
            )
        return _join({}, f"the processes of {found}", timeout_s)
    if coordinator and not (given["--processes"] or given["--process"]) and found in ("Slurm", "Open MPI"):
        size, rank = (_SLURM[2], _SLURM[3]) if found == "Slurm" else (_MPI_SIZE, _MPI_RANK)
        processes, process = int(os.environ[size]), int(os.environ[rank])
    elif not all(given.values()):
        missing = ", ".join(name for name, there in given.items() if not there)
        raise ConfigError(f"{missing} missing: a run of several processes takes {FLAGS}; a run of one takes none of them")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator={coordinator} must be host:port of process 0, for example node0:8476")
    if processes < 1:
        raise ConfigError(f"--processes={processes} must be the number of processes, from 1")
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process} must lie in 0 to {processes - 1}, for --processes={processes}")
    if processes == 1:
        return
    arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    _join(arguments, f"{processes} processes at {coordinator}", timeout_s)


def cluster(environ: Mapping[str, str]) -> str | None:
    """The launcher that started several processes: 'Slurm', 'Open MPI' or 'TPU'; None for a plain start.

    An allocation of Slurm without `srun` is a plain start. A TPU machine counts even if it is alone: only its metadata says.
    """
    if all(name in environ for name in _SLURM) and int(environ["SLURM_NTASKS"]) > 1:
        return "Slurm"
    if int(environ.get(_MPI_SIZE, "1")) > 1:
        return "Open MPI"
    platforms = environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms.split(","):
        return None
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "TPU"
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if chips and importlib.util.find_spec("libtpu") and "TPU_SKIP_MDS_QUERY" not in environ:
        return "TPU"
    return None


def require_single(program: str) -> None:
    """Raises ConfigError where a launcher started several processes of a program that is made for one."""
    found = cluster(os.environ)
    if found in ("Slurm", "Open MPI"):
        raise ConfigError(f"{program} runs in one process, but {found} started several; start it once, without the launcher")


def _join(arguments: dict[str, Any], who: str, timeout_s: int) -> None:
    if timeout_s < 1:
        raise ConfigError(f"--start_timeout_s={timeout_s} must be at least 1 second")

    def give_up() -> None:
        _write_error(
            f"error: after {timeout_s} s not all of {who} were there; start every one of them (--process=0 to N-1), "
            "and see that the address of process 0 can be reached from each"
        )
        os._exit(2)

    # The runtime's own timeout ends in abort() with a stack trace of C++, so ours comes first.
    timer = threading.Timer(timeout_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=timeout_s + 60)
    except (RuntimeError, ValueError) as error:
        raise StartError(f"cannot join {who}: {error}; check {FLAGS}, or the launcher") from error
    finally:
        timer.cancel()
    avoid_cached_collectives()
    # CPUs connect at the first collective and wait 30 s for that, but for ever in later ones: here all come at the same time,
    # while later one of them may open data or train a tokenizer for long.
    multihost_utils.process_allgather(np.int32(0))


def avoid_cached_collectives() -> None:
    """Switches the compilation cache off where collectives run on CPUs; call it before the first program is compiled.

    A program of the CPU that was read from the cache has lost the order of its collectives (jaxlib 0.10.2): devices wait for
    each other for ever, or processes abort with a collective mismatch.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)


def is_main() -> bool:
    """Whether this process writes: configuration, metrics, progress, models. One process of a run does."""
    return jax.process_index() == 0


# How the processes agree. Every function below is a collective: all processes call it, in the same order.

_ending_together = False


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """A part of the run that fails everywhere if it fails in one process: the others raise PeerError."""
    if jax.process_count() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = np.flatnonzero(multihost_utils.process_allgather(np.int32(failure is not None)))
    if len(failed):
        end_together()
    if failure is not None:
        raise failure
    if len(failed):
        raise PeerError(f"process {failed[0]} of {jax.process_count()} failed while {what}; the reason is in its output")


def main_first(what: str, make: Callable[[], _T]) -> _T:
    """`make()` in process 0 and then in the others, which find what it left on disk; fails everywhere if it fails in one."""
    made = []
    for turn in (True, False):
        with together(what):
            if is_main() == turn:
                made.append(make())
    return made[0]


def end_together() -> None:
    """Notes that every process is about to fail at this same point, so that none has to be cut off (see `cut_off`)."""
    global _ending_together
    _ending_together = True


def leave() -> None:
    """Ends the group, all processes at once; what one of them goes on to do alone, however long, keeps no other waiting.

    There are no collectives afterwards. Without it the runtime waits at exit, and gives up after some minutes.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def cut_off() -> Iterator[None]:
    """Around a program: a process that fails alone ends at once.

    The runtime would otherwise wait at exit for peers, and they wait in a collective for this process.
    """
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, SystemExit) else 1
        if code in (None, 0) or _ending_together or not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def require_same(what: str, text: str) -> None:
    """Raises PeerError, on every process, where `text` differs between processes."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    everywhere = multihost_utils.process_allgather(digest)
    other = np.flatnonzero((everywhere != everywhere[0]).any(axis=1))
    if len(other):
        end_together()
        raise PeerError(f"process {other[0]} has another {what} than process 0; start all processes with the same")


def from_main(value: int) -> int:
    """The value that process 0 gives, on every process; non-negative, below 2^31."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def greatest(values: np.ndarray) -> np.ndarray:
    """Elementwise maximum over the processes of integers of any shape."""
    values = np.asarray(values, np.int32)
    return values if jax.process_count() == 1 else multihost_utils.process_allgather(values).max(axis=0)


def total(values: np.ndarray) -> np.ndarray:
    """Elementwise sum over the processes of integers of any shape, each below 2^31."""
    values = np.asarray(values, np.int32)
    return values if jax.process_count() == 1 else multihost_utils.process_allgather(values).sum(axis=0, dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _flags() -> tuple[NamedSharding, Any]:
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    one_each = NamedSharding(mesh, PartitionSpec("all"))
    return one_each, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


def greatest_later(value: int, after: jax.Array) -> jax.Array:
    """Maximum over the processes, int32 []; comes after what computes `after`, and is read when the devices have come to it."""
    # CPUs run programs that do not depend on each other in any order, another one in each process, and their collectives then
    # meet the wrong partner; accelerators keep the order of the program.
    cpu = jax.default_backend() == "cpu"
    if cpu:
        jax.block_until_ready(after)
    sharding, largest = _flags()
    result = largest(jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: np.array([value], np.int32)))
    return jax.block_until_ready(result) if cpu else result


def to_main(leaf: jax.Array) -> np.ndarray | None:
    """The whole of a sharded array as numpy on process 0, None elsewhere."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf) if is_main() else None
    whole = _gather(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
    jax.block_until_ready(whole)  # one leaf at a time: the next is not gathered before this one can be dropped
    return np.asarray(whole.addressable_data(0)) if is_main() else None


@functools.lru_cache(maxsize=8)
def _gather(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def batch_part(sharding: Sharding, rows: int) -> tuple[int, int]:
    """(index, count): of `count` equal parts of a batch of `rows` rows, sharded by `sharding`, this process reads `index`.

    Processes whose devices hold the same rows (a tensor axis across processes) read the same part. Raises ConfigError where
    the mesh gives processes parts that overlap or differ in size.
    """
    parts: dict[int, set[tuple[int, int]]] = {}
    for device, (index, *_) in sharding.devices_indices_map((rows,)).items():
        start, stop, _ = index.indices(rows)
        parts.setdefault(device.process_index, set()).add((start, stop))
    distinct = sorted({tuple(sorted(part)) for part in parts.values()})
    sizes = {sum(stop - start for start, stop in part) for part in distinct}
    if len(sizes) > 1 or sizes.pop() * len(distinct) != rows:
        raise ConfigError(
            "config.mesh cuts the batch so that processes share only some of their rows; choose data x fsdp as a multiple or "
            f"a divisor of the {jax.process_count()} processes"
        )
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def _write_error(text: str) -> None:
    os.write(2, (text + "\n").encode())

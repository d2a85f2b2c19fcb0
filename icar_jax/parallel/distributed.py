"""Multi-process runs: start-up, agreement between processes, and shutdown.

Every process runs the same program on its own devices. If one process does not reach a collective, the others wait for it
forever. Code that can fail in one process alone (reading, writing) therefore runs inside `together`, which tells all of them.
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
from typing import Any, TypeVar, cast

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
    """The processes of a run could not connect to each other."""


class PeerError(IcarError, RuntimeError):
    """Another process of the run failed, disappeared, or was started differently; its own output has the reason."""


def start(coordinator: str = "", processes: int = 0, process: int = -1, *, timeout_s: int = 300) -> None:
    """Joins the processes of a run (jax.distributed.initialize); call it before anything touches a device.

    With all three arguments, this is process `process` of `processes`, which connect to `coordinator` (host:port of process 0).
    With none, a TPU pod, `srun` and Open MPI's `mpirun` are detected automatically; otherwise the run has one process.
    If the launcher numbers the processes but gives no address, `coordinator` alone is enough.

    Raises ConfigError for incomplete or contradictory flags, and StartError if the processes cannot be joined. The program
    exits with a message if a peer does not connect within `timeout_s` seconds.
    """
    found = cluster(os.environ)
    given = {"--coordinator": coordinator != "", "--processes": processes != 0, "--process": process != -1}
    if not any(given.values()):
        if found is None:
            return
        if found == "Open MPI" and _MPI_ADDRESS not in os.environ:
            raise ConfigError(
                f"Open MPI started this as process {os.environ[_MPI_RANK]} of {os.environ[_MPI_SIZE]}, but this version "
                "provides no coordinator address; pass --coordinator=HOST:PORT of the first process"
            )
        return _join({}, f"the processes of {found}", timeout_s)
    if coordinator and not (given["--processes"] or given["--process"]) and found in ("Slurm", "Open MPI"):
        size, rank = (_SLURM[2], _SLURM[3]) if found == "Slurm" else (_MPI_SIZE, _MPI_RANK)
        processes, process = int(os.environ[size]), int(os.environ[rank])
    elif not all(given.values()):
        missing = ", ".join(name for name, there in given.items() if not there)
        raise ConfigError(f"{missing} missing: a multi-process run needs {FLAGS}; a single-process run takes none of them")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--coordinator={coordinator} must be host:port of process 0, for example node0:8476")
    if processes < 1:
        raise ConfigError(f"--processes={processes} must be at least 1")
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process} must be between 0 and {processes - 1} for --processes={processes}")
    if processes == 1:
        return
    arguments = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process}
    _join(arguments, f"{processes} processes at {coordinator}", timeout_s)


def cluster(environ: Mapping[str, str]) -> str | None:
    """The launcher that started several processes: 'Slurm', 'Open MPI' or 'TPU'; None for a single process.

    A Slurm allocation without `srun` is a single process. Every TPU machine returns 'TPU', since only its metadata tells
    whether it belongs to a pod.
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
    """Raises ConfigError if a launcher started several processes of a single-process program."""
    found = cluster(os.environ)
    if found in ("Slurm", "Open MPI"):
        raise ConfigError(f"{program} runs in one process, but {found} started several; start it once, without the launcher")


def _join(arguments: dict[str, Any], who: str, timeout_s: int) -> None:
    if timeout_s < 1:
        raise ConfigError(f"--start_timeout_s={timeout_s} must be at least 1 second")

    def give_up() -> None:
        _write_error(
            f"error: not all of {who} connected within {timeout_s} s; start every one of them (--process=0 to N-1) "
            "and check that each can reach the address of process 0"
        )
        os._exit(2)

    # The runtime's own timeout calls abort() with a C++ stack trace, so ours fires first.
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
    # CPU processes connect at the first collective, with a timeout of 30 s. All processes are in step here; later, one may
    # spend longer than that on opening data or training a tokenizer.
    multihost_utils.process_allgather(np.int32(0))


def avoid_cached_collectives() -> None:
    """Disables the compilation cache if collectives run on CPUs; call it before the first program is compiled.

    CPU programs read from the cache lose the order of their collectives (jaxlib 0.10.2): devices deadlock, or processes
    abort with a collective mismatch.
    """
    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)


def is_main() -> bool:
    """Whether this is process 0, the only one that writes configuration, metrics, progress and models."""
    return jax.process_index() == 0


# Every function below is a collective: all processes must call it, in the same order.

_ending_together = False


@contextlib.contextmanager
def together(what: str) -> Iterator[None]:
    """Context in which an exception in one process fails all of them: the other processes raise PeerError."""
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
        raise PeerError(f"process {failed[0]} of {jax.process_count()} failed while {what}; see its output for the reason")


def main_first(what: str, make: Callable[[], _T]) -> _T:
    """Runs `make()` in process 0, then in the others, which can read the files it wrote; an error in one fails all."""
    made = []
    for turn in (True, False):
        with together(what):
            if is_main() == turn:
                made.append(make())
    return made[0]


def end_together() -> None:
    """Records that all processes are about to fail at the same point, so `exit_on_error` need not kill any of them."""
    global _ending_together
    _ending_together = True


def leave() -> None:
    """Shuts the process group down in all processes, so that one can continue alone while the others exit.

    No collectives may follow. Without this call the runtime waits for peers at exit and times out after some minutes.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Context around a whole program: a process that fails alone exits immediately.

    Otherwise the runtime would wait for its peers at exit, while they wait for this process in a collective.
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
    """Raises PeerError on every process if `text` differs between processes."""
    if jax.process_count() == 1:
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32)
    everywhere = multihost_utils.process_allgather(digest)
    other = np.flatnonzero((everywhere != everywhere[0]).any(axis=1))
    if len(other):
        end_together()
        raise PeerError(f"process {other[0]} has a different {what} than process 0; start all processes with the same one")


def from_main(value: int) -> int:
    """Broadcasts the value of process 0 to every process; it must be non-negative and below 2^31."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def greatest(values: np.ndarray) -> np.ndarray:
    """Elementwise maximum over the processes: int32, any shape."""
    values = np.asarray(values, np.int32)
    return values if jax.process_count() == 1 else multihost_utils.process_allgather(values).max(axis=0)


def total(values: np.ndarray) -> np.ndarray:
    """Elementwise sum over the processes: integers of any shape, each below 2^31; int64 with several processes."""
    values = np.asarray(values, np.int32)
    return values if jax.process_count() == 1 else multihost_utils.process_allgather(values).sum(axis=0, dtype=np.int64)


@functools.lru_cache(maxsize=1)
def _flags() -> tuple[NamedSharding, Any]:
    devices = jax.devices()
    mesh = Mesh(np.array(devices), ("all",), axis_types=(AxisType.Auto,))
    one_each = NamedSharding(mesh, PartitionSpec("all"))
    return one_each, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))


def greatest_later(value: int, after: jax.Array) -> jax.Array:
    """Maximum over the processes as an int32 scalar on device; dispatched after the computation of `after`, not waited for."""
    # CPUs may run independent programs in a different order in each process, which mismatches their collectives.
    # Accelerators keep the program order.
    cpu = jax.default_backend() == "cpu"
    if cpu:
        jax.block_until_ready(after)
    sharding, largest = _flags()
    result = largest(jax.make_array_from_callback((jax.device_count(),), sharding, lambda _: np.array([value], np.int32)))
    return jax.block_until_ready(result) if cpu else result


def to_main(leaf: jax.Array) -> np.ndarray | None:
    """Gathers a sharded array: the full numpy array on process 0, None on the others."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf) if is_main() else None
    whole = _gather(NamedSharding(cast(NamedSharding, leaf.sharding).mesh, PartitionSpec()))(leaf)
    jax.block_until_ready(whole)  # one leaf at a time, so that this one can be freed before the next is gathered
    return np.asarray(whole.addressable_data(0)) if is_main() else None


@functools.lru_cache(maxsize=8)
def _gather(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def batch_part(sharding: Sharding, rows: int) -> tuple[int, int]:
    """(index, count): this process reads part `index` of `count` equal parts of a batch of `rows` rows under `sharding`.

    Processes whose devices hold the same rows (a tensor axis across processes) read the same part. Raises ConfigError if the
    mesh gives processes parts that partially overlap or differ in size.
    """
    parts: dict[int, set[tuple[int, int]]] = {}
    for device, (index, *_) in sharding.devices_indices_map((rows,)).items():
        start, stop, _ = index.indices(rows)
        parts.setdefault(cast(Any, device).process_index, set()).add((start, stop))
    distinct = sorted({tuple(sorted(part)) for part in parts.values()})
    sizes = {sum(stop - start for start, stop in part) for part in distinct}
    if len(sizes) > 1 or sizes.pop() * len(distinct) != rows:
        raise ConfigError(
            "config.mesh shards the batch so that the rows of two processes partially overlap; choose data x fsdp as a "
            f"multiple or a divisor of the {jax.process_count()} processes"
        )
    return distinct.index(tuple(sorted(parts[jax.process_index()]))), len(distinct)


def _write_error(text: str) -> None:
    os.write(2, (text + "\n").encode())

"""Jitted forward passes at a few static batch shapes, so that a ragged last batch does not recompile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from icar_jax.errors import ConfigError
from icar_jax.models.xla_options import jit_for_host
from icar_jax.parallel.mesh import batch_sharding, batch_shards, replicated

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def bucket_sizes(batch_size: int, shards: int = 1) -> tuple[int, ...]:
    """Batch sizes to compile: 1, an eighth of a full batch, and a full batch, all rounded to multiples of `shards`.

    Raises ConfigError if `batch_size` is not a multiple of `shards`.
    """
    if batch_size % shards:
        raise ConfigError(f"batch_size={batch_size} must be a multiple of the mesh's {shards} batch shards")
    return tuple(sorted({shards, max(1, batch_size // shards // 8) * shards, batch_size}))


@dataclass(frozen=True)
class Placement:
    """Array placement: the default device, or a mesh with parameters replicated and batches sharded over its batch axes.

    All devices of the mesh must belong to this process.
    """

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """Number of shards of a batch."""
        return 1 if self.mesh is None else batch_shards(self.mesh)

    def params(self, tree: Any) -> Any:
        """The parameters, replicated on every device."""
        return jax.device_put(tree) if self.mesh is None else jax.device_put(tree, replicated(self.mesh))

    @property
    def rows(self) -> NamedSharding | None:
        """Sharding of a batch along its first axis; None on the default device."""
        return None if self.mesh is None else batch_sharding(self.mesh)

    def batch(self, rows: Any) -> Any:
        """The batch [n, ...] sharded over the mesh, n a multiple of `shards`; without a mesh the input, which jit transfers."""
        return rows if self.mesh is None else jax.device_put(rows, self.rows)


def split_batch(n: int, buckets: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Splits n rows into (start, rows, bucket) pieces: full batches first, then the rest with little padding.

    The rest is padded up to the next bucket if at most half of that bucket is padding; otherwise it is split again.
    """
    pieces, start = [], 0
    while start < n:
        left = n - start
        up = min((b for b in buckets if b >= left), default=None)
        down = max((b for b in buckets if b <= left), default=None)
        bucket = up if up is not None and (down is None or 2 * left >= up) else down
        rows = min(left, bucket)
        pieces.append((start, rows, bucket))
        start += rows
    return pieces


def padded_rows(n: int, buckets: tuple[int, ...]) -> int:
    """Number of padding rows when n rows are split by `split_batch`."""
    return sum(bucket - rows for _, rows, bucket in split_batch(n, buckets))


@dataclass
class PendingBatch:
    """A batch dispatched to the device as (array, number of valid rows) parts."""

    parts: list[tuple[jax.Array, int]]

    def result(self) -> np.ndarray:
        """Waits and returns float32 [n, ...], rows in the order they were submitted."""
        return np.concatenate([np.asarray(jax.device_get(part), np.float32)[:rows] for part, rows in self.parts])


@dataclass
class Forward:
    """`fn(params, rows)` jitted at each bucket size, for rows [n, ...] of any n >= 1.

    `params` must already be placed by `placement.params`.
    """

    fn: Callable[[Any, jax.Array], jax.Array]
    params: Any
    buckets: tuple[int, ...]
    placement: Placement = Placement()
    _jitted: Callable = field(init=False, repr=False)

    def __post_init__(self):
        self._jitted = jit_for_host(self.fn)

    def submit(self, rows: np.ndarray) -> PendingBatch:
        """Dispatches the computation and returns without waiting for it."""
        parts = []
        for start, n, bucket in split_batch(len(rows), self.buckets):
            piece = rows[start : start + n]
            if n < bucket:
                piece = np.concatenate([piece, np.zeros((bucket - n, *piece.shape[1:]), piece.dtype)])
            parts.append((self._run(piece), n))
        return PendingBatch(parts)

    def _run(self, piece: np.ndarray) -> jax.Array:
        with jax.transfer_guard("allow"):  # the transfer of the batch is intended
            return self._jitted(self.params, self.placement.batch(piece))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.submit(rows).result()

    def warm_up(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Compiles every bucket for rows of one `shape` (without the batch axis) and dtype."""
        for bucket in self.buckets:
            jax.block_until_ready(self._run(np.zeros((bucket, *shape), dtype)))


class _CompileCount:
    """Counts backend compilations through one jax.monitoring listener per process."""

    def __init__(self):
        self.total = 0
        self._listening = False

    def listen(self) -> None:
        if not self._listening:
            jax.monitoring.register_event_duration_secs_listener(self._on_event)
            self._listening = True

    def _on_event(self, event: str, duration_s: float, **_: Any) -> None:
        self.total += event == COMPILE_EVENT


_COUNT = _CompileCount()


@contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the number of programs XLA has compiled since the block was entered."""
    _COUNT.listen()
    before = _COUNT.total
    yield lambda: _COUNT.total - before

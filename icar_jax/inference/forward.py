"""Jitted forwards on a few static batch shapes, so that ragged inputs never compile anew."""

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
    """Batch shapes that are compiled: 1, an eighth of a full batch, and a full batch; all are multiples of `shards`.

    Raises ConfigError for a batch size that is none.
    """
    if batch_size % shards:
        raise ConfigError(f"batch_size={batch_size} must be a multiple of the {shards} parts that the mesh cuts a batch into")
    return tuple(sorted({shards, max(1, batch_size // shards // 8) * shards, batch_size}))


@dataclass(frozen=True)
class Placement:
    """Where arrays lie: on the default device, or on a mesh, parameters whole everywhere and batches cut over its batch axes.

    All devices of the mesh belong to this process.
    """

    mesh: Mesh | None = None

    @property
    def shards(self) -> int:
        """Parts that a batch is cut into."""
        return 1 if self.mesh is None else batch_shards(self.mesh)

    def params(self, tree: Any) -> Any:
        """Parameters, whole on every device."""
        return jax.device_put(tree) if self.mesh is None else jax.device_put(tree, replicated(self.mesh))

    @property
    def rows(self) -> NamedSharding | None:
        """Sharding of a batch; None on the default device."""
        return None if self.mesh is None else batch_sharding(self.mesh)

    def batch(self, rows: Any) -> Any:
        """A batch [n, ...], n a multiple of `shards`. Without a mesh the array itself: a jitted call takes it over faster."""
        return rows if self.mesh is None else jax.device_put(rows, self.rows)


def cut(n: int, buckets: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """n rows as (start, rows, bucket): full batches first, then what is left in the fewest rows of padding.

    A rest is padded up to the next bucket where that wastes less than half of it; else it is cut again.
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
    """Rows of padding that n rows are computed with."""
    return sum(bucket - rows for _, rows, bucket in cut(n, buckets))


@dataclass
class Pending:
    """Work handed to the device; `result` waits for it."""

    parts: list[tuple[jax.Array, int]]

    def result(self) -> np.ndarray:
        """float32 [n, ...], rows in the order they were submitted."""
        return np.concatenate([np.asarray(jax.device_get(part), np.float32)[:rows] for part, rows in self.parts])


@dataclass
class Forward:
    """`fn(params, rows)` jitted for each bucket size; rows is an array [n, ...] of any length n >= 1.

    `params` lie where `placement.params` puts them.
    """

    fn: Callable[[Any, jax.Array], jax.Array]
    params: Any
    buckets: tuple[int, ...]
    placement: Placement = Placement()
    _jitted: Callable = field(init=False, repr=False)

    def __post_init__(self):
        self._jitted = jit_for_host(self.fn)

    def submit(self, rows: np.ndarray) -> Pending:
        """Starts the computation and returns at once."""
        parts = []
        for start, n, bucket in cut(len(rows), self.buckets):
            piece = rows[start : start + n]
            if n < bucket:
                piece = np.concatenate([piece, np.zeros((bucket - n, *piece.shape[1:]), piece.dtype)])
            parts.append((self._run(piece), n))
        return Pending(parts)

    def _run(self, piece: np.ndarray) -> jax.Array:
        with jax.transfer_guard("allow"):  # of the batch, which is meant to go to the device
            return self._jitted(self.params, self.placement.batch(piece))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return self.submit(rows).result()

    def warm_up(self, shape: tuple[int, ...], dtype: Any) -> None:
        """Compiles every bucket for rows of `shape`."""
        for bucket in self.buckets:
            jax.block_until_ready(self._run(np.zeros((bucket, *shape), dtype)))


class _CompileCount:
    """Counts finished backend compilations from jax.monitoring; one listener serves the whole program."""

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
    """Yields a function that tells how many programs XLA has compiled since the block was entered."""
    _COUNT.listen()
    before = _COUNT.total
    yield lambda: _COUNT.total - before

"""The vector index of a large store: built, kept up to date, and measured against exact search.

An index sorts the vectors into partitions and keeps a short code of each. A query looks into the nearest partitions, and
reads the true vectors of the best REFINE times as many rows as are wanted, so distances are exact and only the candidates are
approximate. Rows written since are compared exactly, until they are many.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from icar_jax.search import extra
from icar_jax.search.access import StoreError
from icar_jax.search.store import Store
from icar_jax.search.tables import vectors

MIN_ROWS = 100_000  # exact search is fast below
NAME = "vector_idx"
REFINE = 10
PROBES = 32
_STALE = 0.1  # share of rows outside the index from which they are taken in
_GROWN = 4  # an index over so many times fewer rows has too few partitions
_SAMPLE, _ITERATIONS = 64, 20  # rows a partition, and steps, of the k-means that finds the partitions
_QUERIES, _K, _SEED = 50, 10, 0


@dataclass(frozen=True)
class VectorIndexResult:
    """What `maintain` did and measured.

    Attributes:
        action: 'built' or 'extended'. rows: in the table. seconds: of the work. partitions: of the index.
        recall: share of the _K nearest rows by exact search that the index finds, mean over `queries` rows of the store.
        exact_ms, approximate_ms: median wall time of one such query.
    """

    action: str
    rows: int
    seconds: float
    partitions: int
    recall: float
    queries: int
    exact_ms: float
    approximate_ms: float

    def report(self) -> str:
        return (
            f"Vector index {self.action} in {self.seconds:.1f} s over {self.rows:,} images, {self.partitions} partitions: "
            f"recall@{_K} {self.recall:.1%} of exact search ({self.queries} queries), {self.approximate_ms:.1f} ms against "
            f"{self.exact_ms:.1f} ms"
        )


def prepare_query(query: Any, exact: bool = False, filtered: bool = False) -> Any:
    """A vector query of LanceDB with the metric and how hard it looks; `exact` leaves an index aside.

    With a filter (`filtered`) further partitions are read until there are as many rows as wanted: those that satisfy a rare
    one may lie in any.
    """
    query = query.distance_type("cosine")
    if exact:
        return query.bypass_vector_index()
    query = query.nprobes(PROBES).refine_factor(REFINE)
    return query.maximum_nprobes(0) if filtered else query  # 0: no maximum; PROBES stays the minimum


def partitions_for(rows: int) -> int:
    """Partitions of an index: the square root of the rows, so that finding partitions and reading them cost alike."""
    return max(1, round(math.sqrt(rows)))


def index_config(rows: int, embed_dim: int) -> Any:
    """The index that is built: RabitQ, a bit a dimension; scalar quantisation, a byte, where 8 does not divide the width.

    Of those that keep a bit a dimension it is built several times faster than product quantisation, which trains a codebook for
    every 8 dimensions, and finds as much once the true vectors of the candidates are read (docs/search.md).
    """
    kinds = extra("lancedb.index")
    kind = kinds.IvfRq if embed_dim % 8 == 0 else kinds.IvfSq
    return kind(distance_type="cosine", num_partitions=partitions_for(rows), sample_rate=_SAMPLE, max_iterations=_ITERATIONS)


def maintain(store: Store, min_rows: int = MIN_ROWS, progress: bool = True) -> VectorIndexResult | None:
    """Builds the index of a store from `min_rows` images on, extends it where many are new; None where nothing was to do.

    The work is done beside other readers and writers; only its commit can meet theirs, and is then tried again.
    Raises StoreError where LanceDB cannot.
    """
    rows = store.count()
    if rows < min_rows:
        return None
    with store.reading() as images:
        stats = images.index_stats(NAME)
    begun = store.meta.get("vector_index", {}).get("built_rows", 0)
    start = time.perf_counter()
    if stats is None or rows > _GROWN * begun:
        if progress:
            print(f"Building a vector index over {rows:,} images", flush=True)
        how = index_config(rows, store.embed_dim)
        _commit_with_retries(store, lambda: store.images.create_index("vector", config=how, name=NAME, replace=True))
        action, begun = "built", rows
    elif stats.num_unindexed_rows > _STALE * rows:
        _commit_with_retries(store, store.images.optimize)
        action = "extended"
    else:
        return None
    seconds = time.perf_counter() - start
    done = VectorIndexResult(action, rows, seconds, partitions_for(begun), *measure_recall(store))
    store.set_meta(vector_index={"built_rows": begun, **asdict(done)})
    return done


def measure_recall(store: Store, queries: int = _QUERIES, k: int = _K) -> tuple[float, int, float, float]:
    """Recall of approximate against exact search, the number of queries, and median ms of exact and of approximate ones.

    The queries are rows of the store with noise, so that they lie near the images without being one.
    """
    rng = np.random.default_rng(_SEED)
    rows = vectors(store.sample(queries, _SEED, ["vector"])["vector"])
    rows = rows.astype(np.float32) + rng.standard_normal(rows.shape, np.float32) * np.float32(0.5 / math.sqrt(rows.shape[1]))
    found, times = [], {True: [], False: []}
    for row in rows:
        paths = {}
        for exact in (True, False):
            start = time.perf_counter()
            with store.reading() as images:
                query = (
                    prepare_query(images.search(row, vector_column_name="vector"), exact).limit(k).select(["path", "_distance"])
                )
                paths[exact] = set(query.to_arrow()["path"].to_pylist())
            times[exact].append(time.perf_counter() - start)
        found.append(len(paths[True] & paths[False]) / max(1, len(paths[True])))
    return float(np.mean(found)), len(rows), 1000 * float(np.median(times[True])), 1000 * float(np.median(times[False]))


def _commit_with_retries(store: Store, commit: Any, attempts: int = 3) -> None:
    for attempt in range(attempts):
        try:
            store.version()
            commit()
            store.version()
            return
        except (ValueError, RuntimeError, OSError) as error:
            if "conflict" not in str(error).lower() or attempt == attempts - 1:
                raise StoreError(f"the store {store.uri}: its vector index could not be built: {error}") from error

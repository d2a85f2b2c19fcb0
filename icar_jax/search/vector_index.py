"""Vector index (IVF) of a large store: built, updated, and measured against exact search.

An index partitions the vectors and stores a short code of each. A query searches the nearest PROBES partitions by code and
reranks the best REFINE x k rows by their full vectors, so distances are exact and only the candidates are approximate. Rows
written after the index are searched exactly until there are many of them.
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

MIN_ROWS = 100_000  # below this, exact search is fast
NAME = "vector_idx"
REFINE = 10
PROBES = 32
_STALE = 0.1  # the index is extended if a larger fraction of the rows is outside it
_GROWN = 4  # the index is rebuilt if the store has grown by this factor, as it has too few partitions
_SAMPLE, _ITERATIONS = 64, 20  # k-means of the partitions: rows per partition, and iterations
_QUERIES, _K, _SEED = 50, 10, 0


@dataclass(frozen=True)
class VectorIndexResult:
    """The action and measurements of `maintain`.

    Attributes:
        action: 'built' or 'extended'. rows: in the table. seconds: wall time of the action. partitions: of the index.
        recall: fraction of the _K exact nearest neighbours that the index finds, averaged over `queries` queries.
        exact_ms, approximate_ms: median wall time per query.
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
        """Summary text of the action."""
        return (
            f"Vector index {self.action} in {self.seconds:.1f} s over {self.rows:,} images, {self.partitions} partitions: "
            f"recall@{_K} {self.recall:.1%} of exact search ({self.queries} queries), {self.approximate_ms:.1f} ms against "
            f"{self.exact_ms:.1f} ms"
        )


def prepare_query(query: Any, exact: bool = False, filtered: bool = False) -> Any:
    """A LanceDB vector query with the cosine metric and search parameters; `exact` bypasses the index.

    With a filter (`filtered`), more partitions are searched until enough rows are found, since matching rows may be rare.
    """
    query = query.distance_type("cosine")
    if exact:
        return query.bypass_vector_index()
    query = query.nprobes(PROBES).refine_factor(REFINE)
    return query.maximum_nprobes(0) if filtered else query  # 0: no maximum; PROBES remains the minimum


def partitions_for(rows: int) -> int:
    """Number of partitions: the square root of the rows, which balances finding partitions and searching them."""
    return max(1, round(math.sqrt(rows)))


def index_config(rows: int, embed_dim: int) -> Any:
    """The index type: RaBitQ (1 bit per dimension), or scalar quantisation (1 byte) if 8 does not divide the width.

    At the same code size, RaBitQ (Gao and Long 2024) is built several times faster than product quantisation with a codebook
    per 8 dimensions, and has the same recall after reranking (docs/search.md).
    """
    kinds = extra("lancedb.index")
    kind = kinds.IvfRq if embed_dim % 8 == 0 else kinds.IvfSq
    return kind(distance_type="cosine", num_partitions=partitions_for(rows), sample_rate=_SAMPLE, max_iterations=_ITERATIONS)


def maintain(store: Store, min_rows: int = MIN_ROWS, progress: bool = True) -> VectorIndexResult | None:
    """Builds the index of a store with at least `min_rows` images, or extends it by many new rows; None if neither was needed.

    Other processes can read and write meanwhile; a conflicting commit is retried. Raises StoreError if LanceDB fails.
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
    """(recall@k of the index against exact search, number of queries, median ms of exact queries, and of approximate ones).

    Queries are vectors of the store with added noise, so that they are close to images without being equal to one.
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
                raise StoreError(f"store {store.uri}: building its vector index failed: {error}") from error

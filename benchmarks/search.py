"""Benchmarks vector search at scale, and the verdict "nothing here matches" on queries with and without a match.

    python benchmarks/search.py [--quick] [--rows 10000 100000 1000000] [--dims 512 768] [--queries 100] [--exact-queries 20]
        [--kind pq] [--dir DIR] [--json docs/results/search.json]
    python benchmarks/search.py --verdict BUNDLE [--scenes 2500] [--json docs/results/search_verdict.json]

The vectors are unit-norm float16 and clustered like real collections: one centre on the sphere per 100 rows, cluster sizes by
a Zipf law with exponent 1/2, and within a cluster a normal deviation of norm 0.8 before normalisation. Queries are further
draws from the same distribution. Rows have all columns of a store. Other load on the machine adds to every time; p50 and p99
are over all queries.

Verdict: BUNDLE embeds scenes with routing. For each kind of removed content (all images with one of four pairs of colour and
shape; all images with one colour), the same captions are queried against a gallery with their images and against one of the
same size without any. Captions of other subjects are compared with captions whose image is in the gallery.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lancedb.index
import numpy as np
import pyarrow as pa
from tqdm import tqdm

import icar_jax
from icar_jax.data.scenes import Scenes
from icar_jax.search import vector_index
from icar_jax.search.background import OWN_CAPTIONS, TOP, Background, calibrate
from icar_jax.search.opening import create_store
from icar_jax.search.plain import PLAIN
from icar_jax.search.store import Store
from icar_jax.search.tables import image_schema, now, vector_column

BATCH = 20_000  # rows per write
KINDS = {"rq": "IvfRq", "pq": "IvfPq", "sq": "IvfSq", "hnsw": "HnswSq"}
OTHER_SUBJECTS = (
    "two dogs on a beach", "a red car in the street", "a tax form", "a man riding a horse", "people at a table",
    "a cat on the stairs", "snow on the mountains", "a bowl of rice", "a child with a balloon", "a newspaper",
    "a bridge at night", "tulips in a jug", "a tram in the city", "a ship in the harbour", "a tennis match",
    "a birthday party", "a keyboard", "an owl in the dark", "a choir singing", "a plate of sausages", "a lighthouse",
    "a woman reading a letter", "a scooter by a wall", "a globe", "an old factory", "goats on a rock", "an airport at dawn",
    "a path through the wheat", "a canal with houses", "a circuit board",
)  # fmt: skip


class Clusters:
    """Draws clustered unit vectors [n, dim]."""

    def __init__(self, rows: int, dim: int, seed: int = 0):
        self._rng = np.random.default_rng(seed)
        centres = self._rng.standard_normal((max(10, rows // 100), dim), np.float32)
        self._centres = centres / np.linalg.norm(centres, axis=1, keepdims=True)
        weights = np.arange(1, len(centres) + 1) ** -0.5
        self._shares = weights / weights.sum()

    def draw(self, n: int) -> np.ndarray:
        dim = self._centres.shape[1]
        x = self._centres[self._rng.choice(len(self._centres), n, p=self._shares)]
        x = x + 0.8 / dim**0.5 * self._rng.standard_normal((n, dim), np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)


def batches(clusters: Clusters, rows: int, dim: int) -> Iterator[pa.Table]:
    """Yields all rows of a store in batches."""
    for start in range(0, rows, BATCH):
        n = min(BATCH, rows - start)
        yield pa.table(
            {
                "path": [f"/photographs/of/somebody/{start + i:09}.jpg" for i in range(n)],
                "sha256": [f"{start + i:064x}" for i in range(n)], "size": [200_000] * n, "mtime_ns": [start] * n,
                "caption": [None] * n, "complexity": np.random.default_rng(start).random(n, np.float32),
                "exit": [13] * n, "milliseconds": [10.0] * n, "embedded_at": [now()] * n,
                "vector": vector_column(clusters.draw(n)),
            },
            image_schema(dim),
        )  # fmt: skip


def megabytes(folder: str, below: str = "") -> float:
    files = (Path(at) / name for at, _, names in os.walk(Path(folder) / below) for name in names)
    return sum(file.stat().st_size for file in files) / 1e6


def timed(store: Store, queries: np.ndarray, exact: bool) -> tuple[list[set[str]], dict[str, float]]:
    """Returns the paths of each query's 10 nearest rows, and percentiles of wall time in ms; one warm-up query is not timed."""
    found, times = [], []
    for i, vector in enumerate(tqdm([queries[0], *queries], "exact" if exact else "approximate", unit="query", leave=False)):
        start = time.perf_counter()
        query = vector_index.prepare_query(store.images.search(vector, vector_column_name="vector"), exact).limit(10)
        paths = query.select(["path", "_distance"]).to_arrow()["path"].to_pylist()
        if i:
            times.append(1000 * (time.perf_counter() - start))
            found.append(set(paths))
    return found, {f"p{p}": float(np.percentile(times, p)) for p in (50, 99)}


def benchmark_store(
    rows: int, dim: int, queries: int, exact_queries: int, folder: str, kind: str | None = None
) -> dict[str, Any]:
    """Writes, indexes and searches one store; returns a record with sizes in MB and times in s (queries in ms)."""
    clusters = Clusters(rows, dim)
    store = create_store(folder, {"clip": "0" * 64}, dim, (13, 24), "none")
    writing = 0.0
    for batch in tqdm(batches(clusters, rows, dim), f"{rows:,} x {dim}", total=-(-rows // BATCH), unit="write", leave=False):
        start = time.perf_counter()
        store.images.add(batch)
        writing += time.perf_counter() - start
    drawn = clusters.draw(queries)
    plain = megabytes(folder, "images.lance")
    truth, exact_ms = timed(store, drawn[:exact_queries], exact=True)
    start = time.perf_counter()
    how = vector_index.index_config(rows, dim)
    if kind is not None:
        same = {name: getattr(how, name) for name in ("distance_type", "num_partitions", "sample_rate", "max_iterations")}
        how = getattr(lancedb.index, KINDS[kind])(**same, **({"num_sub_vectors": dim // 8} if kind == "pq" else {}))
    store.images.create_index("vector", config=how, name=vector_index.NAME)
    building = time.perf_counter() - start
    found, approximate_ms = timed(store, drawn, exact=False)
    recall = np.mean([len(a & b) / len(a) for a, b in zip(truth, found, strict=False)])
    return {
        "rows": rows, "dim": dim, "mb": plain, "index_mb": megabytes(folder, "images.lance/_indices"), "write_s": writing,
        "build_s": building, "exact_ms": exact_ms, "approximate_ms": approximate_ms, "recall_at_10": float(recall),
        "exact_queries": exact_queries, "queries": queries, "partitions": vector_index.partitions_for(rows),
    }  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """Returns a Markdown table of records of `benchmark_store`."""
    lines = [
        "| Rows | Width | Store, MB | Index, MB | Write, s | Build, s | Exact p50 / p99, ms | Index p50 / p99, ms | R@10 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        exact, near = r["exact_ms"], r["approximate_ms"]
        lines.append(
            f"| {r['rows']:,} | {r['dim']} | {r['mb']:,.0f} | {r['index_mb']:,.1f} | {r['write_s']:.1f} | {r['build_s']:.0f} | "
            f"{exact['p50']:.0f} / {exact['p99']:.0f} | {near['p50']:.0f} / {near['p99']:.0f} | {r['recall_at_10']:.1%} |"
        )
    return "\n".join(lines)


def auc(here: np.ndarray, gone: np.ndarray) -> float:
    """Returns the probability that a query with a match has the higher statistic; ties count half."""
    return float(np.mean((here[:, None] > gone[None]) + 0.5 * (here[:, None] == gone[None])))


class Gallery:
    """Image embeddings [n, D] with one caption each, and the statistics of queries against them."""

    def __init__(self, embeddings: np.ndarray, captions: np.ndarray, plain: np.ndarray, temperature: float, seed: int):
        self.embeddings, self._rng = embeddings, np.random.default_rng(seed)
        chosen = self._rng.permutation(len(captions))[:OWN_CAPTIONS]
        own = np.concatenate([captions[chosen], plain])
        paths = np.array([*map(str, chosen), *[""] * len(plain)], object)
        no_paths = np.array([""] * len(plain), object)
        self.backgrounds = {
            "fit": calibrate(Background(own, paths, temperature), self.nearest, progress=False),
            "fit, plain captions alone": calibrate(Background(plain, no_paths, temperature), self.nearest, progress=False),
        }

    def nearest(self, query: np.ndarray) -> tuple[np.ndarray, list[str]]:
        best = np.argsort(-(self.embeddings @ query))[:TOP]
        return self.embeddings[best], [str(i) for i in best]

    def statistics(self, queries: np.ndarray) -> dict[str, np.ndarray]:
        """Returns candidate statistics of the queries, each [queries]."""
        cosines = queries @ self.embeddings.T
        best = cosines.max(axis=1)
        sample = cosines[:, self._rng.permutation(cosines.shape[1])[:512]]
        # Compare with the expected maximum of n draws of the query's own cosines (extreme values of a normal sample).
        expected = np.sqrt(2 * np.log(cosines.shape[1]))
        z = (best - sample.mean(axis=1)) / sample.std(axis=1)
        lift, fit = self._fits(self.backgrounds["fit"], queries)
        plain = self._fits(self.backgrounds["fit, plain captions alone"], queries)[1]
        return {
            "cosine": best, "z against the gallery": (z - expected) * expected, "lift": lift, "fit": fit,
            "fit, plain captions alone": plain,
        }  # fmt: skip

    def _fits(self, background: Background, queries: np.ndarray) -> np.ndarray:
        """Returns [2, queries]: the best lift, and the statistic used by the search, which combines lift and cosine."""

        def one(query: np.ndarray) -> tuple[float, float]:
            embeddings, paths = self.nearest(query)
            cosines = embeddings @ query
            lifts = background.lifts(cosines, embeddings, paths)
            return float(lifts.max()), background.statistic(cosines, lifts)

        return np.array([one(query) for query in queries]).T


def embed_scenes(bundle: str, scenes: int) -> dict[str, Any]:
    """Returns the inputs of `verdicts`: scenes, their embeddings, two captions of each, and other texts, all [n, D]."""
    model = icar_jax.load(bundle)
    source = Scenes("test", scenes, seed=7, heldout=False)
    records = [source[i] for i in range(scenes)]
    embeddings = model.route([np.asarray(record.image()) for record in tqdm(records, "drawing", unit="image")]).embeddings
    texts = [model.encode_text([record.captions[i] for record in records]) for i in (0, 1)]
    return {
        "embeddings": embeddings, "queries": texts[0], "captions": texts[1], "plain": model.encode_text(PLAIN),
        "others": model.encode_text(OTHER_SUBJECTS), "temperature": model.temperature,
        "scenes": [source.scene(i) for i in range(scenes)],
    }  # fmt: skip


def verdicts(given: dict[str, Any], galleries: int = 3) -> list[dict[str, Any]]:
    """Returns records by removed content and gallery size: AUC by statistic, and both error rates at the thresholds."""
    drawn, captions = given["scenes"], given["captions"]
    pairs = [{(item.colour, item.shape) for item in scene.items} for scene in drawn]
    colours = [{item.colour for item in scene.items} | set(scene.background.colours) for scene in drawn]
    kinds: dict[str, tuple[list[set] | None, int]] = {
        "four pairs of colour and shape": (pairs, 4), "a colour": (colours, 1), "other subjects": (None, 0),
    }  # fmt: skip
    results = []
    for kind, (attributes, taken) in kinds.items():
        for size in (200, 1000):
            runs = []
            for seed in range(galleries):
                rng = np.random.default_rng(seed)
                make = lambda rows, seed=seed: Gallery(
                    given["embeddings"][rows], captions[rows], given["plain"], given["temperature"], seed
                )
                runs.append(_one(rng, make, given["queries"], attributes, taken, size, given["others"]))
            means = {key: {name: float(np.mean([run[key][name] for run in runs])) for name in runs[0][key]} for key in runs[0]}
            results.append({"taken_out": kind, "gallery": size, "galleries": galleries, **means})
            print(results[-1], flush=True)
    return results


def _one(
    rng: np.random.Generator, make: Callable[[np.ndarray], Gallery], queries: np.ndarray, attributes: list[set] | None,
    taken: int, size: int, others: np.ndarray,
) -> dict[str, dict[str, float]]:  # fmt: skip
    if attributes is None:
        rows = rng.permutation(len(queries))[:size]
        full = empty = make(rows)
        here, gone = full.statistics(queries[rows[:150]]), empty.statistics(others)
    else:
        every = sorted(set().union(*attributes))
        out = {every[i] for i in rng.permutation(len(every))[:taken]}
        has = np.array([bool(each & out) for each in attributes])
        asked, rest = rng.permutation(np.flatnonzero(has))[: min(150, size // 2)], rng.permutation(np.flatnonzero(~has))
        full, empty = make(np.concatenate([asked, rest[: size - len(asked)]])), make(rest[:size])
        here, gone = full.statistics(queries[asked]), empty.statistics(queries[asked])
    missed = {name: float(np.mean(here[name] < b.threshold)) for name, b in full.backgrounds.items()}
    said = {name: float(np.mean(gone[name] < b.threshold)) for name, b in empty.backgrounds.items()}
    return {"auc": {name: auc(here[name], gone[name]) for name in here}, "false_nothing": missed, "true_nothing": said}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--rows", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    p.add_argument("--dims", nargs="+", type=int, default=[512, 768])
    p.add_argument("--queries", type=int, default=100)
    p.add_argument("--exact-queries", type=int, default=20)
    p.add_argument("--kind", choices=sorted(KINDS), help="index type; default: the one that `icar index` builds")
    p.add_argument("--dir", help="folder for the stores, which are removed afterwards; default: a temporary folder")
    p.add_argument("--verdict", metavar="BUNDLE", help="measure the verdict instead, with this bundle")
    p.add_argument("--scenes", type=int, default=2500)
    p.add_argument("--quick", action="store_true", help="2,000 rows, few queries, as a smoke test")
    p.add_argument("--json")
    args = p.parse_args()
    if args.quick:
        args.rows, args.dims, args.queries, args.exact_queries, args.scenes = [2000], [64], 10, 5, 1300
    records = []
    if args.verdict:
        records = verdicts(embed_scenes(args.verdict, args.scenes), 1 if args.quick else 3)
    else:
        for dim in args.dims:
            for rows in args.rows:
                folder = tempfile.mkdtemp(prefix="search-", dir=args.dir)
                try:
                    records.append(benchmark_store(rows, dim, args.queries, args.exact_queries, folder, args.kind))
                finally:
                    shutil.rmtree(folder)
                print(table(records), flush=True)
                _write(args.json, records)
    _write(args.json, records)


def _write(file: str | None, records: list[dict[str, Any]]) -> None:
    if file:
        about = {"cpus": os.cpu_count(), "lancedb": lancedb.__version__, "runs": records}
        Path(file).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Time and memory of the retrieval metrics: compared with a loop that sorts for every query, and at the paper's size.

    nice -n 10 python benchmarks/metrics.py [--quick] [--full] [--json docs/results/metrics.json]

Without --full: ranks of 5,000 images and 25,000 captions in both directions (30,000 queries), with `retrieval.ranks` and with
a plain loop that computes one product with the gallery and one argsort per query. The loop is timed on evenly spaced queries,
where its ranks must be equal (except for one in a thousand, where scores may differ in the last bit).

With --full: 5,000 images and 25,000 captions as queries, and 100,000 distractors with one caption each, so the galleries hold
105,000 images and 125,000 captions; also category-level precision with 80 labels, and bootstrap intervals of all metrics.
Embeddings are random, of width 768, float32 or bfloat16. Peak memory is ru_maxrss of the process, including the embeddings.
Results of earlier runs under other names are kept in the --json file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from icar_jax.evaluation.metrics import category, comparison, retrieval

WIDTH, LABELS = 768, 80
REPEATS = 2  # the fastest repetition counts, since other load on the machine only adds time


def unit_vectors(n: int, dtype: str, rng: np.random.Generator, near: np.ndarray | None = None) -> np.ndarray:
    """Returns random unit vectors [n, WIDTH], close to `near` [n, WIDTH] if given."""
    rows = rng.standard_normal((n, WIDTH), np.float32)
    if near is not None:
        rows *= 8.0  # cosine of about 0.12; the best of 100,000 random vectors has 0.16
        rows += np.float32(np.sqrt(WIDTH)) * near
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else rows


def random_embeddings(images: int, captions: int, far: int, dtype: str = "float32"):
    """Returns (image_embed, text_embed, caption_image, distractors or None), with captions close to their images."""
    rng = np.random.default_rng(0)
    owner = np.concatenate([np.arange(images), rng.integers(0, images, captions - images)])
    base = unit_vectors(images, dtype, rng)
    texts = unit_vectors(captions, dtype, rng, base[owner].astype(np.float32))
    if not far:
        return base, texts, owner, None
    labels = [(f"label {rng.integers(LABELS)}",) if i % 2 else () for i in range(far)]
    distractors = retrieval.Distractors(unit_vectors(far, dtype, rng), unit_vectors(far, dtype, rng), np.arange(far), labels)
    return base, texts, owner, distractors


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def argsort_loop(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, every: int) -> tuple[float, float, dict]:
    """Ranks every `every`-th query; returns (seconds for all queries, for sorting, {direction: (query indices, ranks)})."""
    found, total, sorting = {}, 0.0, 0.0
    own = [np.flatnonzero(owner == i) for i in range(0, len(images), every)]
    own_images = [np.array([i]) for i in owner[::every]]
    for name, queries, gallery, right in (
        ("text_to_image", texts, images, own_images), ("image_to_text", images, texts, own),
    ):  # fmt: skip
        ranks, scored = [], 0.0
        start = time.perf_counter()
        for query, answers in zip(queries[::every], right):
            begin = time.perf_counter()
            scores = gallery @ query
            scored += time.perf_counter() - begin
            order = np.argsort(-scores, kind="stable")
            ranks.append(1 + int(np.flatnonzero(np.isin(order, answers))[0]))
        seconds = time.perf_counter() - start
        scale = len(queries) / len(ranks)
        total, sorting = total + scale * seconds, sorting + scale * (seconds - scored)
        found[name] = (np.arange(0, len(queries), every), np.array(ranks))
    return total, sorting, found


def compare_with_loop(images: int, captions: int, every: int) -> dict:
    base, texts, owner, _ = random_embeddings(images, captions, 0)
    retrieval.ranks(base[:64], texts[:64], np.arange(64))  # starts the devices
    start = time.perf_counter()
    found = retrieval.ranks(base, texts, owner)
    first = time.perf_counter() - start
    again = first
    for _ in range(REPEATS):
        start = time.perf_counter()
        retrieval.ranks(base, texts, owner)
        again = min(again, time.perf_counter() - start)
    loop, sorting, expected = argsort_loop(base, texts, owner, every)
    for name, (queries, ranks) in expected.items():
        differ = int(np.count_nonzero(getattr(found, name)[queries] != ranks))
        if differ > len(ranks) // 1000:  # the two products may round near-ties differently
            raise AssertionError(f"{name}: {differ} of {len(ranks)} ranks differ from the argsort loop's")
    row = {"images": images, "captions": captions, "ours_s": again, "with_compilation_s": first, "argsort_loop_s": loop}
    row |= {"argsort_alone_s": sorting, "loop_queries_timed": sum(len(r) for _, r in expected.values())}
    row["speed_up"], row["speed_up_with_compilation"] = loop / again, loop / first
    print(
        f"{images:,} images, {captions:,} captions, width {WIDTH}: {again:.1f} s ({first:.1f} s with compilation); argsort "
        f"loop {loop:.0f} s, of which {sorting:.0f} s sorting and counting: {row['speed_up']:.0f} times faster"
    )
    return row


def benchmark_full(images: int, captions: int, far: int, dtype: str) -> dict:
    row = {"images": images + far, "captions": captions + far, "queries": images + captions, "dtype": dtype}
    start = time.perf_counter()
    *plain, distractors = random_embeddings(images, captions, far, dtype)
    row["making_embeddings_s"], row["embeddings_peak_gib"] = time.perf_counter() - start, peak_gib()
    place = {"distractors": distractors}
    start = time.perf_counter()
    ranks = retrieval.ranks(*plain, **place)
    row["ranks_s"] = time.perf_counter() - start
    labels = [(f"label {i % LABELS}", f"label {i * i % LABELS}") for i in range(images)]
    start = time.perf_counter()
    precisions = category.precisions(*plain, labels, **place)
    row["category_s"] = time.perf_counter() - start
    start = time.perf_counter()
    run = comparison.collect(ranks, precisions)
    intervals = comparison.intervals({"full": run, "same": run}, against="full")
    row["bootstrap_2_runs_s"] = time.perf_counter() - start
    row["peak_gib"] = peak_gib()
    print(
        f"{row['queries']:,} queries in {row['images']:,} images and {row['captions']:,} captions, width {WIDTH}, {dtype}: "
        f"ranks {row['ranks_s']:.0f} s, category {row['category_s']:.0f} s, intervals of 2 runs "
        f"{row['bootstrap_2_runs_s']:.0f} s, peak {row['peak_gib']:.2f} GiB"
    )
    for direction, found in intervals["full"].items():
        print(f"  {direction}: " + ", ".join(f"{k} {v.value.value:.2f}" for k, v in found.items()))
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, as a smoke test")
    parser.add_argument("--full", action="store_true", help="the size of the paper, instead of the comparison")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="embedding dtype, with --full")
    parser.add_argument("--loop-every", type=int, default=20, help="time the loop on every N-th query")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    small = 10 if args.quick else 1
    if args.full:
        name, row = f"full_{args.dtype}", benchmark_full(5000 // small, 25000 // small, 100_000 // small, args.dtype)
    else:
        name, row = "comparison", compare_with_loop(5000 // small, 25000 // small, args.loop_every)
    row |= {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "platform": jax.default_backend()}
    row["jax"] = jax.__version__
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {"benchmark": "metrics", "width": WIDTH}
        args.json.write_text(json.dumps(kept | {name: row}, indent=2) + "\n")


if __name__ == "__main__":
    main()

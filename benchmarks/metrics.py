"""Time and memory of the retrieval metrics: against a loop that sorts for every query, and at the size of the paper.

    nice -n 10 python benchmarks/metrics.py [--quick] [--full] [--json docs/results/metrics.json]

Without --full: ranks of 5,000 images and 25,000 captions in both directions (30,000 queries), by `metrics.ranks` and by the
plain loop: one product with the gallery and one argsort a query. The loop is timed on some of its queries, spread evenly, and
its ranks there must be equal (but for one in a thousand, where two scores differ in the last bit).

With --full: 5,000 images and 25,000 captions ask, and 100,000 distractors with a caption each make the galleries 105,000
images and 125,000 captions; category-level precision with 80 labels, and bootstrap intervals of all metrics, come on top.
Embeddings are random, of width 768, float32 or bfloat16. Peak memory is ru_maxrss of the process,
the embeddings themselves included. A --json file keeps what earlier runs wrote under other names.
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
REPEATS = 2  # the fastest counts: other work on the machine only ever adds time


def embeddings(n: int, dtype: str, rng: np.random.Generator, near: np.ndarray | None = None) -> np.ndarray:
    """Unit vectors [n, WIDTH]; with `near` [n, WIDTH], vectors in its surroundings."""
    rows = rng.standard_normal((n, WIDTH), np.float32)
    if near is not None:
        rows *= 8.0  # a cosine of about 0.12, against 0.16 of the best of 100,000 random ones
        rows += np.float32(np.sqrt(WIDTH)) * near
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else rows


def case(images: int, captions: int, far: int, dtype: str = "float32"):
    """(image_embed, text_embed, caption_image, distractors or None) with captions like their images."""
    rng = np.random.default_rng(0)
    owner = np.concatenate([np.arange(images), rng.integers(0, images, captions - images)])
    base = embeddings(images, dtype, rng)
    texts = embeddings(captions, dtype, rng, base[owner].astype(np.float32))
    if not far:
        return base, texts, owner, None
    labels = [(f"label {rng.integers(LABELS)}",) if i % 2 else () for i in range(far)]
    distractors = retrieval.Distractors(embeddings(far, dtype, rng), embeddings(far, dtype, rng), np.arange(far), labels)
    return base, texts, owner, distractors


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def argsort_loop(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, every: int) -> tuple[float, float, dict]:
    """(seconds for all queries, those for sorting alone, {direction: (queries asked, their ranks)}), asking each `every`-th."""
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


def compare(images: int, captions: int, every: int) -> dict:
    base, texts, owner, _ = case(images, captions, 0)
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
    for name, (asked, ranks) in expected.items():
        differ = int(np.count_nonzero(getattr(found, name)[asked] != ranks))
        if differ > len(ranks) // 1000:  # near-ties may fall either way by the rounding of the two products
            raise AssertionError(f"{name}: {differ} of {len(ranks)} ranks differ from the argsort loop's")
    row = {"images": images, "captions": captions, "ours_s": again, "with_compilation_s": first, "argsort_loop_s": loop}
    row |= {"argsort_alone_s": sorting, "loop_queries_timed": sum(len(r) for _, r in expected.values())}
    row["speed_up"], row["speed_up_with_compilation"] = loop / again, loop / first
    print(
        f"{images:,} images, {captions:,} captions, width {WIDTH}: {again:.1f} s ({first:.1f} s with compilation); argsort "
        f"loop {loop:.0f} s, of which {sorting:.0f} s sorting and counting: {row['speed_up']:.0f} times faster"
    )
    return row


def full(images: int, captions: int, far: int, dtype: str) -> dict:
    row = {"images": images + far, "captions": captions + far, "queries": images + captions, "dtype": dtype}
    start = time.perf_counter()
    *plain, distractors = case(images, captions, far, dtype)
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
    parser.add_argument("--quick", action="store_true", help="a tenth of the size, for a test of this file")
    parser.add_argument("--full", action="store_true", help="the size of the paper, instead of the comparison")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="with --full: of the embeddings")
    parser.add_argument("--loop-every", type=int, default=20, help="the loop is timed on each such query")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    small = 10 if args.quick else 1
    if args.full:
        name, row = f"full_{args.dtype}", full(5000 // small, 25000 // small, 100_000 // small, args.dtype)
    else:
        name, row = "comparison", compare(5000 // small, 25000 // small, args.loop_every)
    row |= {"load_average": os.getloadavg()[0], "cores": os.cpu_count(), "platform": jax.default_backend()}
    row["jax"] = jax.__version__
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {"benchmark": "metrics", "width": WIDTH}
        args.json.write_text(json.dumps(kept | {name: row}, indent=2) + "\n")


if __name__ == "__main__":
    main()

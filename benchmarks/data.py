"""Images per second from each kind of source, compared with the pairs per second that the training step consumes.

    python benchmarks/data.py [--quick] [--images 4000] [--batch 64] [--step-pairs-per-s 350] [--json docs/results/data.json]

Writes one synthetic data set (JPEG, 256 x 256, smooth noise; captions) as a folder, tar shards, Parquet and ArrayRecord into
a temporary folder and reads it in training order: decoding, random crop, resize to 224 x 224 and tokens, as in train.py. The
files are in the page cache, so this measures the CPU, not the storage; the Parquet cache of row groups (of 100 rows) holds a
sixteenth of the data. `read/s` is the rate of one thread that fetches samples without decoding images. The step's rate is
read from docs/results/train_step.json unless given.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for tests.support, which writes the layouts
from icar_jax.config import DataConfig  # noqa: E402
from icar_jax.data import configured  # noqa: E402
from icar_jax.data.augment import Augment  # noqa: E402
from icar_jax.data.images import Preprocess  # noqa: E402
from icar_jax.data.loader.batches import train_batches  # noqa: E402
from icar_jax.data.loader.order import examples_at  # noqa: E402
from icar_jax.data.tokenizer import Tokenizer  # noqa: E402
from tests.support.shardfiles import sample, write_array_records, write_tar  # noqa: E402

KINDS = ("folder", "webdataset", "parquet", "tfds")
SHARD = 500  # samples per shard
SIDE, TRAINED_AT, CONTEXT = 256, 224, 77
SETTINGS = ((0, 1), (0, 2), (2, 1))  # worker processes, threads in each process


def jpeg(number: int) -> bytes:
    """Returns a smooth image with some grain, with the file size of a photograph (about 20 kB)."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (SIDE, SIDE, 1))
    stream = io.BytesIO()
    Image.fromarray(np.clip(grain, 0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def caption(number: int) -> str:
    return f"a photograph of {number} coloured clouds over a wide field in the evening"


def write(root: Path, images: int) -> dict[str, DataConfig]:
    """Writes the data set in every layout; returns the configuration that reads each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [jpeg(n) for n in range(images)]
    for part in range(0, images, SHARD):
        numbers = range(part, min(part + SHARD, images))
        name = f"{part // SHARD:05}"
        write_tar(root / "tar" / f"{name}.tar", [m for n in numbers for m in sample(f"{n:08}", pictures[n], caption(n))])
        table = pa.table({"image": [pictures[n] for n in numbers], "caption": [caption(n) for n in numbers]})
        (root / "parquet").mkdir(exist_ok=True)
        pq.write_table(table, root / "parquet" / f"{name}.parquet", row_group_size=100, compression="none")
    folder = root / "folder" / "images"
    folder.mkdir(parents=True)
    for n, picture in enumerate(pictures):
        (folder / f"{n}.jpg").write_bytes(picture)
    rows = [f"{n}.jpg,{caption(n)},train" for n in range(images)]
    (root / "folder" / "captions.csv").write_text("file,caption,split\n" + "\n".join(rows) + "\n")
    counts = [min(SHARD, images - part) for part in range(0, images, SHARD)]
    write_array_records(root / "tfds", "clouds", {"train": counts}, image=lambda n: pictures[n])
    common = {"calibration_size": 1}
    return {
        "folder": DataConfig(source="folder", root=str(root / "folder"), **common),
        "webdataset": DataConfig(source="webdataset", root=str(root / "tar"), train_split=".", **common),
        "parquet": DataConfig(source="parquet", root=str(root / "parquet"), train_split=".", **common),
        "tfds": DataConfig(source="tfds", root=str(root / "tfds"), dataset="clouds", caption_column="captions.text", **common),
    }


def reads_per_s(source: Any, seconds: float) -> float:
    """Returns samples per second fetched in training order by one thread, without decoding images."""
    _, order = examples_at(np.arange(len(source)), len(source), 0)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        record = source[int(order[done % len(order)])]
        if (path := getattr(record.image, "args", [None])[0]) and isinstance(path, str):  # a folder's record holds a path
            Path(path).read_bytes()
        done += 1
    return done / (time.perf_counter() - start)


def images_per_s(source: Any, tokenizer: Tokenizer, batch: int, workers: int, threads: int, seconds: float) -> float:
    """Returns images per second after the workers have started and their initial buffers are used up."""
    spent = 2 * max(1, workers) * (1 + threads)
    with train_batches(
        source, Preprocess(TRAINED_AT), tokenizer, CONTEXT, batch_size=batch, seed=0,
        augment=Augment("crop", scale=(0.9, 1.0)), num_workers=workers, num_threads=threads,
    ) as batches:  # fmt: skip
        for _ in range(1 + (spent if workers else threads * 2)):
            next(batches)
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < seconds or done < 2 * batch:
            done += len(next(batches)["index"])
        return done / (time.perf_counter() - start)


def step_rate() -> tuple[float, str]:
    """Returns pairs per second of this package's fastest measured training step, and the source of the number."""
    path = ROOT / "docs" / "results" / "train_step.json"
    rows = [r for r in json.loads(path.read_text(encoding="utf-8")) if r["framework"] == "icar_jax"]
    best = max(rows, key=lambda r: r["pairs_per_s"])
    return best["pairs_per_s"], f"{path.relative_to(ROOT)} ({best['dtype']}, batch {best['batch']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="600 images, two settings, half a second each; writes no JSON")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of each measurement")
    parser.add_argument("--step-pairs-per-s", type=float, help="pairs per second of the training step")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "results" / "data.json")
    args = parser.parse_args()
    images, seconds, settings = (600, 0.5, SETTINGS[1:2]) if args.quick else (args.images, args.seconds, SETTINGS)
    rate, origin = (args.step_pairs_per_s, "--step-pairs-per-s") if args.step_pairs_per_s else step_rate()
    rows = []
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="icar_jax_data_")))
        configs = write(root, images)
        tokenizer = Tokenizer.train([caption(n) for n in range(images)], 400)
        size = sum(f.stat().st_size for f in (root / "folder").rglob("*.jpg")) / images
        print(f"{images} images of {size / 1000:.0f} kB, batch {args.batch}, {os.cpu_count()} processor cores")
        print(f"The training step takes {rate:.1f} pairs/s ({origin}).")
        print(f"{'source':>12} {'open s':>7} {'read/s':>8} {'workers':>8} {'threads':>8} {'images/s':>9} {'x step':>7}")
        for kind in KINDS:
            start = time.perf_counter()
            source = configured.train_source(configs[kind])
            opened = time.perf_counter() - start
            if kind == "parquet":  # a real data set does not fit into the cache
                source.source.cache_bytes = int(images * size) // 16
            read = reads_per_s(source, seconds / 2)
            for workers, threads in settings:
                found = images_per_s(source, tokenizer, args.batch, workers, threads, seconds)
                rows.append({
                    "source": kind, "open_s": opened, "reads_per_s": read, "workers": workers, "threads": threads,
                    "images_per_s": found, "ratio_to_step": found / rate,
                })  # fmt: skip
                print(
                    f"{kind:>12} {opened:7.2f} {read:8.0f} {workers:8} {threads:8} {found:9.0f} {found / rate:7.1f}", flush=True
                )
    if not args.quick:
        about = {"images": images, "bytes_each": size, "batch": args.batch, "cores": os.cpu_count()}
        result = {"set": about, "step_pairs_per_s": rate, "step_from": origin, "rows": rows}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

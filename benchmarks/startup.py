"""How long commands take to start, and how much of the towers' speed is left from end to end.

    make demo && python benchmarks/startup.py workdir/demo [--before PYTHON] [--photos FOLDER --checkpoint C] [--json FILE]

Times whole processes: cold with an empty cache of compiled programs, warm with the one that the cold run has filled. --before
names the interpreter of another installation of icar_jax, which takes turns with this one in the same run. --photos compares
the speed over files with that of the towers alone on other images than the demo's, with another model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from icar_jax.data.images import Preprocess, decode

QUERY = "A small red circle on a yellow background."
REPEATS = 3  # of everything but cold runs; the median counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="folder of a finished demo")
    parser.add_argument("--before", metavar="PYTHON", help="interpreter of another installation to compare with")
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="images of the second measurement (the demo's)")
    parser.add_argument("--checkpoint", type=Path, metavar="C", help="model of the second measurement (the demo's)")
    parser.add_argument("--only-speed", action="store_true", help="only the second measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows as JSON")
    args = parser.parse_args()
    pythons = ({"before": args.before} if args.before else {}) | {"now": sys.executable}
    with tempfile.TemporaryDirectory(prefix="icar-startup-") as folder:
        benches = {name: Bench(python, args.demo.resolve(), Path(folder) / name) for name, python in pythons.items()}
        rows = {}
        for title, run, repeats in () if args.only_speed else CASES:
            taken: dict[str, list[float]] = {name: [] for name in benches}
            for _ in range(repeats):
                for name, bench in benches.items():
                    taken[name].append(run(bench))
            rows[title] = {name: statistics.median(seconds) for name, seconds in taken.items()}
            print(title, {name: round(seconds, 2) for name, seconds in rows[title].items()}, file=sys.stderr, flush=True)
        model, photos = args.checkpoint or args.demo / "bundle", args.photos or args.demo / "gallery"
        speed = json.loads(benches["now"].output("-c", SPEED, str(model.resolve()), str(photos.resolve()), folder))
    if rows:
        _print(rows)
    whole, reduced, apart = _decoding(photos)
    print(
        f"A JPEG of 12 megapixels for 224 pixels: {whole:.0f} ms whole, {reduced:.0f} ms reduced, at most {apart} of 255 apart"
    )
    share = speed["files"] / speed["towers"]
    print(f"From files: {speed['files']:.1f} images/s, {share:.2f} of the {speed['towers']:.1f} of the towers alone")
    if args.json:
        about = {"benchmark": "startup", "cpus": os.cpu_count(), "seconds": rows, "images_per_s": speed}
        args.json.write_text(json.dumps(about, indent=2) + "\n")


class Bench:
    """Runs the commands of one installation, with caches, stores and workdirs of its own."""

    def __init__(self, python: str, demo: Path, folder: Path):
        self.python, self.demo, self.folder = python, demo, folder
        folder.mkdir(parents=True)
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XDG_"))}
        self.env |= {"ICAR_JAX_CACHE": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}

    def output(self, *words: str) -> str:
        """Standard output of the interpreter with these arguments."""
        done = subprocess.run([self.python, *words], env=self.env, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(words)} failed:\n{done.stderr}")
        return done.stdout

    def seconds(self, *words: str) -> float:
        start = time.perf_counter()
        self.output(*words)
        return time.perf_counter() - start

    def icar(self, *words: str) -> float:
        return self.seconds("-m", "icar_jax.cli", *words)

    def cold(self) -> None:
        shutil.rmtree(self.folder / "cache", ignore_errors=True)

    @property
    def store(self) -> str:
        """A store of the demo's images, indexed by this installation."""
        return str(self.folder / "store")

    def index(self) -> float:
        shutil.rmtree(self.store, ignore_errors=True)
        gallery = str(self.demo / "gallery")
        return self.icar("index", gallery, "--store", self.store, "--checkpoint", str(self.demo / "bundle"))

    def search(self) -> float:
        return self.icar("search", QUERY, "--store", self.store)

    def search_with_server(self) -> float:
        command = [self.python, "-m", "icar_jax.cli", "serve", "--store", self.store, "--port", "0"]
        server = subprocess.Popen(command, env=self.env, cwd=self.folder, stdout=subprocess.PIPE, text=True)
        try:
            for line in server.stdout or ():
                if re.match("Serving ", line):
                    break
            return statistics.median(self.search() for _ in range(REPEATS))
        finally:
            server.terminate()
            server.wait()

    def train(self) -> float:
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        settings = ["--config=demo:clip", f"--workdir={self.folder / 'run'}", "--config.train.steps=1"]
        return self.icar("train", *settings, "--config.train.eval_every=0")


def _cold(run):
    def cold(bench: Bench) -> float:
        bench.cold()
        return run(bench)

    return cold


CASES: Sequence[tuple[str, Any, int]] = (
    ("import icar_jax", lambda bench: bench.seconds("-c", "import icar_jax"), REPEATS),
    ("icar --help", lambda bench: bench.icar("--help"), REPEATS),
    ("icar index, 500 images, cold", _cold(Bench.index), 1),
    ("icar index, 500 images, warm", Bench.index, 2),
    ("icar search, first of a store, cold", _cold(Bench.search), 1),
    ("icar search, cold", _cold(Bench.search), 1),
    ("icar search, warm", Bench.search, REPEATS),
    ("icar search, with icar serve", Bench.search_with_server, 1),
    ("icar train, one step, cold", _cold(Bench.train), 1),
    ("icar train, one step, warm", Bench.train, 2),
)

# Images/s of a model over the first 512 images in memory and over the same files, taking turns; compiled before.
SPEED = """
import json, statistics, sys, time
import icar_jax
from icar_jax.data.sources.files import ImagePaths
from icar_jax.inference.files.embedding import embed_files
model = icar_jax.load(sys.argv[1])
files = [path for path, _ in zip(ImagePaths([sys.argv[2]]), range(512))]
exit = None if model.thresholds else model.exits[-1]
model.warm_up_embed(exit)
batches = list(model._prepare(files, model.preprocesses))
found = {"towers": [], "files": []}
for i in range(3):
    start = time.perf_counter()
    model.embed(batches, exit=exit)
    found["towers"].append(len(files) / (time.perf_counter() - start))
    done = embed_files(model, ImagePaths(files), f"{sys.argv[3]}/corpus{i}")
    found["files"].append(len(files) / done.seconds)
print(json.dumps({name: statistics.median(values) for name, values in found.items()}))
"""


def _decoding(photos: Path) -> tuple[float, float, int]:
    """Milliseconds to decode and resize a JPEG of 12 megapixels, whole and reduced, and the largest difference of a value."""
    picture = Image.new("RGB", (4000, 3000))
    for i, file in zip(range(16), sorted(file for file in photos.rglob("*") if file.suffix in (".jpg", ".png"))):
        picture.paste(Image.open(file).convert("RGB").resize((1000, 750)), (i % 4 * 1000, i // 4 * 750))
    stream, preprocess = io.BytesIO(), Preprocess(224)
    picture.save(stream, "JPEG", quality=90)
    made, taken = [], []
    for at_least in (0, preprocess.decoded_side):
        start = time.perf_counter()
        for _ in range(REPEATS):
            pixels = preprocess.resize(decode(stream.getvalue(), at_least=at_least))
        taken.append(1000 * (time.perf_counter() - start) / REPEATS)
        made.append(pixels.astype(int))
    return taken[0], taken[1], int(abs(made[0] - made[1]).max())


def _print(rows: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(rows.values())))
    table = Table(title="Seconds from start to end of a process")
    for header in ("", *names, *(["now / before"] if len(names) > 1 else [])):
        table.add_column(header, justify="right" if header else "left")
    for title, taken in rows.items():
        ratio = [f"{taken['now'] / taken['before']:.2f}"] if len(names) > 1 else []
        table.add_row(title, *(f"{taken[name]:.2f}" for name in names), *ratio)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

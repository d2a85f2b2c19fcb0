"""Files into a corpus on disk: read and hashed on threads, routed shard by shard, continued where a run before was stopped."""

from __future__ import annotations

import csv
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from icar_jax.data.image_paths import ImagePaths
from icar_jax.data.images import Preprocess, decode
from icar_jax.inference.corpus import BAD, CorpusWriter, path_key
from icar_jax.inference.landing import Stats
from icar_jax.inference.model import Model
from icar_jax.inference.reading import Bad, in_order, readable
from icar_jax.inference.router import Routed

SHARD_ROWS = 4096


@dataclass(frozen=True)
class _Read:
    path: str
    sha256: str
    pixels: Mapping[str, np.ndarray]
    seconds: float


@dataclass
class Embedded:
    """What a run of `embed_files` did.

    Attributes:
        images: embedded by this run; `before`: named to it, but embedded by an earlier one; `total`: in the corpus now.
        exits: executed blocks -> images of this run.
        bad: files that could not be embedded; `first_bad` holds the first of them.
        duplicates, empty: as of ImagePaths.
        warm_up_s, seconds: wall time of compilation, and of all that came after.
        stats: of the router, summed over the shards.
    """

    images: int = 0
    before: int = 0
    total: int = 0
    exits: Counter = field(default_factory=Counter)
    bad: int = 0
    first_bad: list[Bad] = field(default_factory=list)
    duplicates: int = 0
    empty: list[str] = field(default_factory=list)
    warm_up_s: float = 0.0
    seconds: float = 0.0
    stats: Stats = field(default_factory=Stats)

    def report(self) -> str:
        """Text for the end of a run: speed, shares, and where the time went."""
        s, n = self.stats, max(1, self.images)
        padding = sum(s.padding.values()) / max(1, self.images + sum(s.padding.values()))
        share = lambda seconds: f"{100 * seconds / max(s.total_s, 1e-9):.0f}%"
        before = f"; {self.before:,} had been embedded before" if self.before else ""
        lines = [
            f"Embedded {self.images:,} images in {self.seconds:.1f} s ({self.images / max(self.seconds, 1e-9):.1f} images/s) "
            f"after {self.warm_up_s:.1f} s of compilation{before}"
        ]
        lines += [f"  {depth} blocks: {count:,} images ({count / n:.1%})" for depth, count in sorted(self.exits.items())]
        if self.images:
            lines.append(
                f"  towers {share(s.tower_s)} of the time, complexity {share(s.score_s)}, waiting for images "
                f"{share(s.input_s)}; padding {padding:.1%} of the towers' rows; {s.compilations} compilations after warm-up"
            )
        return "\n".join(lines)


def embed_files(
    model: Model,
    paths: ImagePaths,
    out: str | os.PathLike,
    *,
    exit: int | None = None,
    budget: float | None = None,
    shard_rows: int = SHARD_ROWS,
    threads: int = 0,
    bad_shown: int = 20,
) -> Embedded:
    """Embeds files into the corpus `out`, with a progress bar; see `inference.corpus` for what lies there.

    Rows stand in the order of `paths`, by their absolute path; those that the corpus holds are not read again, whatever became
    of the file. Files that cannot be used are tried in every run. `milliseconds` of a row is the wall time of reading, decoding
    and resizing on its thread, plus its share of the time in which the device was busy with its batches. With `exit` every
    image runs to that depth, and none is scored; without it a bundle routes, and a CLIP alone runs full depth. `budget` as for
    `Model.encode_image`.

    Some ten batches of pixels are held: read ahead, waiting for their scores, for an exit, and for the device. Beyond that
    memory grows with `shard_rows` embeddings, and with some 80 bytes for each image of the corpus.
    Raises CorpusError for a corpus of another model or other options, NoImages where `paths` names none.
    """
    thresholds = model.thresholds if budget is None else model.thresholds_for(budget)
    if budget is None:
        exit = model.fixed_exit(exit)
    elif exit is not None:
        raise ValueError("exit and budget exclude each other")
    encoding = {"exit": exit} if exit is not None else {"exits": list(model.exits), "thresholds": list(thresholds)}
    manifest = {
        "model": model.identity if exit is None else {"clip": model.identity["clip"]},
        "encoding": {**encoding, "dtype": model.dtype},
        "embed_dim": model.embed_dim,
        "shard_rows": shard_rows,
    }
    preprocesses = model.preprocesses if exit is None else {"clip": model.preprocess}
    done = Embedded()
    with CorpusWriter(out, manifest) as corpus:
        start = time.perf_counter()
        model.warm_up_embed(exit)
        done.warm_up_s = time.perf_counter() - start
        start = time.perf_counter()
        bar = tqdm(total=paths.count(), desc="embed", unit=" images")
        read = in_order(
            lambda path: readable(path, lambda path: _read(path, preprocesses)),
            _new(paths, corpus.done, done, bar),
            ahead=2 * model.batch_size,
            threads=threads,
        )
        with bar, closing(read), _BadFiles(Path(out), done, bad_shown) as bad:
            corpus.note(complete=False)
            embed = partial(model.embed, exit=exit, thresholds=None if exit is not None else thresholds)
            while _shard(embed, model.batch_size, corpus, _good(read, bad, bar), shard_rows, done):
                bar.set_postfix_str(", ".join(f"{e} blocks {c / done.images:.0%}" for e, c in sorted(done.exits.items())))
                bad.flush()
        if corpus.images:
            corpus.note(complete=True, images=corpus.images, bad=done.bad)
        done.total = corpus.images
    done.seconds = time.perf_counter() - start
    done.duplicates, done.empty = paths.duplicates, list(paths.empty)
    return done


def _new(paths: ImagePaths, have: set[bytes], done: Embedded, bar: tqdm) -> Iterator[str]:
    """Absolute paths that the corpus lacks; the others are counted, but are not part of the images/s."""
    have = frozenset(have)  # of earlier runs: this one meets no path twice
    for path in paths:
        if path_key(path) in have:
            done.before += 1
            bar.initial += 1
            bar.update()
        else:
            yield os.path.abspath(path)


def _read(path: str, preprocesses: Mapping[str, Preprocess]) -> _Read:
    start = time.perf_counter()
    content = Path(path).read_bytes()
    picture = decode(content, path)
    pixels = {name: p.resize(picture) for name, p in preprocesses.items()}
    return _Read(path, hashlib.sha256(content).hexdigest(), pixels, time.perf_counter() - start)


class _BadFiles:
    """bad.csv of a run, written as files turn up; gone where there are none."""

    def __init__(self, folder: Path, done: Embedded, shown: int):
        self._path, self._done, self._shown = folder / BAD, done, shown
        self._file: TextIO | None = None

    def __enter__(self) -> _BadFiles:
        return self

    def add(self, bad: Bad) -> None:
        if self._file is None:
            self._file = self._path.open("w", encoding="utf-8", newline="")
            csv.writer(self._file, lineterminator="\n").writerow(("file", "reason"))
        csv.writer(self._file, lineterminator="\n").writerow((bad.file, bad.reason))
        self._done.bad += 1
        if len(self._done.first_bad) < self._shown:
            self._done.first_bad.append(bad)

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def __exit__(self, kind: Any, *_: Any) -> None:
        if self._file is not None:
            self._file.close()
        elif kind is None:
            self._path.unlink(missing_ok=True)  # of an earlier run


def _good(items: Iterable[_Read | Bad], bad: _BadFiles, bar: tqdm) -> Iterator[_Read]:
    for item in items:
        bar.update()
        if isinstance(item, Bad):
            bad.add(item)
        else:
            yield item


def _shard(
    embed: Callable[..., Routed],
    batch_size: int,
    corpus: CorpusWriter,
    items: Iterator[_Read],
    shard_rows: int,
    done: Embedded,
) -> bool:
    """Embeds the next `shard_rows` items and writes them; False where none was left."""
    rows: list[tuple[str, str, float]] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        while len(rows) < shard_rows:
            batch = []
            for item in items:
                batch.append(item.pixels)
                rows.append((item.path, item.sha256, item.seconds))
                if len(batch) == batch_size or len(rows) == shard_rows:
                    break
            if not batch:
                return
            yield {name: np.stack([pixels[name] for pixels in batch]) for name in batch[0]}

    routed = embed(batches())
    if not rows:
        return False
    paths, hashes, seconds = zip(*rows, strict=True)
    corpus.add(
        routed.embeddings,
        {
            "path": paths,
            "sha256": hashes,
            "complexity": [None if np.isnan(score) else float(score) for score in routed.scores],
            "exit": routed.exits,
            "milliseconds": np.round(1000 * (np.array(seconds) + routed.seconds), 3),
        },
    )
    done.images += len(rows)
    done.exits.update(routed.exits.tolist())
    done.stats.add(routed.stats)
    return True

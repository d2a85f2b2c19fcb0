"""Files into a corpus on disk, shard by shard; continued where a run before was stopped."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from icar_jax.data.sources.files import ImagePaths
from icar_jax.inference.files.corpus import BAD, CorpusWriter, path_key
from icar_jax.inference.files.stream import ReadImage, StreamEncoder, StreamResult, embed_stream, read_image
from icar_jax.inference.model import Model
from icar_jax.inference.reading import Bad, in_order, readable
from icar_jax.inference.router import RoutingResult

SHARD_ROWS = 4096


@dataclass
class EmbeddingResult(StreamResult):
    """What a run of `embed_files` did.

    Attributes:
        images: embedded by this run; `before`: named to it, but embedded by an earlier one; `total`: in the corpus now.
        exits: executed blocks -> images of this run.
        bad: files that could not be embedded; `first_bad` holds the first of them.
        duplicates, empty: as of ImagePaths.
        warm_up_s, seconds: wall time of compilation, and of all that came after.
        stats: of the router, summed over the shards.
    """

    before: int = 0
    total: int = 0
    bad: int = 0
    first_bad: list[Bad] = field(default_factory=list)
    duplicates: int = 0
    empty: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Text for the end of a run: speed, shares, and where the time went."""
        before = f"; {self.before:,} had been embedded before" if self.before else ""
        first = (
            f"Embedded {self.images:,} images in {self.seconds:.1f} s ({self.images / max(self.seconds, 1e-9):.1f} images/s) "
            f"after {self.warm_up_s:.1f} s of compilation{before}"
        )
        return "\n".join([first, *self.details()])


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
) -> EmbeddingResult:
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
    encoding = StreamEncoder(model, exit=exit, budget=budget)
    manifest = {
        "model": model.identity if encoding.exit is None else {"clip": model.identity["clip"]},
        "encoding": encoding.describe(),
        "embed_dim": model.embed_dim,
        "shard_rows": shard_rows,
    }
    done = EmbeddingResult()
    with CorpusWriter(out, manifest) as corpus:
        start = time.perf_counter()
        bar = tqdm(total=paths.count(), desc="embed", unit=" images")
        read = in_order(
            lambda path: readable(path, lambda path: read_image(path, encoding.preprocesses)),
            _new(paths, corpus.done, done, bar),
            ahead=2 * model.batch_size,
            threads=threads,
        )
        with bar, closing(read), _BadFiles(Path(out), done, bad_shown) as bad:
            corpus.note(complete=False)

            def write(images: Sequence[ReadImage], routed: RoutingResult) -> None:
                _add(corpus, images, routed)
                bar.set_postfix_str(done.shares())
                bad.flush()

            embed_stream(encoding, _good(read, bad, bar), shard_rows, write, done, bar.unpause)
        if corpus.images:
            corpus.note(complete=True, images=corpus.images, bad=done.bad)
        done.total = corpus.images
    done.seconds = time.perf_counter() - start - done.warm_up_s
    done.duplicates, done.empty = paths.duplicates, list(paths.empty)
    return done


def _add(corpus: CorpusWriter, images: Sequence[ReadImage], routed: RoutingResult) -> None:
    corpus.add(
        routed.embeddings,
        {
            "path": [image.path for image in images],
            "sha256": [image.sha256 for image in images],
            "complexity": [None if np.isnan(score) else float(score) for score in routed.scores],
            "exit": routed.exits,
            "milliseconds": np.round(1000 * (np.array([image.seconds for image in images]) + routed.seconds), 3),
        },
    )


def _new(paths: ImagePaths, have: set[bytes], done: EmbeddingResult, bar: tqdm) -> Iterator[str]:
    """Absolute paths that the corpus lacks; the others are counted, but are not part of the images/s."""
    have = frozenset(have)  # of earlier runs: this one meets no path twice

    def passed() -> None:
        bar.initial += 1
        bar.update()

    for path in paths.each(passed):
        if path_key(path) in have:
            done.before += 1
            passed()
        else:
            yield os.path.abspath(path)


class _BadFiles:
    """bad.csv of a run, written as files turn up; gone where there are none."""

    def __init__(self, folder: Path, done: EmbeddingResult, shown: int):
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


def _good(items: Iterable[ReadImage | Bad], bad: _BadFiles, bar: tqdm) -> Iterator[ReadImage]:
    for item in items:
        bar.update()
        if isinstance(item, Bad):
            bad.add(item)
        else:
            yield item

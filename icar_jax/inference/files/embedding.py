"""Embeds image files into a corpus on disk, shard by shard; an interrupted run can be resumed."""

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
from icar_jax.inference.reading import BadFile, map_ordered, read_or_bad
from icar_jax.inference.router import RoutingResult

SHARD_ROWS = 4096


@dataclass
class EmbeddingResult(StreamResult):
    """Counts and timings of a run of `embed_files`.

    Attributes:
        images: embedded by this run; `before`: requested, but embedded by an earlier run; `total`: in the corpus now.
        exits: executed blocks -> images of this run.
        bad: number of files that could not be embedded; `first_bad` lists the first of them.
        duplicates, empty: as in ImagePaths.
        warm_up_s, seconds: wall time of compilation, and of everything else.
        stats: of the router, summed over the shards.
    """

    before: int = 0
    total: int = 0
    bad: int = 0
    first_bad: list[BadFile] = field(default_factory=list)
    duplicates: int = 0
    empty: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Summary text of the run: speed, fraction of images per exit, and time breakdown."""
        before = f"; {self.before:,} were already embedded" if self.before else ""
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
    """Embeds files into the corpus `out` with a progress bar; `icar_jax.inference.files.corpus` describes the format.

    Rows are in the order of `paths` and store absolute paths. Paths already in the corpus are skipped, even if the file has
    changed; unusable files are retried in every run. `milliseconds` of a row is the wall time of reading, decoding and
    resizing on its thread, plus its share of the device time of its batches. With `exit`, every image runs to that depth and
    none is scored; without it, a bundle routes and a plain CLIP runs full depth. `budget` as for `Model.encode_image`.

    Memory: about ten batches of pixels (read ahead, waiting for scores, for an exit, for the device), `shard_rows` embeddings,
    and about 80 bytes for each image in the corpus.
    Raises CorpusError for a corpus of another model or other options, and NoImages if `paths` contains no image.
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
        read = map_ordered(
            lambda path: read_or_bad(path, lambda path: read_image(path, encoding.preprocesses)),
            _not_embedded(paths, corpus.done, done, bar),
            ahead=2 * model.batch_size,
            threads=threads,
        )
        with bar, closing(read), _BadFiles(Path(out), done, bad_shown) as bad:
            corpus.update_manifest(complete=False)

            def write(images: Sequence[ReadImage], routed: RoutingResult) -> None:
                _add_shard(corpus, images, routed)
                bar.set_postfix_str(done.shares())
                bad.flush()

            embed_stream(encoding, _readable_images(read, bad, bar), shard_rows, write, done, bar.unpause)
        if corpus.images:
            corpus.update_manifest(complete=True, images=corpus.images, bad=done.bad)
        done.total = corpus.images
    done.seconds = time.perf_counter() - start - done.warm_up_s
    done.duplicates, done.empty, done.left_out = paths.duplicates, list(paths.empty), paths.left_out.report()
    return done


def _add_shard(corpus: CorpusWriter, images: Sequence[ReadImage], routed: RoutingResult) -> None:
    corpus.add_shard(
        routed.embeddings,
        {
            "path": [image.path for image in images],
            "sha256": [image.sha256 for image in images],
            "complexity": [None if np.isnan(score) else float(score) for score in routed.scores],
            "exit": routed.exits,
            "milliseconds": np.round(1000 * (np.array([image.seconds for image in images]) + routed.seconds), 3),
        },
    )


def _not_embedded(paths: ImagePaths, have: set[bytes], done: EmbeddingResult, bar: tqdm) -> Iterator[str]:
    """Yields absolute paths that are not in the corpus; the others are counted, but excluded from the images/s."""
    have = frozenset(have)  # from earlier runs; `paths` yields no path twice

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
    """Writes bad.csv during a run; removes an old one if no file was bad."""

    def __init__(self, folder: Path, done: EmbeddingResult, shown: int):
        self._path, self._done, self._shown = folder / BAD, done, shown
        self._file: TextIO | None = None

    def __enter__(self) -> _BadFiles:
        return self

    def add(self, bad: BadFile) -> None:
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
            self._path.unlink(missing_ok=True)  # from an earlier run


def _readable_images(items: Iterable[ReadImage | BadFile], bad: _BadFiles, bar: tqdm) -> Iterator[ReadImage]:
    for item in items:
        bar.update()
        if isinstance(item, BadFile):
            bad.add(item)
        else:
            yield item

"""Refinement of a store: images whose score requires a deeper exit than they were embedded at are embedded again.

The exit of each row is the only state: a refined row needs no more work. A run can therefore be interrupted and resumed at
any time, and searches see refined rows after each commit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import jax
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from icar_jax import checkpoint as ckpt
from icar_jax.checkpoint import CheckpointError
from icar_jax.data.images import Preprocess
from icar_jax.data.sources.files import STDIN, ImagePaths, vanished
from icar_jax.inference.files.stream import SCORE, ReadImage, StreamEncoder, StreamResult, embed_stream, read_image
from icar_jax.inference.model import Model
from icar_jax.inference.reading import BadFile, map_ordered, read_or_bad
from icar_jax.inference.router import RoutingResult, assign
from icar_jax.parallel import distributed
from icar_jax.search.index_result import IndexResult
from icar_jax.search.indexing import COMMIT_ROWS, IndexingError, index_files, open_or_create
from icar_jax.search.scan import FoundFile, is_below, process_share
from icar_jax.search.store import Store
from icar_jax.search.tables import now
from icar_jax.search.writing import ReadFile, image_rows


@dataclass
class RefineResult(StreamResult):
    """Counts and timings of a run of `refine`; counts are summed over processes.

    Attributes:
        images: embedded again, out of `wanted` rows whose score requires it; exits, warm_up_s, seconds, stats: as in
            StreamResult.
        deep: rows that were deep enough. unscored: rows without a score, which cannot be refined.
        gone: rows whose file is missing. changed: files whose content changed; `changes` is the result of indexing them.
        kept: rows written by another run in the meantime. bad, still_bad, first_bad, duplicates, empty: as in IndexResult.
        total: images in the store.
    """

    wanted: int = 0
    deep: int = 0
    unscored: int = 0
    gone: int = 0
    kept: int = 0
    changed: int = 0
    bad: int = 0
    still_bad: int = 0
    total: int = 0
    changes: IndexResult | None = None
    first_bad: list[BadFile] = field(default_factory=list)
    duplicates: int = 0
    empty: list[str] = field(default_factory=list)

    def report(self) -> str:
        """Summary text of the run."""
        rare = {
            "unscored, not refined": self.unscored, "missing": self.gone, "changed and indexed again": self.changed,
            "written by another run": self.kept, "bad": self.bad,
        }  # fmt: skip
        counts = [f"already deep enough {self.deep:,}", *(f"{what} {count:,}" for what, count in rare.items() if count)]
        return "\n".join(
            [f"Refined {self.images:,} of {self.wanted:,} images in {self.pace()}", *self.details(),
             f"  {', '.join(counts)}"]
        )  # fmt: skip


_SUMMED = ("images", "wanted", "deep", "unscored", "gone", "kept", "changed", "bad")


def refine(
    uri: str | os.PathLike,
    named: Sequence[str],
    checkpoint: str | os.PathLike | None,
    load: Callable[[str | os.PathLike], Model],
    *,
    order: str = "oldest",
    budget: float | None = None,
    commit_rows: int = COMMIT_ROWS,
    threads: int = 0,
    bad_shown: int = 20,
) -> RefineResult:
    """Embeds images of a store again if their stored score requires a deeper exit; scores are reused, exits only increase.

    Args:
        named: restrict to these files and folders; empty means the whole store.
        order: 'oldest' embeddings first, or images most often 'returned' by searches first.
        budget: use the thresholds of this budget instead of the bundle's.
        checkpoint, load: as for `index_files`; the model is loaded only if a row needs it.

    Files whose content changed are indexed again. Processes share the work as in `index_files`.
    Raises StoreError, and CheckpointError if the checkpoint is not a bundle.
    """
    store, model = open_or_create(uri, checkpoint, load, _no_store)
    where = os.fspath(checkpoint if checkpoint is not None else store.meta["checkpoint"])
    exits, thresholds = _read_routing(where)
    if budget is not None:
        thresholds = model().thresholds_for(budget)
    done, start = RefineResult(), time.perf_counter()
    roots = [os.path.abspath(os.path.expanduser(name)) for name in named]
    with distributed.together("refining"):
        mine = process_share(jax.process_index(), jax.process_count())
        wanted = _rows_to_refine(store, roots, mine, exits, thresholds, order, done)
        changed: list[str] = []
        if len(wanted):
            encoding = StreamEncoder(model(), budget=budget, known=True)
            _refine_rows(store, wanted, encoding, done, changed, commit_rows, threads)
    done.changed = len(changed)
    done.bad, done.first_bad = 0, []
    if distributed.total([len(changed)])[0]:
        done.changes = _index_changed(uri, changed, where, model, budget, commit_rows, threads, bad_shown)
        done.first_bad = done.changes.first_bad
    for name, value in zip(_SUMMED, distributed.total([getattr(done, name) for name in _SUMMED]), strict=True):
        setattr(done, name, int(value))
    if done.changes is not None:
        done.bad, done.still_bad = done.changes.bad, done.changes.still_bad
    done.share_exits(store.exits, distributed.total([done.exits[exit] for exit in store.exits]))
    if distributed.is_main():
        store.compact()
    done.seconds, done.total = time.perf_counter() - start - done.warm_up_s, store.count()
    return done


def _no_store() -> None:
    raise IndexingError("there is no store to refine; index a folder first")


def _read_routing(checkpoint: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    folder = ckpt.find(checkpoint)
    description = ckpt.describe(folder)
    if description["kind"] != "bundle":
        raise CheckpointError(f"{folder} is of kind {description['kind']!r}, but --pass refine needs a bundle")
    return tuple(description["routing"]["exits"]), tuple(description["routing"]["thresholds"])


def _rows_to_refine(
    store: Store, roots: Sequence[str], mine: Callable[[str], bool], exits: Sequence[int], thresholds: Sequence[float],
    order: str, done: RefineResult,
) -> pa.Table:  # fmt: skip
    """The rows whose score requires a deeper exit, in processing order."""
    state = store.state("embedded_at")
    if roots:
        state = state.filter(pa.array([is_below(path, roots) for path in state["path"].to_pylist()], pa.bool_()))
    state = state.filter(pa.array([mine(path) for path in state["path"].to_pylist()], pa.bool_()))
    scored = state.filter(state["complexity"].is_valid())
    done.unscored = len(state) - len(scored)
    needed = assign(scored["complexity"].to_numpy(), exits, thresholds)
    places = (map(store.depth_of, each.tolist()) for each in (needed, scored["exit"].to_numpy()))
    deeper = np.greater(*(np.fromiter(each, int, len(scored)) for each in places))
    rows = scored.filter(pa.array(deeper))
    done.wanted, done.deep = len(rows), len(scored) - len(rows)
    times = store.returned() if order == "returned" else {}
    rows = rows.append_column("times", pa.array([times.get(path, 0) for path in rows["path"].to_pylist()], pa.int64()))
    return rows.sort_by([("times", "descending"), ("embedded_at", "ascending"), ("path", "ascending")])


def _refine_rows(
    store: Store, rows: pa.Table, encoding: StreamEncoder, done: RefineResult, changed: list[str], commit_rows: int,
    threads: int,
) -> None:  # fmt: skip
    in_flight: dict[str, ReadFile] = {}
    bar = tqdm(total=len(rows), desc="refine", unit=" images", disable=not distributed.is_main())
    read = map_ordered(
        lambda row: _read_row(row, encoding.preprocesses),
        _iter_rows(rows),
        ahead=2 * encoding.model.batch_size,
        threads=threads,
    )

    def images() -> Iterator[ReadImage]:
        for file, row in read:
            bar.update()
            if file.found.size is None:
                done.gone += 1
            elif isinstance(file.result, BadFile) or file.result.sha256 != row["sha256"]:
                changed.append(file.found.path)
            else:
                image = file.result
                in_flight[image.path] = ReadFile(file.found, file.at, ReadImage(image.path, image.sha256, {}, image.seconds))
                yield ReadImage(image.path, image.sha256, {**image.pixels, SCORE: np.float32(row["complexity"])}, image.seconds)

    def write(images: Sequence[ReadImage], routed: RoutingResult) -> None:
        files = [in_flight.pop(image.path) for image in images]
        paths = [image.path for image in images]
        stored = {row["path"]: row for row in store.rows("path", paths, ["path", "sha256", "caption"]).to_pylist()}
        captions = [stored[path]["caption"] if path in stored else None for path in paths]
        # Skip rows that another run has removed or given other content in the meantime.
        still = [image.path in stored and stored[image.path]["sha256"] == image.sha256 for image in images]
        written = store.upsert(image_rows(files, routed, captions).filter(pa.array(still, pa.bool_())))
        done.kept += len(images) - int(written.sum())
        bar.set_postfix_str(done.shares())

    with bar, closing(read):
        embed_stream(encoding, images(), commit_rows, write, done, bar.unpause)


def _iter_rows(rows: pa.Table) -> Iterator[Mapping]:
    for batch in rows.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _read_row(row: Mapping, preprocesses: Mapping[str, Preprocess]) -> tuple[ReadFile, Mapping]:
    path, at = row["path"], now()
    try:
        stat = os.stat(path)
    except OSError as error:
        if vanished(path):
            return ReadFile(FoundFile(path, None, None, None), at, BadFile(path, "missing", True)), row
        return ReadFile(FoundFile(path, -1, -1, None), at, BadFile(path, error.strerror or str(error), True)), row
    known = lambda sha256: sha256 != row["sha256"]  # changed content is not decoded here
    result = read_or_bad(path, lambda path: read_image(path, preprocesses, known))
    return ReadFile(FoundFile(path, stat.st_size, stat.st_mtime_ns, None), at, result), row


def _index_changed(
    uri: str | os.PathLike, changed: Sequence[str], checkpoint: str, model: Callable[[], Model], budget: float | None,
    commit_rows: int, threads: int, bad_shown: int,
) -> IndexResult:  # fmt: skip
    """Indexes changed files with the same routing; a collective call, also for processes without changed files."""
    return index_files(
        uri, ImagePaths([STDIN], changed), checkpoint, lambda _: model(), budget=budget, rehash=True, retry_bad=True,
        may_be_empty=True, commit_rows=commit_rows, threads=threads, bad_shown=bad_shown,
    )  # fmt: skip

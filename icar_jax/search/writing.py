"""Commits of an indexing run: embedded images, copies of known content, unusable files and new captions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from icar_jax.data.images import Preprocess
from icar_jax.data.sources.files import vanished
from icar_jax.inference.files.stream import ReadImage, read_image
from icar_jax.inference.reading import BadFile, read_or_bad
from icar_jax.inference.router import RoutingResult
from icar_jax.search.captions import Captions
from icar_jax.search.scan import FoundFile, Scan, table_name
from icar_jax.search.store import Store
from icar_jax.search.tables import image_schema, now, vector_column

if TYPE_CHECKING:
    from icar_jax.search.index_result import IndexResult


@dataclass(frozen=True)
class ReadFile:
    """A scanned file, the time `at` which it was read, and its image or the reason it is unusable."""

    found: FoundFile
    at: datetime
    result: ReadImage | BadFile


def read_found(found: FoundFile, preprocesses: Mapping[str, Preprocess], is_known: Callable[[str], bool]) -> ReadFile:
    """Reads a file; called on threads. Content with `is_known(sha256)` is hashed but not decoded."""
    at = now()
    return ReadFile(found, at, read_or_bad(found.path, lambda path: read_image(path, preprocesses, is_known)))


def image_rows(files: Sequence[ReadFile], routed: RoutingResult, captions: Sequence[str | None]) -> pa.Table:
    """Rows of the table `images` for files, embeddings and captions in the same order."""
    read = [file.result for file in files]
    return pa.table(
        {
            "path": [file.found.path for file in files],
            "sha256": [image.sha256 for image in read],
            "size": [file.found.size for file in files],
            "mtime_ns": [file.found.mtime_ns for file in files],
            "caption": captions,
            "complexity": [None if np.isnan(score) else float(score) for score in routed.scores],
            "exit": routed.exits.tolist(),
            "milliseconds": 1000 * (np.array([image.seconds for image in read]) + routed.seconds),
            "embedded_at": [file.at for file in files],
            "vector": vector_column(routed.embeddings),
        }
    ).cast(image_schema(routed.embeddings.shape[1]))


class StoreWriter:
    """Commits the files of a scan as they are read and counts them in `done`.

    New content is embedded. Content of an existing row is copied with its vector, exit and score. If a file has the content
    of its own row, only its modification time is updated.
    """

    def __init__(
        self, store: Store, scan: Scan, captions: Captions | None, done: IndexResult, commit_rows: int, bad_shown: int
    ):
        self.store, self.scan, self.done = store, scan, done
        self._captions, self._commit_rows, self._bad_shown = captions, commit_rows, bad_shown
        self._in_flight: dict[str, ReadFile] = {}  # being embedded, by path
        self._in_flight_content: set[str] = set()
        self._contents: set[str] = set()  # embedded by this run
        self._copies: list[ReadFile] = []
        self._bad: list[ReadFile] = []
        self._retries: list[FoundFile] = []
        self._trusts_scan = True

    def is_known(self, sha256: str) -> bool:
        """Whether the content has a row or will get one in this run; called on several threads."""
        return sha256 in self._contents or (self._trusts_scan and self.scan.row_of_content(sha256) is not None)

    def to_embed(self, files: Iterable[ReadFile]) -> Iterator[ReadImage]:
        """Yields the images with new content; keeps all other files for a later commit."""
        for file in files:
            image, row = file.result, file.found.row
            if isinstance(image, BadFile):
                self._bad.append(file)
            elif row is not None and self.scan.value(row, "sha256") == image.sha256 and self._is_as_it_was(file):
                self.scan.unchanged.append(row)
            elif not image.pixels or image.sha256 in self._contents:
                self._copies.append(file)
            else:
                # Keep the file without its pixels, which only the model needs.
                self._in_flight[image.path] = ReadFile(
                    file.found, file.at, ReadImage(image.path, image.sha256, {}, image.seconds)
                )
                self._in_flight_content.add(image.sha256)
                self._contents.add(image.sha256)
                yield image
                continue
            if len(self._copies) >= self._commit_rows:
                self._copy()
            if len(self._bad) >= self._commit_rows:
                self._write_bad()

    def _is_as_it_was(self, file: ReadFile) -> bool:
        found, value = file.found, self.scan.value
        same = (value(found.row, "size"), value(found.row, "mtime_ns")) == (found.size, found.mtime_ns)
        return same and table_name(found.path) not in self.scan.bad

    def write(self, images: Sequence[ReadImage], routed: RoutingResult) -> None:
        """Commits embedded images and then all pending files."""
        files = [self._in_flight.pop(image.path) for image in images]
        changed = [file.found.path for file in files if file.found.row is not None]
        old = self.store.rows("path", changed, ["path", "caption"]).to_pylist()
        captions = {row["path"]: row["caption"] for row in old}
        rows = image_rows(files, routed, [self._caption(file.found.path, captions.get(file.found.path)) for file in files])
        self._commit(files, rows)
        self._in_flight_content -= {image.sha256 for image in images}
        self.finish()

    def finish(self) -> None:
        """Commits all pending files, except copies of content that is still being embedded."""
        self._copy()
        self._write_bad()

    def take_retries(self) -> list[FoundFile]:
        """Returns files whose row to copy from has been removed; they must be embedded, and the scan is no longer trusted."""
        retries, self._retries = self._retries, []
        if retries:
            self._trusts_scan, self._contents = False, set()
        return retries

    def recaption(self) -> None:
        """Updates the captions of unchanged rows from the caption file."""
        if self._captions is None:
            return
        for start in range(0, len(self.scan.unchanged), self._commit_rows):
            paths = [self.scan.value(row, "path") for row in self.scan.unchanged[start : start + self._commit_rows]]
            old = self.store.rows("path", paths, ["path", "caption"]).to_pylist()
            changed = [row["path"] for row in old if self._caption(row["path"], row["caption"]) != row["caption"]]
            rows = self.store.rows("path", changed)
            captions = pa.array([self._caption(path, None) for path in rows["path"].to_pylist()], pa.string())
            written = self.store.upsert(_with(rows, "caption", captions))
            self.done.captioned += int(written.sum())

    def _caption(self, path: str, old: str | None) -> str | None:
        new = self._captions.get(path) if self._captions is not None else None
        return old if new is None else new

    def _commit(self, files: Sequence[ReadFile], rows: pa.Table, copied: bool = False) -> None:
        written, existed = self.store.put(rows)
        done = self.done
        for file, was_written, had_row in zip(files, written.tolist(), existed.tolist(), strict=True):
            row = file.found.row
            if not was_written or (row is None and had_row):  # another run added it
                done.kept += 1
            elif row is not None and self.scan.value(row, "sha256") == file.result.sha256:
                done.touched += 1
            else:
                done.added += row is None
                done.updated += row is not None
                done.copied += copied
        self.store.clear_bad([name for file in files if (name := table_name(file.found.path)) in self.scan.bad])

    def _copy(self) -> None:
        ready = [file for file in self._copies if file.result.sha256 not in self._in_flight_content]
        if not ready:
            return
        self._copies = [file for file in self._copies if file.result.sha256 in self._in_flight_content]
        sources = self.store.rows("sha256", {file.result.sha256 for file in ready})
        best = _sources(sources)
        files: list[ReadFile] = []
        rows: list[int] = []
        for file in ready:
            source = best.get((file.result.sha256, file.found.path), best.get((file.result.sha256, None)))
            if source is None:
                self._retries.append(file.found)
            else:
                files.append(file)
                rows.append(source)
        if files:
            self._commit(files, self._copied(files, sources.take(pa.array(rows))), copied=True)

    def _copied(self, files: Sequence[ReadFile], sources: pa.Table) -> pa.Table:
        """The rows `sources`, one per file, with path, size, times and caption of these files."""
        paths = [file.found.path for file in files]
        own = {row["path"]: row["caption"] for row in self.store.rows("path", paths, ["path", "caption"]).to_pylist()}
        source_captions, source_paths = sources["caption"].to_pylist(), sources["path"].to_pylist()
        times = [
            then if path == source else file.at  # a file's own row keeps the time of its embedding
            for file, path, source, then in zip(files, paths, source_paths, sources["embedded_at"].to_pylist(), strict=True)
        ]
        # A caption follows a file that was moved, not one whose bytes are merely equal.
        moved = [caption if vanished(path) else None for caption, path in zip(source_captions, source_paths, strict=True)]
        captions = [self._caption(path, own.get(path) or caption) for path, caption in zip(paths, moved, strict=True)]
        columns: dict[str, Any] = {
            "path": paths, "size": [file.found.size for file in files], "mtime_ns": [file.found.mtime_ns for file in files],
            "embedded_at": times, "caption": captions,
        }  # fmt: skip
        for name, values in columns.items():
            sources = _with(sources, name, pa.array(values, sources.schema.field(name).type))
        return sources

    def _write_bad(self) -> None:
        if not self._bad:
            return
        rows = [
            {
                "path": file.result.file, "reason": file.result.reason,
                "size": None if file.result.unread else file.found.size,
                "mtime_ns": None if file.result.unread else file.found.mtime_ns,
            }
            for file in self._bad
        ]  # fmt: skip
        self.store.set_bad(rows)
        # A readable file that is no longer an image invalidates its row; an unreadable file may be unchanged.
        self.done.removed += self.store.delete(
            [file.found.path for file in self._bad if file.found.row is not None and not file.result.unread]
        )
        self.done.bad += len(self._bad)
        room = max(0, self._bad_shown - len(self.done.first_bad))
        self.done.first_bad += [file.result for file in self._bad[:room]]
        self._bad = []


def _sources(rows: pa.Table) -> dict[tuple[str, str | None], int]:
    """Row index by (sha256, path), and by (sha256, None) for the deepest row of that content, of a vanished file if equal."""
    best: dict[tuple[str, str | None], int] = {}
    depths: dict[str, tuple[int, bool]] = {}
    columns = (rows[name].to_pylist() for name in ("sha256", "path", "exit"))
    for i, (sha256, path, exit) in enumerate(zip(*columns, strict=True)):
        best[sha256, path] = i
        depth = exit, vanished(path)
        if sha256 not in depths or depth > depths[sha256]:
            best[sha256, None], depths[sha256] = i, depth
    return best


def _with(table: pa.Table, name: str, column: pa.Array) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)

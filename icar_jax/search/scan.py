"""Change detection: compares files with the rows of a store by size, modification time and content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from icar_jax.data.sources.files import vanished
from icar_jax.files.opening import open_regular


class Lookup:
    """Row indices of strings in a column; takes 16 bytes per row, where a dict takes about 200.

    A string that occurs several times gives one of its rows.
    """

    def __init__(self, column: pa.ChunkedArray):
        self._column = column
        hashes = np.fromiter((hash(text) for chunk in column.chunks for text in chunk.to_pylist()), np.int64, len(column))
        self._order = np.argsort(hashes, kind="stable")
        self._hashes = hashes[self._order]

    def __contains__(self, text: str) -> bool:
        return self.find(text) is not None

    def find(self, text: str) -> int | None:
        """The row index of a string; None if it is absent."""
        position = int(np.searchsorted(self._hashes, hash(text)))
        while position < len(self._hashes) and self._hashes[position] == hash(text):
            row = int(self._order[position])
            if self._column[row].as_py() == text:
                return row
            position += 1
        return None


@dataclass(frozen=True)
class FoundFile:
    """A file to read; `row` is its row in the store's state, None for a new path.

    `size` in bytes and `mtime_ns` are taken before the file is read, so the next run detects later writes. They are None if
    the file cannot be accessed.
    """

    path: str
    size: int | None
    mtime_ns: int | None
    row: int | None


class Scan:
    """Compares files with a snapshot of a store.

    Args:
        state: `Store.state`.
        bad: `Store.bad_rows`.
        rehash: read every file instead of trusting size and modification time.
        retry_bad: read unusable files again even if unchanged.
        mine: whether this process handles a path; other paths are skipped.

    Attributes:
        unchanged: row indices of files with the size and modification time of their row.
        still_bad: paths of unusable files that are unchanged.
        bad: {path: (size, mtime_ns)} of the unusable files.
    """

    def __init__(
        self,
        state: pa.Table,
        bad: pa.Table,
        *,
        rehash: bool = False,
        retry_bad: bool = False,
        mine: Callable[[str], bool] = lambda path: True,
    ):
        self.state, self._rehash, self._retry_bad, self._mine = state, rehash, retry_bad, mine
        self._paths, self._contents = Lookup(state["path"]), Lookup(state["sha256"])
        self._sizes, self._times = (state[name].fill_null(-1).to_numpy() for name in ("size", "mtime_ns"))
        self.bad = {row["path"]: (row["size"], row["mtime_ns"]) for row in bad.to_pylist()}
        self._met = np.zeros(len(state), bool)
        self._met_bad: set[str] = set()
        self.unchanged: list[int] = []
        self.still_bad: list[str] = []

    def to_read(self, paths: Iterable[str], passed: Callable[[], None] = lambda: None) -> Iterator[FoundFile]:
        """Yields files that are new or may have changed; `passed()` is called for all others, also of other processes."""
        for path in paths:
            path = os.path.abspath(path)
            if not self._mine(path):
                passed()
                continue
            found = self._look(path)
            if found is None:
                passed()
            else:
                yield found

    def _look(self, path: str) -> FoundFile | None:
        row = self._paths.find(path)
        if row is not None:
            self._met[row] = True
        name = table_name(path)
        self._met_bad.add(name) if name in self.bad else None
        try:
            stat = os.stat(path)
            size, mtime_ns = stat.st_size, stat.st_mtime_ns
        except (OSError, ValueError):
            size = mtime_ns = None
        if name in self.bad and not self._retry_bad and self._is_still_bad(path, name, size, mtime_ns):
            self.still_bad.append(name)
            return None
        if row is not None and size is None and vanished(path):
            self._met[row] = False  # a given path that does not exist counts as gone
            return None
        same = row is not None and name not in self.bad and (self._sizes[row], self._times[row]) == (size, mtime_ns)
        if same and not self._rehash:
            self.unchanged.append(row)
            return None
        return FoundFile(path, size, mtime_ns, row)

    def _is_still_bad(self, path: str, name: str, size: int | None, mtime_ns: int | None) -> bool:
        if self.bad[name] != (size, mtime_ns) and self.bad[name] != (None, None):
            return False
        if self.bad[name] != (None, None):
            return True
        try:  # it could not be read; try again, since a change of permissions does not change the modification time
            with open_regular(path) as file:
                file.read(1)
        except OSError:
            return True
        return False

    def row_of_content(self, sha256: str) -> int | None:
        """Index of a row with this content; None if there is none."""
        return self._contents.find(sha256)

    def value(self, row: int, column: str) -> object:
        """The value of a cell of the state."""
        return self.state[column][row].as_py()

    def gone(self, roots: Sequence[str]) -> list[str]:
        """Paths of the store at or below `roots` that were not found; call it after all of `to_read`."""
        rows = np.flatnonzero(~self._met)
        paths = self.state["path"].take(pa.array(rows)).to_pylist()
        return [path for path in paths if self._mine(path) and is_below(path, roots)]

    def bad_gone(self, roots: Sequence[str]) -> list[str]:
        """Paths of unusable files at or below `roots` that were not found; call it after all of `to_read`."""
        return [name for name in self.bad if name not in self._met_bad and self._mine(name) and is_below(name, roots)]


def is_below(path: str, roots: Sequence[str]) -> bool:
    """Whether an absolute path equals or is below one of `roots`, which are absolute."""
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


def table_name(path: str) -> str:
    """A path as stored in tables: bytes that are not valid UTF-8, and NUL, become backslash escapes."""
    return path.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def process_share(process: int, processes: int) -> Callable[[str], bool]:
    """A predicate: whether a path belongs to `process` of `processes`, by its hash, so it is stable between runs."""
    if processes == 1:
        return lambda path: True

    def mine(path: str) -> bool:
        return int.from_bytes(hashlib.blake2b(table_name(path).encode(), digest_size=8).digest()) % processes == process

    return mine

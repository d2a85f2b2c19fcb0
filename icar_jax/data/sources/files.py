"""Image paths from files, folders, glob patterns and lists; folders are walked lazily and paths are not stored."""

from __future__ import annotations

import errno
import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from icar_jax.config import require_local
from icar_jax.data.images import decode
from icar_jax.data.records import Record, Source
from icar_jax.data.sources.folders import IMAGE_SUFFIXES
from icar_jax.errors import DataError

STDIN = "-"


class NoImages(DataError):
    """No image files were found under the given names."""


class ImagePaths:
    """Iterates over image files in the given order, each path once; every iteration walks the disk again.

    Args:
        named: files (any suffix), folders (walked recursively and sorted by name, image suffixes only, without hidden
            folders), patterns with *, ? or [ ] (sorted), and '-' for `lines`. An existing name is never treated as a pattern;
            a missing one is yielded, so that opening it reports the error.
        lines: paths for '-': files and folders, one per line, without patterns; read once, as a stream.

    Attributes:
        duplicates: number of duplicate paths skipped by the current or last iteration.
        empty: folders and patterns without image files, in the current or last iteration.
        folders: folders walked in the current or last iteration, as named, listed or matched.

    Unreadable folders are yielded as paths, as in `walk`.
    """

    def __init__(self, named: Sequence[str], lines: Iterable[str] = ()):
        self.named, self._lines = [os.fspath(name) for name in named], lines
        for name in self.named:
            require_local("PATH", name)
        self.duplicates = 0
        self.empty: list[str] = []
        self.folders: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self.each()

    def each(self, duplicate: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yields the paths; calls `duplicate()` for each skipped duplicate, so that progress over `count()` completes."""
        self.duplicates, self.empty, self.folders = 0, [], []
        # Store 16-byte hashes, which take several times less memory than the paths.
        seen: set[bytes] = set()
        for path in self._all():
            key = hashlib.blake2b(os.fsencode(os.path.abspath(path)), digest_size=16).digest()
            if key in seen:
                self.duplicates += 1
                duplicate()
            else:
                seen.add(key)
                yield path
        if not seen:
            listed = ", ".join(self.named) or "nothing"
            suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
            raise NoImages(f"no image file found: looked in {listed} for files that end in {suffixes}; pass a folder or files")

    def count(self) -> int | None:
        """Counts the paths, duplicates included, in a separate walk; None if a list must still be read from `lines`."""
        if STDIN in self.named:
            return None
        said = self.empty, self.folders
        self.empty, self.folders = [], []
        try:
            return sum(1 for _ in self._all())
        finally:
            self.empty, self.folders = said

    def _all(self) -> Iterator[str]:
        for name in self.named:
            if name == STDIN:
                for line in self._lines:
                    if line := line.rstrip("\r\n"):
                        yield from self._below(line)
            elif not os.path.lexists(name) and glob.has_magic(name):
                yield from self._matches(name)
            else:
                yield from self._below(os.path.expanduser(name))

    def _matches(self, pattern: str) -> Iterator[str]:
        matches = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
        if not matches:
            self.empty.append(pattern)
        for match in matches:
            if "**" not in pattern or not os.path.isdir(match):
                yield from self._below(match)
            elif unlisted(match) is not None:  # ** also matches files below readable folders; report unreadable ones
                yield match

    def _below(self, path: str) -> Iterator[str]:
        if not os.path.isdir(path):
            yield path
            return
        self.folders.append(path)
        none = True
        for file in walk(path):
            none = False
            yield file
        if none:
            self.empty.append(path)


def walk(folder: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yields image files in and below a folder, sorted by name; follows links, except cycles.

    Holds the names of one folder per depth in memory. For an unreadable folder it yields the folder's path, so that opening it
    reports the error while the other folders are still used.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((e.name, is_folder) for e in entries if (is_folder := _is_folder(e)) or _is_image(e.name))
    except OSError:
        yield folder
        return
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if not is_folder:
            yield path
        elif not name.startswith("."):
            yield from walk(path, above | {real})


def unlisted(folder: str) -> str | None:
    """Returns why a folder cannot be listed; None if it can, or if the path is not a folder."""
    try:
        os.scandir(folder).close()
    except NotADirectoryError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    return None


def vanished(path: str) -> bool:
    """Returns whether a path no longer exists; False if this cannot be determined, for example without permission."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return False


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to an inaccessible place, which `walk` reports, or (ELOOP) a link to itself
        return error.errno != errno.ELOOP


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


class ImageFiles(Source):
    """Source of the images named by files, folders and patterns (see `ImagePaths`), each once, without captions.

    Raises NoImages if a folder or pattern contains no images.
    """

    def __init__(self, named: Sequence[str]):
        paths = ImagePaths(named)
        self.name, self.names = " ".join(named), list(paths)
        if paths.empty:
            raise NoImages(f"no image file in {', '.join(paths.empty)}; pass another folder or pattern")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        return Record(self.names[i], functools.partial(decode, self.names[i]), ())

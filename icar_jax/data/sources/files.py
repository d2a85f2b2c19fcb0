"""Image paths from files, folders, glob patterns and lists; folders are walked lazily and paths are not stored."""

from __future__ import annotations

import functools
import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from icar_jax.config import require_local
from icar_jax.data.images import decode
from icar_jax.data.records import Record, Source
from icar_jax.errors import DataError, require_list
from icar_jax.files.formats import IMAGE_SUFFIXES
from icar_jax.files.walk import LeftOut, Walk

STDIN = "-"


class NoImages(DataError):
    """No image files were found under the given names."""


class ImagePaths:
    """Iterates over image files in the given order, each path once; every iteration walks the disk again.

    Args:
        named: files (any suffix), folders (as `icar_jax.files.walk.Walk.images`), patterns with *, ? or [ ] (sorted), and '-'
            for `lines`. An existing name is never treated as a pattern; a missing one is yielded, so that opening it reports
            the error.
        lines: paths for '-': files and folders, one per line, without patterns; read once, as a stream.
        exclude: patterns as for `Walk`; named and listed files are never excluded.

    Attributes:
        duplicates: number of duplicate paths skipped by the current or last iteration.
        empty: folders and patterns without image files, in the current or last iteration.
        folders: folders walked in the current or last iteration, as named, listed or matched.
        left_out: what these walks left out.

    Unreadable folders are yielded as paths.
    """

    def __init__(self, named: Sequence[str], lines: Iterable[str] = (), exclude: Sequence[str] = ()):
        require_list("the files and folders", named)
        self.named, self._lines, self._exclude = [os.fspath(name) for name in named], lines, tuple(exclude)
        self._walk = Walk(self._exclude)
        for name in self.named:
            require_local("PATH", name)
        self.duplicates = 0
        self.empty: list[str] = []
        self.folders: list[str] = []

    @property
    def left_out(self) -> LeftOut:
        return self._walk.left_out

    def __iter__(self) -> Iterator[str]:
        return self.each()

    def each(self, duplicate: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yields the paths; calls `duplicate()` for each skipped duplicate, so that progress over `count()` completes."""
        self.duplicates, self.empty, self.folders, self._walk = 0, [], [], Walk(self._exclude)
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
            left = self.left_out.report()
            raise NoImages(
                f"no image file found: looked in {listed} for files that end in {suffixes}; pass a folder or files"
                + (f". {left}" if left else "")
            )

    def count(self) -> int | None:
        """Counts the paths, duplicates included, in a separate walk; None if a list must still be read from `lines`."""
        if STDIN in self.named:
            return None
        said = self.empty, self.folders, self._walk
        self.empty, self.folders, self._walk = [], [], Walk(self._exclude)
        try:
            return sum(1 for _ in self._all())
        finally:
            self.empty, self.folders, self._walk = said

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
        pattern = os.path.expanduser(pattern)
        if "**" in pattern.split("/"):
            matches: Iterable[str] = self._walk.matches(pattern)
        else:
            matches = (path for path in sorted(glob.glob(pattern)) if os.path.isdir(path) or not self._walk.excludes(path))
        none = True
        for match in matches:
            none = False
            if os.path.isdir(match) and unlisted(match) is None:
                yield from self._below(match)
            else:
                yield match
        if none:
            self.empty.append(pattern)

    def _below(self, path: str) -> Iterator[str]:
        if not os.path.isdir(path):
            yield path
            return
        self.folders.append(path)
        none = True
        for file in self._walk.images(path):
            none = False
            yield file
        if none:
            self.empty.append(path)


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

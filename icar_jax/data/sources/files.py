"""Paths of images as a person names them: files, folders, patterns and lists; walked while they are used, never held."""

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
    """Nothing that was named is, or holds, an image file."""


class ImagePaths:
    """Image files in the order named, each path once; iterating walks the disk anew.

    Args:
        named: files (taken whatever their suffix), folders (walked with all below them, image suffixes only, in order of their
            names, hidden folders left out), patterns with *, ? or [ ] (sorted), and '-' for `lines`. A name that exists is no
            pattern, and one that does not exist is handed on, to be reported by whoever opens it.
        lines: what '-' stands for: files and folders, one a line, without patterns; read once and as they come.

    Attributes:
        duplicates: paths met again and left out, by the iteration in progress or the last one.
        empty: folders and patterns that gave no image file, likewise.
        folders: those that were walked, as they were named or listed, or as a pattern gave them; likewise.

    A folder that cannot be read is handed on too, in its place, as `walk` does.
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
        """The paths; `duplicate()` is called for each that is left out, so that a bar over `count()` reaches its end."""
        self.duplicates, self.empty, self.folders = 0, [], []
        # 16 bytes a path find the duplicates among millions; the paths themselves would take several times as much.
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
            raise NoImages(f"no image file found: looked in {listed} for files that end in {suffixes}; name a folder or files")

    def count(self) -> int | None:
        """Number of paths, duplicates included, from a walk of its own; None where a list is still to be read."""
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
            elif unlisted(match) is not None:  # ** has matched the files below a folder too, but says nothing of others
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
    """Image files in and below a folder, in order of their names; links are followed, but never round in a circle.

    Holds the names of one folder at each depth. A folder that cannot be read gives its own path, to be reported by whoever
    opens it as a file: one of them is no reason to leave out the others.
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
    """Why the names in a folder cannot be had; None where they can, and for what is no folder."""
    try:
        os.scandir(folder).close()
    except NotADirectoryError:
        return None
    except OSError as error:
        return error.strerror or str(error)
    return None


def vanished(path: str) -> bool:
    """Whether nothing is at a path any more. What cannot be looked at, as its folder cannot be read, has not vanished."""
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
    except OSError as error:  # a link to where this user cannot look, which `walk` finds again; or one to itself
        return error.errno != errno.ELOOP


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


class ImageFiles(Source):
    """The images that files, folders and patterns name (see `image_paths.ImagePaths`), each once, without captions.

    Raises NoImages where one of them names none.
    """

    def __init__(self, named: Sequence[str]):
        paths = ImagePaths(named)
        self.name, self.names = " ".join(named), list(paths)
        if paths.empty:
            raise NoImages(f"no image file in {', '.join(paths.empty)}; name another folder or pattern")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Record:
        return Record(self.names[i], functools.partial(decode, self.names[i]), ())

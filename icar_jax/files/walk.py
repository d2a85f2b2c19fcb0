"""One walk of image folders for all programs: sorted, lazy, each real folder once, and counts of what it leaves out."""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from icar_jax.files.formats import IMAGE_SUFFIXES, UNREAD_SUFFIXES

# Folders in which NAS and desktop systems keep thumbnails, deleted files and snapshots; names with a dot are hidden anyway.
SYSTEM_FOLDERS = frozenset(
    {"@eadir", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "$recycle.bin", "system volume information"}
    | {"lost+found", "__macosx"}
)


@dataclass
class LeftOut:
    """What walks left out.

    Attributes:
        hidden: images whose name starts with a dot. folders: hidden folders and those of SYSTEM_FOLDERS, not looked into.
        excluded: images and folders that match an exclusion. again: folders that were visited before under another name.
        unread: suffix -> number of images of formats that are not read.
    """

    hidden: int = 0
    folders: int = 0
    excluded: int = 0
    again: int = 0
    unread: Counter = field(default_factory=Counter)

    def report(self) -> str:
        """One line of counts; empty if nothing was left out."""
        parts = {
            "hidden images": self.hidden, "hidden and system folders": self.folders, "excluded by --exclude": self.excluded,
            "folders reached again by links": self.again,
        }  # fmt: skip
        counts = [f"{n:,} {what}" for what, n in parts.items() if n]
        counts += [f"{n:,} {suffix} (a format that is not read)" for suffix, n in sorted(self.unread.items())]
        return f"Left out: {', '.join(counts)}" if counts else ""


class Walk:
    """Walks folders and patterns; use one for all that a program is given.

    Args:
        exclude: glob patterns. One without a slash is compared with each name, one with a slash with the path below the walked
            folder; a matching folder is not looked into.

    Attributes:
        left_out: counts of all walks so far.
    """

    def __init__(self, exclude: Sequence[str] = ()):
        self._exclude = [(pattern.strip("/"), "/" in pattern.strip("/")) for pattern in exclude]
        self.left_out = LeftOut()

    def images(self, folder: str) -> Iterator[str]:
        """Yields image files in and below a folder, sorted by name.

        A folder that several names lead to is visited once, under its own name if that lies below `folder`: links to folders
        come after the folders, in the order of names. For an unreadable folder it yields the folder's path, so that opening it
        reports the error. Memory: the names of one folder for each depth, and some 100 bytes for each folder.
        """
        return self._files(folder, lambda name, path: is_image(name))

    def matches(self, pattern: str) -> Iterator[str]:
        """Yields the files that match a glob with **, walked as in `images`, and unreadable folders."""
        base = next(part for part in _parents(pattern) if "**" not in part and not _MAGIC.search(part))
        pieces = [piece for piece in pattern[len(base) :].split("/") if piece]
        start = base or "."
        cut = len(os.path.join(start, ""))

        def fits(name: str, path: str) -> bool:
            return _fits(path[cut:].split("/"), pieces)

        for path in self._files(start, fits):
            yield path if base else path.removeprefix("./")

    def _files(self, folder: str, wanted) -> Iterator[str]:
        seen: set[tuple[int, int]] = set()
        links: list[str] = [folder]
        cut = len(os.path.join(folder, ""))
        # Real folders first: a stack of iterators, so depth costs no recursion; then links to folders, one after the other.
        while links:
            waiting, links = links, []
            for start in waiting:
                stack = [iter([(start, True)])]
                while stack:
                    path, is_folder = next(stack[-1], (None, False))
                    if path is None:
                        stack.pop()
                    elif not is_folder:
                        yield path
                    elif (found := self._listed(path, seen, links, cut, wanted)) is None:
                        yield path
                    else:
                        stack.append(iter(found))

    def _listed(self, folder: str, seen: set, links: list[str], cut: int, wanted) -> list[tuple[str, bool]] | None:
        """Sorted (path, is folder) of a folder, its links to folders appended to `links`; None if it cannot be listed."""
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                self.left_out.again += 1
                return []
            with os.scandir(folder) as entries:
                found = sorted(((entry.name, *_kind(entry)) for entry in entries), key=lambda each: each[0])
        except OSError as error:
            return [] if error.errno == _LOOP else None
        seen.add((status.st_dev, status.st_ino))
        kept = []
        for name, is_folder, is_link in found:
            path = os.path.join(folder, name)
            if is_folder:
                if name.startswith(".") or name.lower() in SYSTEM_FOLDERS:
                    self.left_out.folders += 1
                elif self._excluded(name, path[cut:]):
                    self.left_out.excluded += 1
                elif is_link:
                    links.append(path)
                else:
                    kept.append((path, True))
            elif not wanted(name, path):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in UNREAD_SUFFIXES and not name.startswith("."):
                    self.left_out.unread[suffix] += 1
            elif name.startswith("."):
                self.left_out.hidden += 1
            elif self._excluded(name, path[cut:]):
                self.left_out.excluded += 1
            else:
                kept.append((path, False))
        return kept

    def excludes(self, path: str) -> bool:
        """Whether a file that no walk found is excluded; counts it then."""
        found = self._excluded(os.path.basename(path), path)
        self.left_out.excluded += found
        return found

    def _excluded(self, name: str, below: str) -> bool:
        return any(fnmatch.fnmatchcase(below if with_path else name, pattern) for pattern, with_path in self._exclude)


_MAGIC = re.compile(r"[*?\[]")
_LOOP = 40  # ELOOP, of a link to itself


def is_image(name: str) -> bool:
    """Whether a name has the suffix of a format that is read."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _kind(entry: os.DirEntry) -> tuple[bool, bool]:
    """(is a folder, is a link)."""
    try:
        return entry.is_dir(), entry.is_symlink()
    except OSError as error:  # a link to an inaccessible place, which is reported when listed, or to itself
        return error.errno != _LOOP, True


def _parents(pattern: str) -> Iterator[str]:
    while pattern:
        parent = os.path.dirname(pattern)
        yield parent
        if parent == pattern:
            return
        pattern = parent
    yield ""


def _fits(names: Sequence[str], pieces: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a pattern, in which ** stands for any number of folders."""

    def reached(states: set[int]) -> set[int]:
        for state in sorted(states):
            while state < len(pieces) and pieces[state] == "**":
                state += 1
                states.add(state)
        return states

    states = reached({0})
    for name in names:
        after = {s for s in states if s < len(pieces) and pieces[s] == "**"}
        after |= {s + 1 for s in states if s < len(pieces) and fnmatch.fnmatchcase(name, pieces[s])}
        states = reached(after)
    return len(pieces) in states

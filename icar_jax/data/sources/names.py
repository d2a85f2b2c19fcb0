"""File names in captions and ratings, matched with files that spell them another way; and text without half characters."""

from __future__ import annotations

import functools
import os
import posixpath
import re
import unicodedata
from collections.abc import Collection

_HALVES = re.compile("[\ud800-\udfff]")


def plain_text(text: str) -> str:
    """Text with U+FFFD for lone surrogates, which no file and no tokenizer takes; a cut emoji leaves one."""
    return _HALVES.sub("\ufffd", text)


def plain_name(name: str) -> str:
    """A relative name with one spelling of accents (NFC) and of separators (/)."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


class FileNames:
    """Finds the file that a name means.

    Args:
        found: relative POSIX paths of known files.
        folder: their folder, in which other existing files are found too.
    """

    def __init__(self, found: Collection[str], folder: str | os.PathLike):
        self._found, self._folder = found, os.fspath(folder)

    def find(self, name: str) -> str | None:
        """The relative path of the file: of this name, else with other accents or separators, else any file that exists."""
        exact = posixpath.normpath(name)
        if exact in self._found:
            return exact
        plain = plain_name(name)
        if (found := self._plain.get(plain)) is not None:
            return found
        for each in (exact, plain):  # hidden, or of another suffix: decoding says what is wrong with it
            if not each.startswith(("../", "/")) and os.path.isfile(os.path.join(self._folder, each)):
                return each
        return None

    def near(self, name: str) -> str | None:
        """A file whose name differs in upper and lower case only; None without one."""
        return self._folded.get(plain_name(name).casefold())

    def named(self, name: str) -> str:
        """The name for a message, with the file of `near`."""
        near = self.near(name)
        return name if near is None else f"{name} (there is {near}, which differs in upper and lower case)"

    @functools.cached_property
    def _plain(self) -> dict[str, str]:
        return {plain_name(name): name for name in sorted(self._found)}

    @functools.cached_property
    def _folded(self) -> dict[str, str]:
        return {plain.casefold(): name for plain, name in self._plain.items()}

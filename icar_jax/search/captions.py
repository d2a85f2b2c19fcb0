"""Captions of a file for the images of a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from icar_jax.data.sources.folders import read_captions
from icar_jax.search.scan import is_below


class Captions:
    """Captions by the path of an image: its name as the file of captions gives it, below one of some folders.

    Args:
        where: Karpathy's JSON, a .csv or a .jsonl, as training reads them.
        folders: where the images are, besides the folder that the layout of `where` implies.

    Attributes:
        used: how many images were asked for that have a caption.
    """

    def __init__(self, where: str | os.PathLike, folders: Sequence[str] = ()):
        folder, self._captions = read_captions(where)
        self.where = Path(where)
        self._folders = list(dict.fromkeys([str(folder), *folders]))
        self.used = 0

    def get(self, path: str) -> str | None:
        """All captions of an image by its absolute path, one a line; None where there is none."""
        names = [os.path.relpath(path, folder) for folder in self._folders if is_below(path, [folder])]
        found = next((self._captions[name] for name in (*names, path) if name in self._captions), None)
        self.used += found is not None
        return None if found is None else "\n".join(found)

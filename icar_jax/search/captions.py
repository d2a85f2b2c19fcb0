"""Captions from a file for the images of a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from icar_jax.data.sources.folders import read_captions
from icar_jax.search.scan import is_below


class Captions:
    """Looks up captions by image path; names in the caption file are relative to one of several folders.

    Args:
        where: caption file as for training: Karpathy JSON, .csv or .jsonl.
        folders: image folders, in addition to the one implied by the layout of `where`.

    Attributes:
        used: number of lookups that found a caption.
    """

    def __init__(self, where: str | os.PathLike, folders: Sequence[str] = ()):
        folder, self._captions = read_captions(where)
        self.where = Path(where)
        self._folders = list(dict.fromkeys([str(folder), *folders]))
        self.used = 0

    def get(self, path: str) -> str | None:
        """All captions of the image at an absolute path, one per line; None without captions."""
        names = [os.path.relpath(path, folder) for folder in self._folders if is_below(path, [folder])]
        found = next((self._captions[name] for name in (*names, path) if name in self._captions), None)
        self.used += found is not None
        return None if found is None else "\n".join(found)

"""Captions from a file for the images of a store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from icar_jax.data.sources.caption_files import Columns
from icar_jax.data.sources.folders import read_captions
from icar_jax.data.sources.names import plain_name
from icar_jax.search.scan import is_below

_NEAR_KEPT = 100


class Captions:
    """Looks up captions by image path; names in the caption file are relative to one of several folders.

    Args:
        where: caption file as for training, or a folder with a text beside each image.
        folders: image folders, in addition to the one implied by the layout of `where`.
        columns: columns of a table.

    Attributes:
        used: number of lookups that found a caption.
        near: (path, name in the caption file) of the first images whose names differ in upper and lower case only.
    """

    def __init__(self, where: str | os.PathLike, folders: Sequence[str] = (), columns: Columns = Columns()):
        folder, self._captions = read_captions(where, columns)
        self._plain = {plain_name(name): captions for name, captions in self._captions.items()}
        self._folded = {name.casefold(): name for name in self._plain}
        self.where, self.near = Path(where), []
        self._folders = list(dict.fromkeys([str(folder), *folders]))
        self.used = 0

    def get(self, path: str) -> str | None:
        """All captions of the image at an absolute path, one per line; None without captions."""
        names = [os.path.relpath(path, folder) for folder in self._folders if is_below(path, [folder])]
        found = next((self._captions[name] for name in (*names, path) if name in self._captions), None)
        if found is None:
            found = next((self._plain[plain] for plain in map(plain_name, (*names, path)) if plain in self._plain), None)
        if found is None and len(self.near) < _NEAR_KEPT:
            folded = (self._folded.get(plain_name(name).casefold()) for name in names)
            self.near += [(path, near) for near in folded if near is not None][:1]
        self.used += found is not None
        return None if found is None else "\n".join(found)

    def said_of_case(self) -> str | None:
        """A sentence on captions that were not used since upper and lower case differ; None without any."""
        if not self.near:
            return None
        path, name = self.near[0]
        more = "" if len(self.near) == 1 else f"; {len(self.near)} or more files differ so"
        return f"{self.where}: {name} is not the file {path}: upper and lower case differ{more}"

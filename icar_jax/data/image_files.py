"""Image files as a source of records, where nothing but the pictures is known."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from icar_jax.data.image_paths import ImagePaths, NoImages
from icar_jax.data.images import decode
from icar_jax.data.records import Record


class ImageFiles:
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

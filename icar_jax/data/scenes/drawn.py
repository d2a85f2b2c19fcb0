"""Pictures of scenes that are drawn once and then read: for runs that see the same scenes again, or one after the other.

A folder holds two files for each split, seed and size: the pixels of every scene at its place, and a checksum each, zero where
a scene was not drawn yet. Both grow as scenes are asked for. Several processes may fill them: all write the same bytes.
"""

from __future__ import annotations

import zlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from icar_jax.data.records import Record
from icar_jax.data.scenes.dataset import Scenes

_WITNESSES = 2  # scenes whose pixels name the files, so that another way of drawing never meets old pictures


class DrawnScenes:
    """`scenes` with the same records in the same order, whose pictures are kept in `folder`.

    A picture that was only half written, or damaged on the disk, is noticed and drawn again.

    Raises:
        OSError: the folder cannot be written. The files are sparse: they take what has been drawn, 3 S^2 bytes a scene.
    """

    def __init__(self, scenes: Scenes, folder: Path) -> None:
        self.scenes, self.folder, self.name = scenes, Path(folder), scenes.name
        self._open: tuple[np.ndarray, np.ndarray] | None = None
        self._files()

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> Record:
        record = self.scenes[i]
        return Record(record.name, partial(self._picture, int(i), record), record.captions, record.complexity, record.labels)

    def __getstate__(self):
        return self.__dict__ | {"_open": None}  # worker processes map the files themselves

    def _picture(self, i: int, record: Record) -> Image.Image:
        pixels, sums = self._files()
        kept = pixels[i].tobytes()
        if not sums[i] or sums[i] != _checksum(kept):
            drawn = np.asarray(record.image())
            pixels[i] = drawn
            sums[i] = _checksum(drawn.tobytes())
            return Image.fromarray(drawn)
        return Image.frombytes("RGB", pixels.shape[1:3], kept)

    def _files(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, S, S, 3] and uint32 [N], both mapped and shared with other processes."""
        if self._open is None:
            s = self.scenes
            witnesses = b"".join(np.asarray(s[i].image()).tobytes() for i in range(min(_WITNESSES, len(s))))
            stem = f"{s.split}-seed{s.seed}-{len(s)}x{s.image_size}-{zlib.crc32(witnesses):08x}"
            self.folder.mkdir(parents=True, exist_ok=True)
            shape = (len(s), s.image_size, s.image_size, 3)
            self._open = _mapped(self.folder / f"{stem}.u8", np.uint8, shape), _mapped(
                self.folder / f"{stem}.crc32", np.uint32, shape[:1]
            )
        return self._open


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with open(path, "ab") as file:
        if file.tell() != size:
            file.truncate(size)  # zeros that take no room; another process may do the same
    return np.memmap(path, dtype, "r+", shape=shape)


def _checksum(pixels: bytes) -> int:
    return zlib.crc32(pixels) or 1  # zero says that nothing is there

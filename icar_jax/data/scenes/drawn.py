"""Cache of rendered scenes on disk, for repeated epochs or several runs on the same scenes.

The folder holds two files per split, seed and size: the pixels of every scene, and a checksum per scene, zero if the scene is
not rendered yet. Both fill up as scenes are read. Several processes may fill them, since all write the same bytes.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import zlib
from functools import partial
from pathlib import Path

from PIL import Image

from icar_jax.data.records import Record, Source
from icar_jax.data.scenes.dataset import Scenes

_WARNING = threading.Lock()
_FINGERPRINTED = 64  # scenes whose pixels are hashed into the file names, so that a new renderer never uses old images


class DrawnScenes(Source):
    """The records of `scenes` in the same order, with images cached in `folder`.

    Incomplete or damaged images are detected by checksum and rendered again. If the disk is full or fails, the remaining
    images are rendered without caching, with one warning. The files are sparse: 3 S^2 bytes per rendered scene.

    Raises:
        OSError: the folder or its files cannot be created.
    """

    def __init__(self, scenes: Scenes, folder: Path) -> None:
        self.scenes, self.folder, self.name = scenes, Path(folder), scenes.name
        self._open: tuple[_File, _File] | None = None
        self._failed = False
        self._files()

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> Record:
        record = self.scenes[i]
        return Record(record.name, partial(self._picture, int(i), record), record.captions, record.complexity, record.labels)

    def __getstate__(self):
        return self.__dict__ | {"_open": None}  # worker processes open the files themselves

    def _picture(self, i: int, record: Record) -> Image.Image:
        if self._failed:
            return record.image()
        drawn = None
        try:
            pixels, sums = self._files()
            kept = pixels.read(i)
            if sums.read(i) == _checksum(kept):
                return Image.frombytes("RGB", (self.scenes.image_size,) * 2, kept)
            drawn = record.image()
            kept = drawn.tobytes()
            pixels.write(i, kept)
            sums.write(i, _checksum(kept))
        except OSError as error:
            with _WARNING:  # several threads may fail at once
                if not self._failed:
                    message = "%s: %s; scenes are rendered and no longer cached there (config.data.scenes_kept)"
                    logging.warning(message, self.folder, error)
                self._failed = True
        return drawn or record.image()

    def _files(self) -> tuple[_File, _File]:
        """Opens (pixel file, checksum file)."""
        if self._open is None:
            s = self.scenes
            pixels = b"".join(s[i].image().tobytes() for i in range(min(_FINGERPRINTED, len(s))))
            stem = f"{s.split}-seed{s.seed}-{len(s)}x{s.image_size}-{zlib.crc32(pixels):08x}"
            self.folder.mkdir(parents=True, exist_ok=True)
            sizes = {"u8": 3 * s.image_size**2, "crc32": 4}
            self._open = tuple(_File(self.folder / f"{stem}.{end}", size, len(s)) for end, size in sizes.items())
        return self._open


class _File:
    """A file of `count` entries of `size` bytes, initially zero, which several threads and processes read and write."""

    def __init__(self, path: Path, size: int, count: int) -> None:
        self._size, self._path = size, path
        with open(path, "ab") as file:
            if file.tell() != size * count:
                file.truncate(size * count)  # sparse zeros; another process may do the same
        self._file = open(path, "r+b", buffering=0)

    def read(self, i: int) -> bytes:
        return os.pread(self._file.fileno(), self._size, i * self._size)

    def write(self, i: int, entry: bytes) -> None:
        # Not through a memory map, where a full disk kills the process without a message.
        if os.pwrite(self._file.fileno(), entry, i * self._size) != self._size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


def _checksum(pixels: bytes) -> bytes:
    """Returns the CRC-32 of the pixels; never zero, which marks missing entries."""
    return (zlib.crc32(pixels) or 1).to_bytes(4, "little")

"""Opens regular files only. A pipe, a device or a socket is refused at once, never waited on and never read.

Errors are OSErrors with the path, as for a file that cannot be opened for another reason.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path
from typing import BinaryIO

from icar_jax.errors import IcarError

_KINDS = {
    stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}  # fmt: skip


class NotRegular(IcarError, OSError):
    """A path leads to something other than a regular file."""

    def __init__(self, path: str | os.PathLike, mode: int):
        what = _KINDS.get(stat.S_IFMT(mode), "something else")
        kind = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        super().__init__(kind, f"expected a regular file, found {what}", os.fspath(path))


class TooLarge(IcarError, OSError):
    """A file has more bytes than its reader takes."""

    def __init__(self, path: str | os.PathLike, found: int, most: int):
        super().__init__(errno.EFBIG, f"{found:,} bytes exceed the limit of {most:,} bytes for such a file", os.fspath(path))


def unusable_name(path: str | os.PathLike) -> str | None:
    """Why no file can have this name; None if one can."""
    text = os.fspath(path)
    if "\0" in (text if isinstance(text, str) else os.fsdecode(text)):
        return "the name contains a NUL character, which no file name has; give one name a line, as `find` without -print0 does"
    return None


def open_regular(path: str | os.PathLike, most: int | None = None) -> BinaryIO:
    """A regular file, opened for reading; links are followed.

    Raises OSError: as `open`, NotRegular, and TooLarge for more than `most` bytes.
    """
    if (why := unusable_name(path)) is not None:
        raise OSError(errno.EINVAL, why, os.fspath(path).replace("\0", "\\x00"))
    # Opening a device can have effects, so the kind is looked up before and, against exchanges, after.
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise NotRegular(path, mode)
    file = open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY), "rb")
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise NotRegular(path, status.st_mode)
        if most is not None and status.st_size > most:
            raise TooLarge(path, status.st_size, most)
    except BaseException:
        file.close()
        raise
    return file


def read_regular(path: str | os.PathLike, most: int) -> bytes:
    """The bytes of a regular file. Raises OSError as `open_regular`, also if it grows beyond `most` while it is read."""
    with open_regular(path, most) as file:
        data = file.read(os.fstat(file.fileno()).st_size + 1)
        if more := file.read(1):  # it grew; pages of memory are only taken for what is there
            data += more + file.read(max(0, most - len(data)))
    if len(data) > most:
        raise TooLarge(path, len(data), most)
    return data


def make_staging(target: Path) -> Path:
    """Makes and returns a new hidden folder in `target`'s folder, to be filled and moved to `target`.

    Its permissions are those of any new folder (the umask applies), unlike those of `tempfile.mkdtemp`.
    """
    name = os.fsdecode(os.fsencode(target.name)[:200])
    while True:
        folder = target.parent / f".{name}.{secrets.token_hex(4)}"
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue

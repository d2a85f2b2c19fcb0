"""Lists the members of an uncompressed tar from its headers.

Supports POSIX.1-1988 (ustar) with pax and GNU long names, as described in POSIX.1-2001, "pax", and the GNU tar manual,
"Basic Tar Format".
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from icar_jax.errors import DataError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_REGULAR, _EMPTY = (b"0", b"\0", b"7"), (b"1", b"2", b"3", b"4", b"5", b"6")
_EXTENDED = (b"x", b"g", b"L")
_MOST_EXTENDED = 1 << 20  # largest valid extended header in bytes; larger ones are damaged


class TarDamage(DataError):
    """A tar that is truncated, compressed, damaged or not in WebDataset layout."""


class Member(NamedTuple):
    """A regular file: its headers start at `start`; its content is `size` bytes at `data`."""

    name: str
    start: int
    data: int
    size: int


def members(read: Callable[[int, int], bytes], end: int, part: bool = False) -> Iterator[Member]:
    """Yields the regular files of a tar, in order, without reading their contents.

    Args:
        read: (offset, length) -> up to `length` bytes.
        end: size of the tar, or of the part, in bytes.
        part: the bytes are consecutive members cut out of a tar, without an end mark.

    Raises:
        TarDamage: the tar is truncated, a header's checksum is wrong, or a member is of an unknown kind.
    """
    offset, start, long_name = 0, None, None
    while not (part and offset >= end):
        header = read(offset, BLOCK)
        if len(header) < BLOCK:
            raise TarDamage(f"cut off after {end} bytes: the end-of-archive mark is missing; fetch or write the file again")
        if header == _ZEROS:
            return
        if header[:2] == b"\x1f\x8b":
            raise TarDamage("compressed with gzip, which has no random access; decompress it first (gunzip)")
        # The checksum is the sum of the header's bytes, with the checksum field as spaces. The low half of Adler-32 is that sum
        # plus one, modulo 65521; it takes a tenth of the time of summing in Python.
        if (zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF) != (1 + _number(header[148:156], offset)) % 65521:
            raise TarDamage(f"not a tar header at byte {offset}: the checksum is wrong; fetch or write the file again")
        kind, size, data = header[156:157], _number(header[124:136], offset), offset + BLOCK
        start = offset if start is None else start
        if kind in _EMPTY:
            size = 0
        if data + size > end:
            name = long_name or _text(header[:100])
            raise TarDamage(f"cut off after {end} bytes, inside {name!r}; fetch or write the file again")
        offset = data + -(-size // BLOCK) * BLOCK
        if kind in _EXTENDED:
            if size > _MOST_EXTENDED:
                raise TarDamage(f"extended header of {size} bytes at byte {start}")
            content = read(data, size)
            if kind == b"L":
                long_name = _text(content)
            elif kind == b"x":
                long_name = _pax_path(content, start) or long_name
        elif kind == b"K":
            pass  # GNU long name of a link target
        elif kind in _REGULAR or kind in _EMPTY:
            if kind in _REGULAR:
                prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
                name = long_name or (f"{prefix}/" if prefix else "") + _text(header[:100])
                yield Member(name, start, data, size)
            start, long_name = None, None
        else:
            raise TarDamage(f"member of kind {kind!r} at byte {start}, such as a sparse file; write it with plain tar")


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", errors="backslashreplace")


def _number(field: bytes, offset: int) -> int:
    """Parses octal digits, or GNU's binary form, whose first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        raise TarDamage(f"not a tar header at byte {offset}; fetch or write the file again") from None


def _pax_path(content: bytes, offset: int) -> str | None:
    """Returns the path in records 'LENGTH KEY=VALUE\\n', or None. Raises TarDamage for damage and for a size record."""
    path = None
    while content:
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(content):
            raise TarDamage(f"damaged extended header at byte {offset}")
        key, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"path":
            path = value.decode("utf-8", errors="backslashreplace")
        elif key == b"size" or key.startswith(b"GNU.sparse"):
            raise TarDamage(f"member with {key.decode()} in its extended header at byte {offset}; write it with plain tar")
        content = content[int(length) :]
    return path

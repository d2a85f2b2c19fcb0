"""Structure of image files, checked before Pillow parses them: parts, scans, metadata and claimed sizes.

Pillow bounds pixels. It does not bound the work of parsing: a JPEG may have thousands of scans, a TIFF may refer to the same
bytes from every tag, and a GIF may have megabytes of comments, each of which costs minutes or gigabytes. The walks below read
only lengths and stop at the bounds of `icar_jax.files.limits`.
"""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass
from typing import BinaryIO

from icar_jax.errors import DataError
from icar_jax.files import limits

ORIENTATION = 0x0112
_BITS = (1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4)  # bytes of a value by TIFF type, from 1
_BITS8 = {16: 8, 17: 8, 18: 8}  # of BigTIFF
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_EXIF = b"Exif\0\0"


class Irregular(DataError):
    """A file exceeds a bound or contradicts itself; the message says which."""


@dataclass(frozen=True)
class Jpeg:
    """What the markers of a JPEG say.

    Attributes:
        coefficient_bytes: memory in which libjpeg collects the coefficients of a progressive file; 0 for a sequential one.
        bad_exif: (start, end) in bytes of EXIF blocks whose directory claims more bytes than there are.
        exif: the first EXIF block, from its TIFF header.
    """

    coefficient_bytes: int
    bad_exif: tuple[tuple[int, int], ...]
    exif: bytes


def inspect_jpeg(data: bytes) -> Jpeg:
    """Walks the markers up to the end of the first image. Raises Irregular for too many segments or scans, and for scans that
    are too short for the claimed size: libjpeg fills what is missing with grey."""
    at, parts, scans, frame, tables = 2, 0, 0, _Frame(), {}
    exif: list[tuple[int, int]] = []
    while (found := _MARKER.search(data, at)) is not None:
        marker, at = data[found.end() - 1], found.end()
        parts += 1
        if parts > limits.IMAGE_PARTS:
            raise Irregular(f"more than {limits.IMAGE_PARTS:,} segments")
        if marker == 0xD9:
            break
        if marker in (0x01, 0xD8):
            continue
        length = int.from_bytes(data[at : at + 2])
        body = data[at + 2 : at + length]
        if marker == 0xC4:
            _read_huffman(body, tables)
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC8, 0xCC):
            frame = _Frame.read(marker, body)
        elif marker == 0xE1 and body.startswith(_EXIF):
            exif.append((at + 2, at + length))
        at += max(length, 2)
        if marker == 0xDA:
            scans += 1
            if scans > limits.IMAGE_SCANS:
                raise Irregular(f"more than {limits.IMAGE_SCANS} scans")
            after = _MARKER.search(data, at)
            end = len(data) if after is None else after.start()
            if 8 * (end - at) < (bits := frame.least_bits(body, tables)):
                raise Irregular(
                    f"truncated: {frame.width} x {frame.height} pixels take at least {-(-bits // 8):,} bytes, "
                    f"found {end - at:,}"
                )
            at = end
    # Pillow joins the blocks, so several are regular only together; one is the rule.
    whole = b"".join(data[start + len(_EXIF) : end] for start, end in exif)
    bad = tuple(exif) if exif and not has_regular_tags(whole) else ()
    return Jpeg(frame.coefficient_bytes, bad, whole)


def without_directories(data: bytes) -> bytes:
    """The file with the directories of all TIFF headers in it emptied, for containers whose reader fails on odd tags (AVIF)."""
    out = bytearray(data)
    for found in re.finditer(rb"II\*\0|MM\0\*", data):
        order = "little" if found[0][:1] == b"I" else "big"
        at = found.start() + int.from_bytes(data[found.start() + 4 : found.start() + 8], order)
        if at + 2 <= len(out):
            out[at : at + 2] = b"\0\0"
    return bytes(out)


def without(data: bytes, blocks: tuple[tuple[int, int], ...]) -> bytes:
    """A JPEG whose EXIF blocks are not recognised as such."""
    out = bytearray(data)
    for start, _ in blocks:
        out[start : start + 4] = b"none"
    return bytes(out)


@dataclass(frozen=True)
class _Frame:
    """A frame header (SOFn): its marker, size in pixels, and {component: (horizontal, vertical sampling)}."""

    marker: int = 0
    width: int = 0
    height: int = 0
    sampling: tuple[tuple[int, int, int], ...] = ()

    @classmethod
    def read(cls, marker: int, body: bytes) -> _Frame:
        if len(body) < 6:
            return cls()
        height, width, n = struct.unpack(">HHB", body[1:6])
        parts = [body[6 + 3 * i : 9 + 3 * i] for i in range(n)]
        return cls(marker, width, height, tuple((p[0], p[1] >> 4 or 1, p[1] & 15 or 1) for p in parts if len(p) == 3))

    def _blocks(self, h: int, v: int, alone: bool) -> int:
        most_h, most_v = max(s[1] for s in self.sampling), max(s[2] for s in self.sampling)
        if alone:
            across, down = -(-self.width * h // most_h), -(-self.height * v // most_v)
            return -(-across // 8) * -(-down // 8)
        return -(-self.width // (8 * most_h)) * -(-self.height // (8 * most_v)) * h * v

    @property
    def coefficient_bytes(self) -> int:
        if self.marker not in (0xC2, 0xC6, 0xCA, 0xCE) or not self.sampling:
            return 0
        return sum(128 * self._blocks(h, v, False) for _, h, v in self.sampling)

    def least_bits(self, scan: bytes, tables: dict[int, int]) -> int:
        """Least bits of a scan: each block takes a code for its mean and, in a sequential file, one for the rest.

        0 where nothing is known: arithmetic coding, lossless files, refinements and scans of details, which may be empty.
        """
        n = scan[0] if scan else 0
        if self.marker not in (0xC0, 0xC1, 0xC2) or len(scan) < 4 + 2 * n or not self.sampling:
            return 0
        first, approximation = scan[1 + 2 * n], scan[3 + 2 * n]
        if first != 0 or approximation >> 4:
            return 0
        by_id = {s[0]: s for s in self.sampling}
        bits = 0
        for i in range(n):
            component, table = scan[1 + 2 * i], scan[2 + 2 * i]
            _, h, v = by_id.get(component, (0, 1, 1))
            each = tables.get(table >> 4, 1) + (tables.get(0x10 | table & 15, 1) if self.marker != 0xC2 else 0)
            bits += each * self._blocks(h, v, n == 1)
        return bits


def _read_huffman(body: bytes, tables: dict[int, int]) -> None:
    """Notes the shortest code of each table: {class << 4 | number: bits}."""
    at = 0
    while at + 17 <= len(body):
        counts = body[at + 1 : at + 17]
        tables[body[at]] = next((bits for bits, count in enumerate(counts, 1) if count), 1)
        at += 17 + sum(counts)


def check_png(file: BinaryIO) -> None:
    """Raises Irregular for more than IMAGE_PARTS chunks."""
    file.seek(8)
    for _ in range(limits.IMAGE_PARTS):
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            return
        file.seek(int.from_bytes(head[:4]) + 4, 1)
    raise Irregular(f"more than {limits.IMAGE_PARTS:,} chunks")


def check_gif(file: BinaryIO) -> None:
    """Raises Irregular for more than IMAGE_PARTS blocks before the first frame."""
    file.seek(10)
    flags = (file.read(1) or b"\0")[0]
    file.seek(13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
    parts = 0
    while (kind := file.read(1)) not in (b"", b",", b";"):
        parts += 1
        if kind == b"!":
            file.read(1)
            while parts <= limits.IMAGE_PARTS and (size := (file.read(1) or b"\0")[0]):
                file.seek(size, 1)
                parts += 1
        if parts > limits.IMAGE_PARTS:
            raise Irregular(f"more than {limits.IMAGE_PARTS:,} blocks before its first frame")


def check_tiff(file: BinaryIO) -> None:
    """Raises Irregular if the tags of the first directory claim more bytes than the file has."""
    size = file.seek(0, 2)
    if not _regular(file, 0, size):
        raise Irregular("its tags claim more bytes than the file has")


def has_regular_tags(exif: bytes) -> bool:
    """Whether the first directory of an EXIF block (from its TIFF header) claims no more bytes than the block has."""
    return _regular(io.BytesIO(exif), 0, len(exif))


def _regular(file: BinaryIO, start: int, size: int) -> bool:
    entries = list(_directory(file, start))
    if not entries:
        return True
    claimed = 0
    for _, kind, count, _, inline in entries:
        each = (_BITS[kind - 1] if 1 <= kind <= len(_BITS) else _BITS8.get(kind, 0)) * count
        claimed += each if each > inline else 0
    return claimed <= size


def _directory(file: BinaryIO, start: int):
    """Yields (tag, type, count, value bytes, bytes that fit inline) of the first directory; nothing for another file."""
    file.seek(start)
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 8:
        return
    big = struct.unpack(order + "H", head[2:4])[0] == 43
    if big and len(head) < 16:
        return
    at = struct.unpack(order + ("Q" if big else "I"), head[8:16] if big else head[4:8])[0]
    form, n_form = (order + "HHQ8s", order + "Q") if big else (order + "HHI4s", order + "H")
    try:
        file.seek(start + at)
    except (OSError, ValueError, OverflowError):
        return
    count = file.read(struct.calcsize(n_form))
    if len(count) < struct.calcsize(n_form):
        return
    for _ in range(min(struct.unpack(n_form, count)[0], 0xFFFF)):
        entry = file.read(struct.calcsize(form))
        if len(entry) < struct.calcsize(form):
            return
        yield (*struct.unpack(form, entry), 8 if big else 4)


def orientation_of(exif: bytes) -> int:
    """Orientation 1 to 8 of an EXIF block, with or without its header; 1 if it has none. Other tags are not looked at."""
    exif = exif.removeprefix(_EXIF)
    for tag, kind, count, value, _ in _directory(io.BytesIO(exif), 0):
        if tag == ORIENTATION and count == 1 and kind in (1, 3, 4):
            order = "<" if exif[:2] == b"II" else ">"
            (found,) = struct.unpack_from(order + {1: "B", 3: "H", 4: "I"}[kind], value)
            return found if 1 <= found <= 8 else 1
    return 1

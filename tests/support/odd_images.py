"""Small image files that are odd or hostile; each function makes one, and the comment beside it says what is right.

`benchmarks/image_files.py` measures memory and time of decoding the large ones.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def noise(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def exif_block(entries: list[tuple[int, int, int, bytes]], order: str = "<") -> bytes:
    """A TIFF directory of (tag, type, count, four bytes of value), with the header that JPEG puts before it."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return b"Exif\0\0" + head + b"".join(struct.pack(order + "HHI4s", *entry) for entry in entries) + bytes(4)


def turned(orientation: int, order: str = "<") -> tuple[int, int, int, bytes]:
    return 0x112, 3, 1, struct.pack(order + "H", orientation) + b"\0\0"


ODD_TAGS = {
    "software is a float": (0x131, 11, 1, b"\0\0\x80?"),
    "width is text": (0x100, 2, 4, b"abc\0"),
    "width is negative": (0x100, 9, 1, b"\xff\xff\xff\xff"),
    "bits of 2^32-1 values": (0x102, 3, 2**32 - 1, b"\x10\0\0\0"),
    "resolution of no known type": (0x11A, 200, 1, b"\0\0\0\0"),
    "text beyond the end": (0x10F, 2, 5000, b"\xff\xff\xff\x7f"),
}


def jpeg_with_exif(exif: bytes, image: Image.Image) -> bytes:
    plain = saved(image, "JPEG", quality=95)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


def png_with_exif(exif: bytes, image: Image.Image) -> bytes:
    plain = saved(image, "PNG")
    return plain[:33] + png_chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + plain[33:]


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(pixels: np.ndarray, kind: int, *extra: bytes) -> bytes:
    """A PNG of uint8 or uint16 [H, W, channels]; `kind` is its colour type."""
    height, width, _ = pixels.shape
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    return _png_file(width, height, 8 * pixels.dtype.itemsize, kind, zlib.compress(body), *extra)


def flat_png(width: int, height: int, depth: int, kind: int) -> bytes:
    """Black pixels, a thousandth of their size in bytes."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    pack, row = zlib.compressobj(9), bytes(1 + width * channels * depth // 8)
    body = b"".join(pack.compress(row) for _ in range(height)) + pack.flush()
    return _png_file(width, height, depth, kind, body)


def _png_file(width: int, height: int, depth: int, kind: int, body: bytes, *extra: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [png_chunk(b"IHDR", head), *extra, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def claiming(data: bytes, width: int, height: int) -> bytes:
    """A JPEG that claims another size than it has pixels for."""
    at = next(i for i in range(len(data)) if data[i] == 0xFF and data[i + 1] in (0xC0, 0xC1, 0xC2))
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG that repeats a scan of details."""
    data = saved(Image.new("L", (side, side), 90), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + b"\xff\xd9"


def tiff_sharing(tags: int, size: int) -> bytes:
    """A TIFF of `size` bytes whose tags all refer to all of its bytes."""
    kinds = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (278, 4, 1, 8)]
    kinds += [(279, 4, 1, 64)] + [(40000 + i, 1, size - 8, 8) for i in range(tags)]
    where = size
    directory = struct.pack("<H", len(kinds)) + b"".join(struct.pack("<HHII", *kind) for kind in kinds) + bytes(4)
    return (b"II*\0" + struct.pack("<I", where)).ljust(size, b"\0") + directory


def tiff(pixels: np.ndarray, bits: int, white_is_zero: bool = False, maximum: int | None = None) -> bytes:
    """An uncompressed grey TIFF of uint16 [H, W], stored with 16 bits, or packed with 12."""
    height, width = pixels.shape
    if bits == 12:
        flat = pixels.reshape(height, -1, 2).astype(np.uint32)
        packed = np.stack([flat[..., 0] >> 4, (flat[..., 0] & 15) << 4 | flat[..., 1] >> 8, flat[..., 1] & 255], -1)
        data = packed.astype(np.uint8).tobytes()
    else:
        data = pixels.astype("<u2").tobytes()
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 0 if white_is_zero else 1)]
    tags += [(273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(data))]
    tags += [(281, 3, maximum)] if maximum is not None else []
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, kind, 1, v) for tag, kind, v in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"

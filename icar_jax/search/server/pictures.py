"""Pictures that a browser may have: opened within limits, shrunk to previews, and only ever those of the store.

A client names a picture by the SHA-256 of its file, never by a path. The store tells where that file lay when it was indexed,
and what is read there is sent only if it is a regular file whose bytes still have that hash. So whatever became of the path
since (another file, a link to elsewhere), nothing is sent that was not indexed. What a link reaches outside the folders that
were indexed is refused even so: who may see their pictures need not be meant to see what lies elsewhere.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from PIL import Image

from icar_jax.data.images import ImageError, decode
from icar_jax.search.scan import is_below
from icar_jax.search.server.errors import RequestError

# Formats that are opened, by Pillow's names. Some others run programs of their own (EPS) or have no picture until drawn.
Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF", "TIFF") if name in Image.OPEN)
SIDES = (320, 1280)  # of previews, in pixels: in the grid and enlarged
_QUALITY = 85
_PATHS_KEPT = 50_000
_MAX_FILE_BYTES = 1 << 29
_UPDATE = "`icar index` brings the store up to date"
ID = r"[0-9a-f]{64}"


def open_picture(data: bytes, name: str, max_pixels: int, side: int | None = None) -> Image.Image:
    """The bytes of an image file -> RGB picture, upright.

    With `side` a JPEG may be decoded at a fraction of its size, down to twice `side`.
    Raises RequestError (422) for anything but a whole image of FORMATS with at most `max_pixels`; the size is read before them.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        _require_pixels(picture, name, max_pixels)
        if side is not None:
            picture.draft("RGB", (2 * side, 2 * side))
        return decode(picture, name)
    except Image.UnidentifiedImageError:
        raise RequestError(
            422, "image", f"{name}: no image that can be read; send a whole file of {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, MemoryError):
        raise _too_many(name, max_pixels) from None
    except ImageError as error:
        raise RequestError(422, "image", str(error)) from None
    except RequestError:
        raise
    except Exception as error:  # Pillow's plugins raise many kinds on damaged files
        raise RequestError(422, "image", f"{name}: cannot decode image: {error or type(error).__name__}") from None


def _require_pixels(picture: Image.Image, name: str, max_pixels: int) -> None:
    if picture.width * picture.height > max_pixels:
        raise _too_many(f"{name} ({picture.width} x {picture.height})", max_pixels)


def _too_many(name: str, max_pixels: int) -> RequestError:
    return RequestError(
        422, "pixels", f"{name}: more than {max_pixels:,} pixels, which is all that is decoded; shrink the image"
    )


class Pictures:
    """Files of the store by their hash, and previews of them.

    Args:
        find: hash -> paths of the images that have it, from the store.
        max_pixels: of pictures that previews are made of.
        cache_bytes: of finished previews kept in memory, the least recently used of which go first.
        follow_links: see ServerSettings.
        roots: gives what was indexed, as `Store.roots`.
    """

    def __init__(
        self, find: Callable[[str], Sequence[str]], max_pixels: int, cache_bytes: int, follow_links: bool = False,
        roots: Callable[[], Sequence[str] | None] = lambda: None,
    ):  # fmt: skip
        self._find, self._max_pixels, self._follow_links, self._roots = find, max_pixels, follow_links, roots
        self._paths: OrderedDict[str, Sequence[str]] = OrderedDict()
        self._cache: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._cache_bytes, self._cached = cache_bytes, 0
        self._lock = threading.Lock()
        self.hits = self.misses = 0

    def remember(self, found: Iterable[tuple[str, str]]) -> None:
        """(hash, path) of search hits: their previews are asked for next, without a look into the store each."""
        with self._lock:
            for sha256, path in found:
                self._paths[sha256] = (path,)
                self._paths.move_to_end(sha256)
            while len(self._paths) > _PATHS_KEPT:
                self._paths.popitem(last=False)

    def original(self, sha256: str) -> tuple[bytes, str]:
        """(bytes of the file, media type). Raises RequestError (404) saying why there is none."""
        with self._lock:
            paths = self._paths.get(sha256, ())
        try:
            data = self._first(paths, sha256)
        except RequestError:
            data = None
        if data is None:  # not met yet, or moved since
            paths = self._find(sha256)
            if not paths:
                raise RequestError(404, "image-unknown", "the store holds no image with this id")
            data = self._first(paths, sha256)
            self.remember((sha256, path) for path in paths[:1])
        return data, _media_type(data)

    def preview(self, sha256: str, side: int) -> bytes:
        """JPEG of the picture within `side` x `side` pixels, upright and without metadata. Raises RequestError as `original`."""
        key = (sha256, side)
        with self._lock:
            if key in self._cache:
                self.hits += 1
                self._cache.move_to_end(key)
                return self._cache[key]
            self.misses += 1
        data, _ = self.original(sha256)
        picture = open_picture(data, "image", self._max_pixels, side)
        picture.thumbnail((side, side))
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=_QUALITY)
        made = stream.getvalue()
        self._keep(key, made)
        return made

    def _keep(self, key: tuple[str, int], made: bytes) -> None:
        with self._lock:
            self._cached += len(made) - len(self._cache.get(key, b""))
            self._cache[key] = made
            while self._cached > self._cache_bytes and self._cache:
                self._cached -= len(self._cache.popitem(last=False)[1])

    def _first(self, paths: Sequence[str], sha256: str) -> bytes | None:
        """Bytes of the first of `paths` that still holds them; None without paths."""
        if not paths:
            return None
        reasons = []
        roots = None if self._follow_links else self._roots()
        for path in paths:
            try:
                return read_indexed(path, sha256, self._follow_links, roots)
            except RequestError as error:
                reasons.append(error)
        raise reasons[0]


def read_indexed(path: str, sha256: str, follow_links: bool = False, roots: Sequence[str] | None = None) -> bytes:
    """Bytes of a file, which have this hash. Raises RequestError (404) where the path no longer leads to them.

    Without `follow_links` a path below one of `roots` has to lead to a place below one of them, whatever links it goes
    through; any other path may not be a link out of its own folder.
    """
    name = os.path.basename(path)
    if not follow_links and (out := _leads_out(path, roots or ())):
        raise RequestError(404, "image-link", f"{name} is {out}, which is not followed (--follow-links does)")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe must not be waited for
    except OSError as error:
        reason = "no longer exists" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else "cannot be read"
        raise RequestError(404, "image-gone", f"{name} {reason}; {_UPDATE}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise RequestError(404, "image-changed", f"{name} is no longer a file")
    with open(descriptor, "rb") as file:
        if status.st_size > _MAX_FILE_BYTES:
            raise RequestError(404, "image-large", f"{name} is larger than {_MAX_FILE_BYTES:,} bytes, and not served")
        try:
            data = file.read(_MAX_FILE_BYTES)
        except OSError as error:
            raise RequestError(404, "image-gone", f"{name} cannot be read: {error.strerror}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise RequestError(404, "image-changed", f"{name} has changed since it was indexed; {_UPDATE}")
    return data


def _leads_out(path: str, roots: Sequence[str]) -> str | None:
    real = os.path.realpath(path)
    if is_below(path, roots):
        inside = is_below(real, [os.path.realpath(root) for root in roots])
        return None if inside else "reached by a link out of the folders that were indexed"
    if os.path.islink(path) and not is_below(real, [os.path.realpath(os.path.dirname(path))]):
        return "a link out of its folder"
    return None


def _media_type(data: bytes) -> str:
    """By content: what a file's name claims is not believed."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return Image.MIME.get("JPEG" if picture.format == "MPO" else picture.format, "application/octet-stream")
    except Exception:  # an indexed file of another format: sent, but never shown
        return "application/octet-stream"

"""Images served to browsers: decoded within limits, resized to previews, and restricted to images of the store.

A client requests an image by the SHA-256 of its file, never by a path. The store gives the path where it was indexed, and the
file is sent only if it is a regular file with the same hash. If the path now holds another file or link, only indexed content
can be sent. Links that lead outside the indexed folders are rejected even then, since users of the server may not be allowed
to see files there.
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

# Accepted formats by Pillow's names. Some others run external programs (EPS) or are not raster images.
Image.init()
FORMATS = tuple(name for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "AVIF", "TIFF") if name in Image.OPEN)
SIDES = (320, 1280)  # longest side of previews in pixels: grid and enlarged view
_QUALITY = 85
_PATHS_KEPT = 50_000
_MAX_FILE_BYTES = 1 << 29
_UPDATE = "`icar index` brings the store up to date"
ID = r"[0-9a-f]{64}"


def open_picture(data: bytes, name: str, max_pixels: int, side: int | None = None) -> Image.Image:
    """Decodes an image file to RGB with EXIF orientation applied; `name` is for error messages.

    With `side`, a JPEG may be decoded at a reduced size of at least twice `side`.
    Raises RequestError (422) unless it is a complete image in FORMATS with at most `max_pixels`, checked before decoding.
    """
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        _require_pixels(picture, name, max_pixels)
        if side is not None:
            picture.draft("RGB", (2 * side, 2 * side))
        return decode(picture, name)
    except Image.UnidentifiedImageError:
        raise RequestError(422, "image", f"{name}: not a readable image; send a complete file ({', '.join(FORMATS)})") from None
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
    return RequestError(422, "pixels", f"{name}: exceeds the limit of {max_pixels:,} pixels; resize the image")


class Pictures:
    """Original files of the store by SHA-256, and cached previews of them.

    Args:
        find: SHA-256 -> paths of the indexed images with that hash.
        max_pixels: limit of images decoded for previews.
        cache_bytes: memory of the LRU cache of previews.
        follow_links: see ServerSettings.
        roots: returns the indexed folders, as `Store.roots`.
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
        """Caches the paths of search hits (sha256, path), so that their previews need no lookup in the store."""
        with self._lock:
            for sha256, path in found:
                self._paths[sha256] = (path,)
                self._paths.move_to_end(sha256)
            while len(self._paths) > _PATHS_KEPT:
                self._paths.popitem(last=False)

    def original(self, sha256: str) -> tuple[bytes, str]:
        """(bytes of the file, media type). Raises RequestError (404) with the reason if it cannot be served."""
        with self._lock:
            paths = self._paths.get(sha256, ())
        try:
            data = self._first(paths, sha256)
        except RequestError:
            data = None
        if data is None:  # path not cached, or file moved since
            paths = self._find(sha256)
            if not paths:
                raise RequestError(404, "image-unknown", "the store has no image with this id")
            data = self._first(paths, sha256)
            self.remember((sha256, path) for path in paths[:1])
        return data, _media_type(data)

    def preview(self, sha256: str, side: int) -> bytes:
        """JPEG of the image within `side` x `side` pixels, without metadata. Raises RequestError as `original`."""
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
        """Bytes from the first of `paths` that still has this hash; None without paths."""
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
    """Bytes of the file at `path`, verified against `sha256`. Raises RequestError (404) if they do not match.

    Without `follow_links`, a path below one of `roots` must resolve to a path below one of them; any other path must not be a
    link out of its folder.
    """
    name = os.path.basename(path)
    if not follow_links and (out := _leads_out(path, roots or ())):
        raise RequestError(404, "image-link", f"{name} is {out}, which is not followed without --follow-links")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # do not block on a pipe
    except OSError as error:
        reason = "no longer exists" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else "cannot be read"
        raise RequestError(404, "image-gone", f"{name} {reason}; {_UPDATE}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise RequestError(404, "image-changed", f"{name} is no longer a file")
    with open(descriptor, "rb") as file:
        if status.st_size > _MAX_FILE_BYTES:
            raise RequestError(404, "image-large", f"{name} is larger than {_MAX_FILE_BYTES:,} bytes and is not served")
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
        return None if inside else "reached through a link out of the indexed folders"
    if os.path.islink(path) and not is_below(real, [os.path.realpath(os.path.dirname(path))]):
        return "a link out of its folder"
    return None


def _media_type(data: bytes) -> str:
    """The media type by content, not by file name."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return Image.MIME.get("JPEG" if picture.format == "MPO" else picture.format, "application/octet-stream")
    except Exception:  # an indexed file of another format: sent, but not displayed by browsers
        return "application/octet-stream"

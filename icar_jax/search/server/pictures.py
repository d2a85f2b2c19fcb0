"""Images served to browsers: decoded within limits, resized to previews, and restricted to images of the store.

A client requests an image by the SHA-256 of its file, never by a path. The store gives the path where it was indexed, and the
file is sent only if it is a regular file with the same hash. If the path now holds another file or link, only indexed content
can be sent. Links that lead outside the indexed folders are rejected even then, since users of the server may not be allowed
to see files there.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import BinaryIO

from PIL import Image
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from icar_jax.data.decoding import formats
from icar_jax.data.images import ImageError, TooManyPixels, decode
from icar_jax.files import limits
from icar_jax.files.opening import NotRegular, TooLarge, open_regular
from icar_jax.search.scan import is_below
from icar_jax.search.server.errors import RequestError

SIDES = (320, 1280)  # longest side of previews in pixels: grid and enlarged view
_QUALITY = 85
_UNKNOWN = "application/octet-stream"
_PATHS_KEPT = 50_000
_CHUNK = 1 << 17
_LEAST_RATE = 16_000  # bytes a second that a client takes of a file, on average and after `stall_s`
_UPDATE = "`icar index` brings the store up to date"
ID = r"[0-9a-f]{64}"


def open_picture(data: bytes, name: str, max_pixels: int, side: int = 0) -> Image.Image:
    """Decodes an image file to RGB with EXIF orientation applied; `name` is for error messages.

    With `side`, a large image may be decoded at a reduced size of at least twice `side`.
    Raises RequestError (422) unless it is a complete image of a format that is read here, within `max_pixels` and the bounds of
    icar_jax.files.limits, which are checked before decoding.
    """
    try:
        return decode(data, name, at_least=2 * side, max_pixels=max_pixels)
    except TooManyPixels as error:
        raise RequestError(422, "pixels", f"{error}; resize the image") from None
    except MemoryError:
        raise RequestError(422, "pixels", f"{name}: not enough memory to decode it; resize the image") from None
    except ImageError as error:
        raise RequestError(422, "image", str(error)) from None


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

    def original(self, sha256: str) -> BinaryIO:
        """The open file, whose content was checked. Raises RequestError (404) with the reason if it cannot be served."""
        with self._lock:
            paths = self._paths.get(sha256, ())
        try:
            file = self._first(paths, sha256)
        except RequestError:
            file = None
        if file is None:  # path not cached, or file moved since
            paths = self._find(sha256)
            if not paths:
                raise RequestError(404, "image-unknown", "the store has no image with this id")
            file = self._first(paths, sha256)
            assert file is not None
            self.remember((sha256, path) for path in paths[:1])
        return file

    def preview(self, sha256: str, side: int) -> bytes:
        """JPEG of the image within `side` x `side` pixels, without metadata. Raises RequestError as `original`."""
        key = (sha256, side)
        with self._lock:
            if key in self._cache:
                self.hits += 1
                self._cache.move_to_end(key)
                return self._cache[key]
            self.misses += 1
        with self.original(sha256) as file:
            data = file.read()
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

    def _first(self, paths: Sequence[str], sha256: str) -> BinaryIO | None:
        """The first file of `paths` that still has this hash; None without paths."""
        if not paths:
            return None
        reasons = []
        roots = None if self._follow_links else self._roots()
        for path in paths:
            try:
                return open_indexed(path, sha256, self._follow_links, roots)
            except RequestError as error:
                reasons.append(error)
        raise reasons[0]


def open_indexed(path: str, sha256: str, follow_links: bool = False, roots: Sequence[str] | None = None) -> BinaryIO:
    """The file at `path`, opened and verified against `sha256`. Raises RequestError (404) if its content does not match.

    Without `follow_links`, a path below one of `roots` must resolve to a path below one of them; any other path must not be a
    link out of its folder.
    """
    name = os.path.basename(path)
    if not follow_links and (out := _leads_out(path, roots or ())):
        raise RequestError(404, "image-link", f"{name} is {out}, which is not followed without --follow-links")
    with contextlib.ExitStack() as closing:
        try:
            file = closing.enter_context(open_regular(path, limits.IMAGE_BYTES))
            found = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
        except NotRegular:
            raise RequestError(404, "image-changed", f"{name} is no longer a file") from None
        except TooLarge as error:
            raise RequestError(404, "image-large", f"{name} is not served: {error.strerror}") from None
        except OSError as error:
            gone = isinstance(error, (FileNotFoundError, NotADirectoryError))
            reason = "no longer exists" if gone else f"cannot be read: {error.strerror}"
            raise RequestError(404, "image-gone", f"{name} {reason}; {_UPDATE}") from None
        if found != sha256:
            raise RequestError(404, "image-changed", f"{name} has changed since it was indexed; {_UPDATE}")
        closing.pop_all()  # the caller closes it
    return file


class FileStream(Response):
    """Sends an open file in pieces, as fast as the client takes them, and closes it.

    A file that is written to meanwhile is cut off, as its new bytes were never checked; so is one whose client is too slow.
    """

    def __init__(self, file: BinaryIO, headers: Mapping[str, str], stall_s: float):
        self._file, self._stall_s = file, stall_s
        self._before = _state(file)
        self._size = os.fstat(file.fileno()).st_size
        super().__init__(media_type=media_type(file), headers={**headers, "Content-Length": str(self._size)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnection(receive))
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async with asyncio.timeout(self._stall_s + self._size / _LEAST_RATE):
                left = self._size
                while left and not gone.done():
                    part = await asyncio.to_thread(self._file.read, _CHUNK)
                    if not part or _state(self._file) != self._before:
                        return  # uvicorn closes a connection whose response is incomplete
                    left -= len(part)
                    await send({"type": "http.response.body", "body": part, "more_body": left > 0})
            if not self._size:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            pass  # as above
        finally:
            gone.cancel()
            self._file.close()


def _state(file: BinaryIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _leads_out(path: str, roots: Sequence[str]) -> str | None:
    real = os.path.realpath(path)
    if is_below(path, roots):
        inside = is_below(real, [os.path.realpath(root) for root in roots])
        return None if inside else "reached through a link out of the indexed folders"
    if os.path.islink(path) and not is_below(real, [os.path.realpath(os.path.dirname(path))]):
        return "a link out of its folder"
    return None


def media_type(file: BinaryIO) -> str:
    """The media type by content, not by file name; the file is left at its start."""
    try:
        with Image.open(file, formats=formats()) as picture:
            return Image.MIME.get("JPEG" if picture.format == "MPO" else picture.format, _UNKNOWN)
    except Exception:  # an indexed file of another format: sent, but not displayed by browsers
        return _UNKNOWN
    finally:
        file.seek(0)

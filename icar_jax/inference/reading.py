"""Reads files on threads ahead of the model, in order and in bounded memory, and reports unusable files."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

from icar_jax.data.images import ImageError
from icar_jax.data.sources.files import unlisted
from icar_jax.files.opening import unusable_name

T = TypeVar("T")


@dataclass(frozen=True)
class BadFile:
    """A file that could not be used, and the reason; `unread` if not even its bytes could be read."""

    file: str
    reason: str
    unread: bool = False


def map_ordered(function: Callable[[T], object], items: Iterable[T], *, ahead: int, threads: int = 0) -> Iterator:
    """Yields function(item) in the order of the items, computed on threads with at most `ahead` results pending.

    `threads` 0 means one per core, up to 8. An exception of the function is raised when its result is due.
    """
    items = iter(items)
    pool = ThreadPoolExecutor(max_workers=threads or min(8, os.cpu_count() or 1), thread_name_prefix="decode")
    in_flight: deque[Future] = deque()
    try:
        while True:
            for item in islice(items, max(1, ahead) - len(in_flight)):
                in_flight.append(pool.submit(function, item))
            if not in_flight:
                return
            yield in_flight.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # also if the consumer stopped early


def read_or_bad(path: str, read: Callable[[str], T]) -> T | BadFile:
    """Returns read(path), or a BadFile if the file or its name cannot be used."""
    if (why := unusable_name(path)) is not None:
        return BadFile(path.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00"), why)
    try:
        path.encode()
    except UnicodeEncodeError:  # tables cannot store the name
        return BadFile(path.encode("utf-8", "backslashreplace").decode(), "the file's name is not valid UTF-8; rename it")
    try:
        return read(path)
    except (OSError, ImageError) as error:
        if isinstance(error, OSError) and os.path.isdir(path) and (why := unlisted(path)) is not None:
            return BadFile(path, f"the folder and its contents cannot be read: {why}", True)
        reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ") or type(error).__name__
        return BadFile(path, reason, isinstance(error, OSError))
    except MemoryError:
        return BadFile(path, "not enough memory to decode it; resize the image")

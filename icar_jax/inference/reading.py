"""Files read on threads ahead of the model, in order and in bounded memory; those that cannot be used are named."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class Bad:
    """A file that could not be used, and why; `unread` where not even its bytes were to be had."""

    file: str
    reason: str
    unread: bool = False


def in_order(function: Callable[[T], object], items: Iterable[T], *, ahead: int, threads: int = 0) -> Iterator:
    """Yields function(item) in the order of the items, computed on threads; at most `ahead` results wait.

    `threads` 0 takes one a core, up to 8. An exception of the function is raised in its place.
    """
    items = iter(items)
    pool = ThreadPoolExecutor(max_workers=threads or min(8, os.cpu_count() or 1), thread_name_prefix="decode")
    flying: deque[Future] = deque()
    try:
        while True:
            for item in islice(items, max(1, ahead) - len(flying)):
                flying.append(pool.submit(function, item))
            if not flying:
                return
            yield flying.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # of a run that was stopped, too


def readable(path: str, read: Callable[[str], T]) -> T | Bad:
    """read(path), or a Bad where the file or its name cannot be used."""
    try:
        path.encode()
    except UnicodeEncodeError:  # no table could hold it
        return Bad(path.encode("utf-8", "backslashreplace").decode(), "the file's name is not valid UTF-8; rename it")
    try:
        return read(path)
    except (OSError, ImageError) as error:
        if isinstance(error, OSError) and os.path.isdir(path) and (why := unlisted(path)) is not None:
            return Bad(path, f"the folder cannot be read, nor what is below it: {why}", True)
        return Bad(path, str(error).removeprefix(f"{path}: ") or type(error).__name__, isinstance(error, OSError))
    except MemoryError:
        return Bad(path, "not enough memory to decode it; shrink the picture")

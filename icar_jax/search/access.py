"""Ways into a store: its address, the lock that local writers take in turn, and errors that name it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from icar_jax.config import not_local
from icar_jax.errors import IcarError
from icar_jax.search import MissingExtra

LOCK = ".lock"


class StoreError(IcarError, ValueError):
    """A store is missing, damaged, of another format or of another model; the message names it and the fix."""


class StoreExists(StoreError):
    """There is a store already where one was to be made."""


def is_local(uri: str) -> bool:
    """Whether a store's address is a folder of this machine, not an object store's such as s3://bucket/name."""
    return "://" not in uri


def address(uri: str | os.PathLike) -> str:
    """The address in full: of a folder its absolute path."""
    uri = os.fspath(uri)
    if is_local(uri) and not_local(uri) is not None:  # as pathlib spells it
        raise StoreError(f"{uri}: write the address of a store with two slashes, such as s3://bucket/name, and not as a Path")
    return os.path.abspath(os.path.expanduser(uri)) if is_local(uri) else uri


def creation_stamp(uri: str) -> tuple[int, int] | None:
    """What tells a local store from another one made at its address later; None for object stores and where there is none.

    It is the file of the lock, which is made with a store and never written to. A folder's number may be given out again.
    """
    if not is_local(uri):
        return None
    try:
        status = os.stat(Path(uri) / LOCK)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def locked(uri: str) -> Iterator[None]:
    """Holds the lock of a local store, waiting for it. Object stores have none: there commits fail where two meet."""
    if not is_local(uri):
        yield
        return
    with store_errors(uri, "locking it for writing"):
        descriptor = os.open(Path(uri) / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # ends with the process, however it ends
        yield
    finally:
        os.close(descriptor)


@contextmanager
def store_errors(uri: str, doing: str) -> Iterator[None]:
    """Turns what LanceDB raises into a StoreError that names the store."""
    try:
        yield
    except (StoreError, MissingExtra):
        raise
    except (ValueError, RuntimeError, OSError) as error:
        raise StoreError(f"the store {uri}: {doing} failed: {error}") from error

"""Access to a store: its address, the lock of local writers, and errors that name the store."""

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
    """A store is missing, damaged, or has another format or model; the message names the store and the fix."""


class QueryError(IcarError, ValueError):
    """An invalid query or filter; the message says why."""


class StoreExists(StoreError):
    """A store already exists at the address of a new one."""


def is_local(uri: str) -> bool:
    """Whether a store address is a local folder rather than an object store such as s3://bucket/name."""
    return "://" not in uri


def address(uri: str | os.PathLike) -> str:
    """The normalised address; folders become absolute paths. Raises StoreError for an object store address made a Path."""
    uri = os.fspath(uri)
    if is_local(uri) and not_local(uri) is not None:  # pathlib collapses the two slashes
        raise StoreError(f"{uri}: pass the address of an object store as a string with two slashes, such as s3://bucket/name")
    return os.path.abspath(os.path.expanduser(uri)) if is_local(uri) else uri


def creation_stamp(uri: str) -> tuple[int, int] | None:
    """(inode, mtime_ns) of a local store's lock file, which changes if the store is deleted and recreated; None otherwise.

    The lock file is created with the store and never written to. A folder's inode may be reused.
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
    """Context that holds the exclusive lock of a local store. Object stores have no lock; conflicting commits fail there."""
    if not is_local(uri):
        yield
        return
    with store_errors(uri, "locking it for writing"):
        descriptor = os.open(Path(uri) / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released when the process ends, even if killed
        yield
    finally:
        os.close(descriptor)


@contextmanager
def store_errors(uri: str, doing: str) -> Iterator[None]:
    """Context that converts LanceDB errors into a StoreError naming the store and the action `doing`."""
    try:
        yield
    except (StoreError, MissingExtra):
        raise
    except Exception as error:
        # A panic of LanceDB's Rust code is of a class that it does not export.
        if not isinstance(error, (ValueError, RuntimeError, OSError)) and type(error).__name__ != "RustPanic":
            raise
        raise StoreError(f"store {uri}: {doing} failed: {error}") from error

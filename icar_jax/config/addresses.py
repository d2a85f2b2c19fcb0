"""Paths of this machine told from addresses in buckets and on the web."""

import os
import re

from icar_jax.errors import ConfigError

# pathlib makes s3:/bucket of s3://bucket, so one slash is enough; a letter alone may be a drive.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def not_local(value: str | os.PathLike | bytes) -> str | None:
    """Why `value` is not a path of this machine; None where it is one.

    s3://bucket/name, gs://, https://, file:// and every other scheme count as addresses, also after pathlib has folded their
    slashes. A local folder whose name ends in a colon is written ./s3:/name.
    """
    text = os.fsdecode(value)
    if not _ADDRESS.match(text):
        return None
    return f"{text} is an address, and only paths of this machine are read and written here"


def require_local(name: str, value: str | os.PathLike) -> None:
    """Raises ConfigError where an option `name` that takes a path is given an address such as s3://bucket/run."""
    if (why := not_local(value)) is not None:
        raise ConfigError(
            f"{name}: {why}; give a folder or file on a disk, or mount the bucket (gcsfuse, mountpoint-s3) and give its folder"
        )

"""Paths of this machine told from addresses in buckets and on the web, and from names on the Hugging Face hub."""

import os
import re
from dataclasses import dataclass

from icar_jax.errors import ConfigError

# pathlib makes s3:/bucket of s3://bucket, so one slash is enough; a letter alone may be a drive.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_SCHEMES = ("hf://", "hf-hub:", "hf_hub:")  # the last two are OpenCLIP's and timm's
_PART = r"[A-Za-z0-9_][\w.-]*"
_HUB = re.compile(
    rf"(?P<repository>{_PART}/{_PART})(@(?P<revision>refs/(?:pr|convert)/[\w.-]+|[\w.-]+))?(/(?P<inside>.+))?", re.ASCII
)
HUB_FORMS = "owner/name, or hf://owner/name@revision/file; revision and file may be left out"


@dataclass(frozen=True)
class HubName:
    """A repository on the Hugging Face hub.

    Attributes:
        repository: owner/name.
        revision: a branch, tag or commit; '' is the main branch.
        inside: a file or folder of the repository; '' is its top.
        explicit: whether the text begins with hf://, hf-hub: or hf_hub:, so that it can be no path.
    """

    repository: str
    revision: str = ""
    inside: str = ""
    explicit: bool = False

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def hub_name(value: str | os.PathLike | bytes) -> HubName | None:
    """The repository that a string may name; None for any other string, and for a path object.

    Raises ConfigError for a string that begins as a name on the hub and does not go on as one.
    """
    if not isinstance(value, str):
        return None
    scheme = next((scheme for scheme in _SCHEMES if value.startswith(scheme)), "")
    found = _HUB.fullmatch(value.removeprefix(scheme))
    if found is None:
        if scheme:
            raise ConfigError(f"{value} names no repository on the Hugging Face hub; expected {HUB_FORMS}")
        return None
    if found["inside"] and not scheme:
        return None  # a path with more than two parts
    return HubName(found["repository"], found["revision"] or "", found["inside"] or "", bool(scheme))


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


def require_weights(name: str, value: str | os.PathLike) -> None:
    """As `require_local`, of an option that also takes a name on the Hugging Face hub."""
    try:
        if hub_name(value) is not None:
            return
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    require_local(name, value)

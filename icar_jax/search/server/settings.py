"""Server settings, validated before anything is opened."""

from __future__ import annotations

import ipaddress
import os
import re
import shlex
import stat
from dataclasses import dataclass

from absl import logging

from icar_jax.files import limits
from icar_jax.files.opening import open_regular
from icar_jax.search.server.errors import ServerError

MIN_TOKEN = 16
_TOKEN_BYTES = 4096
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\]")


@dataclass(frozen=True)
class ServerSettings:
    """Limits and access control of `icar serve`.

    Attributes:
        host, port: address to listen on; port 0 selects a free one.
        token: secret required in every request; may be None only on a loopback address.
        allowed_hosts: additional host names for a server on a loopback address behind a proxy.
        max_upload_bytes: limit of an uploaded image file.
        max_pixels: limit of uploaded images, and of indexed images decoded for previews.
        queue: searches that may wait while one runs; further ones get status 503.
        timeout_s: limit for receiving a request, and for answering it.
        follow_links: whether to serve files that links reach outside the indexed folders.
        preview_cache_bytes: memory of the preview cache.
        preview_threads: previews computed in parallel; 32 times as many may wait.
        connections: connections at once; the one that has been idle longest gives way to a new one.
        requests: requests in progress at once; further ones get status 503.
        header_timeout_s: limit for receiving the headers of a request.
        stall_timeout_s: limit for a client to take what was sent before more is sent.

    Raises:
        ServerError: for invalid or contradictory values, or if the images would be accessible without a token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_upload_bytes: int = 20_000_000
    max_pixels: int = 50_000_000
    queue: int = 32
    timeout_s: float = 30.0
    follow_links: bool = False
    preview_cache_bytes: int = 64_000_000
    preview_threads: int = 2
    connections: int = 512
    requests: int = 256
    header_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_upload_bytes", "max_pixels", "queue", "timeout_s", "preview_threads", "connections", "requests",
                     "header_timeout_s", "stall_timeout_s"):  # fmt: skip
            value, most = getattr(self, name), limits.THREADS if name == "preview_threads" else 10**12
            if not 0 < value <= most:  # NaN is not either
                raise ServerError(f"{name} must be positive and at most {most:,}, got {value!r:.40}")
        if not 0 <= self.port <= 65535:
            raise ServerError(f"--port must be between 0 and 65535, got {self.port}")
        if self.token is not None:
            check_token(self.token, "--token")
        elif not is_loopback(self.host):
            raise ServerError(
                f"--host {self.host} is reachable from other machines, which could access the images without a token: add "
                "--token-file FILE, or use --host 127.0.0.1 to serve only this machine"
            )
        elif self.allowed_hosts:
            raise ServerError("--allowed-host makes the images accessible under other host names: add --token-file FILE")
        for name in self.allowed_hosts:
            if not _HOST.fullmatch(name):
                raise ServerError(f"--allowed-host expects a lower-case host name without scheme and port, got {name!r}")

    @property
    def hosts(self) -> frozenset[str] | None:
        """Allowed names in the Host header; None if any is allowed.

        On a loopback address, the check prevents DNS rebinding, in which another site's name resolves to this server. On other
        addresses the token prevents it, since browsers have no cookie for that name.
        """
        if not is_loopback(self.host):
            return None
        return frozenset({"localhost", "127.0.0.1", "[::1]", _in_header(self.host), *self.allowed_hosts})


def is_loopback(host: str) -> bool:
    """Whether a host is a loopback address, reachable only from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _in_header(host: str) -> str:
    return f"[{host.lower()}]" if ":" in host else host.lower()


def address(host: str, port: int) -> str:
    """The URL of the page."""
    return f"http://{_in_header(host)}:{port}/"


def read_token(path: str | os.PathLike) -> str:
    """Reads the token, the only line of a file, and warns if other users may read it.

    Raises ServerError if it is invalid, and OSError if the file is unreadable.
    """
    try:
        with open_regular(path, _TOKEN_BYTES) as file:
            others = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077
            token = file.read().decode("utf-8").strip()
    except UnicodeDecodeError:
        raise ServerError(f"--token-file {path}: expected one line of text, found other bytes") from None
    if others:
        logging.warning("--token-file %s can be read or changed by other users of this machine; mend it with: chmod 600 %s",
                        path, shlex.quote(os.fspath(path)))  # fmt: skip
    return check_token(token, f"--token-file {path}")


def check_token(token: str, where: str) -> str:
    """Returns the token. Raises ServerError if it is too short or cannot be sent in a header; `where` names its source."""
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ServerError(
            f"{where}: expected a token of at least {MIN_TOKEN} printable ASCII characters without spaces, found "
            f"{len(token)} characters; generate one with: python -c 'import secrets; print(secrets.token_urlsafe(24))'"
        )
    return token

"""What a server is started with, checked before anything is opened."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path

from icar_jax.search.server.errors import ServerError

MIN_TOKEN = 16
_HOST = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?|\[[0-9a-f:.]+\]")


@dataclass(frozen=True)
class ServerSettings:
    """Limits and access of `icar serve`.

    Attributes:
        host, port: address that is listened at; port 0 takes a free one.
        token: secret that every request must carry; None on the machine's own address only.
        allowed_hosts: further names by which browsers may address a server on the machine's own address, behind a proxy.
        max_upload_bytes: of an uploaded image file.
        max_pixels: of an uploaded image, and of an indexed one that a preview is made of.
        queue: searches that may wait while one runs; further ones are answered 503.
        timeout_s: longest wait for an upload to arrive, and for a search to be answered.
        follow_links: whether files are served that a link reaches outside the folders that were indexed.
        preview_cache_bytes: memory for finished previews.
        preview_threads: previews made at a time; eight times as many may wait.

    Raises:
        ServerError: for values that exclude each other or would leave the pictures open to others.
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

    def __post_init__(self) -> None:
        for name in ("max_upload_bytes", "max_pixels", "queue", "timeout_s", "preview_threads"):
            if getattr(self, name) <= 0:
                raise ServerError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.port <= 65535:
            raise ServerError(f"--port must lie in 0 to 65535, got {self.port}")
        if self.token is not None:
            check_token(self.token, "--token")
        elif not is_loopback(self.host):
            raise ServerError(
                f"--host {self.host} can be reached from other machines, and nothing would keep them from the pictures: add "
                "--token-file FILE, or serve this machine only with --host 127.0.0.1"
            )
        elif self.allowed_hosts:
            raise ServerError("--allowed-host makes the pictures reachable by other names: add --token-file FILE")
        for name in self.allowed_hosts:
            if not _HOST.fullmatch(name):
                raise ServerError(f"--allowed-host takes a host name in lower case, without scheme and port, got {name!r}")

    @property
    def hosts(self) -> frozenset[str] | None:
        """Names that the Host header may carry; None where any may.

        On the machine's own address a page of another site could otherwise have its name resolve to this server, and read it
        (DNS rebinding). Elsewhere the token keeps such a page out: the browser holds no cookie for its name.
        """
        if not is_loopback(self.host):
            return None
        return frozenset({"localhost", "127.0.0.1", "[::1]", _in_header(self.host), *self.allowed_hosts})


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _in_header(host: str) -> str:
    return f"[{host.lower()}]" if ":" in host else host.lower()


def address(host: str, port: int) -> str:
    """The page's address."""
    return f"http://{_in_header(host)}:{port}/"


def read_token(path: str) -> str:
    """The token that a file holds on its only line. Raises ServerError for anything else, OSError where it cannot be read."""
    try:
        token = Path(path).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise ServerError(f"--token-file {path}: expected one line of text, found other bytes") from None
    return check_token(token, f"--token-file {path}")


def check_token(token: str, where: str) -> str:
    """The token. Raises ServerError where it could be guessed or cannot be sent in a header."""
    if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ServerError(
            f"{where}: expected a token of at least {MIN_TOKEN} printable ASCII characters without spaces, found "
            f"{len(token)} characters; make one with: python -c 'import secrets; print(secrets.token_urlsafe(24))'"
        )
    return token

"""Static files of the web page."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
          "svg": "image/svg+xml"}  # fmt: skip
_FILES = ("index.html", "app.css", "app.js", "view.js", "icon.svg")


@dataclass(frozen=True)
class Page:
    """A static file and its media type."""

    content: bytes
    media_type: str

    @property
    def sha256(self) -> str:
        """SHA-256 of the content as hex, used as ETag."""
        return hashlib.sha256(self.content).hexdigest()


def read_page(name: str) -> Page:
    """Reads a static file by name."""
    content = resources.files(__package__).joinpath("static", name).read_bytes()
    return Page(content, _TYPES[name.rpartition(".")[2]])


def load_pages() -> dict[str, Page]:
    """All static files that browsers may request, by name."""
    return {name: read_page(name) for name in _FILES}

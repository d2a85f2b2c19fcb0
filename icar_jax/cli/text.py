"""Text of others on a terminal: names of files and captions, which may hold anything."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # turn the order of what stands beside them


def printable(text: str) -> str:
    """The text in one line, with what would steer a terminal spelled out: ESC as \\x1b, a newline as \\n."""
    return "".join(_escaped(c) if _steers(c) else c for c in text)


def _steers(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or ord(c) in _DIRECTIONS


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")

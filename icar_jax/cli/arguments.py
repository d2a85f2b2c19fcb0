"""Flags that several commands take, and their values."""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence

from icar_jax.config import require_local

# A store may lie in a bucket; the others are no places at all.
_NO_PATHS = {"command", "store", "query", "where", "token", "host", "allowed_host", "coordinator", "overrides", "config"}


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return value


def add_images(p: argparse.ArgumentParser, done: str, batch_size: int, nargs: str = "+") -> None:
    """Flags of a command that reads images of any number: which, how many at a time, and what the unreadable ones do."""
    p.add_argument("paths", nargs=nargs, metavar="PATH", help="image, folder (with all below it) or pattern; - reads a list of "
                   "images and folders from standard input, one a line")  # fmt: skip
    p.add_argument("--skip-bad", action="store_true", help=f"exit status 0 although images could not be {done}")
    p.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help=f"images at a time ({batch_size})")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of activations (float32)")
    p.add_argument("--threads", type=positive, default=0, metavar="N", help="threads that decode; one a core by default")


def require_local_paths(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Raises ConfigError where an option that takes a path of this machine is given an address such as s3://bucket/name.

    Every text is such a path but for those in _NO_PATHS; `words` are the arguments as they were typed.
    """
    for name, value in vars(args).items():
        option = "--" + name.replace("_", "-")
        typed = option if any(word.partition("=")[0] == option for word in words) else name.upper()
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and name not in _NO_PATHS:
                require_local(typed, text)


def stdin_paths() -> Iterator[str]:
    """The lines of standard input, as the file system spells names: a list may hold names that are not valid UTF-8."""
    return (os.fsdecode(line) for line in sys.stdin.buffer)


_DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # turn the order of what stands beside them


def printable(text: str) -> str:
    """The text in one line, with what would steer a terminal spelled out: ESC as \\x1b, a newline as \\n."""
    return "".join(_escaped(c) if _steers(c) else c for c in text)


def _steers(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or ord(c) in _DIRECTIONS


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")

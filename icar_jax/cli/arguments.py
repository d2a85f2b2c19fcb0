"""Flags shared by several commands, and parsing of their values."""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence

from icar_jax.config import require_local, require_weights
from icar_jax.files import limits

# Arguments that are not local paths; a store may be in an object store.
_NO_PATHS = {
    "command",
    "store",
    "query",
    "where",
    "by",
    "split",
    "image_column",
    "caption_column",
    "exclude",
    "token",
    "host",
    "allowed_host",
    "coordinator",
    "overrides",
    "config",
}
_WEIGHTS = {"source", "base", "image", "text", "checkpoint", "repository"}  # may also be names on the Hugging Face hub


def positive(text: str) -> int:
    """Parses an integer >= 1. Raises argparse.ArgumentTypeError."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, found {text!r}")
    return value


def threads(text: str) -> int:
    """Parses a number of threads. Raises argparse.ArgumentTypeError beyond the limit for one program."""
    if (value := positive(text)) > limits.THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {limits.THREADS} threads, found {text!r}")
    return value


def add_images(p: argparse.ArgumentParser, done: str, batch_size: int, nargs: str = "+") -> None:
    """Adds flags of commands that read many images; `done` is the participle for help texts, such as 'scored'."""
    p.add_argument("paths", nargs=nargs, metavar="PATH", help="image, folder (recursive) or glob pattern; - reads a list of "
                   "images and folders from standard input, one per line")  # fmt: skip
    p.add_argument("--exclude", action="append", default=[], metavar="GLOB", help="leave out files and folders of this "
                   "name or, with a slash, of this path below PATH; may be repeated")  # fmt: skip
    p.add_argument("--skip-bad", action="store_true", help=f"exit with status 0 even if images could not be {done}")
    p.add_argument("--batch-size", type=positive, default=batch_size, metavar="N", help=f"batch size ({batch_size})")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="dtype of activations (float32)")
    p.add_argument("--threads", type=threads, default=0, metavar="N", help="decoding threads (one per core, up to 8)")


def add_profile(p: argparse.ArgumentParser, default: str) -> None:
    """Adds --profile; its value is None without the flag and "" without a folder, which `default` describes."""
    p.add_argument("--profile", nargs="?", const="", metavar="DIR", help="show where the time goes: prints a summary and also "
                   f"writes it to DIR/summary.json, with a trace of ten batches in DIR/trace ({default})")  # fmt: skip


def require_local_paths(args: argparse.Namespace, words: Sequence[str]) -> None:
    """Raises ConfigError if an option for a local path is given an address such as s3://bucket/name.

    All string arguments are local paths except those in _NO_PATHS; `words` is the command line.
    """
    for name, value in vars(args).items():
        option = "--" + name.replace("_", "-")
        typed = option if any(word.partition("=")[0] == option for word in words) else name.upper()
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, str) and name not in _NO_PATHS:
                (require_weights if name in _WEIGHTS else require_local)(typed, text)


def stdin_paths() -> Iterator[str]:
    """Yields the lines of standard input, decoded like file names, which may not be valid UTF-8."""
    return (os.fsdecode(line) for line in sys.stdin.buffer)


_DIRECTIONS = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}  # Unicode bidirectional control characters


def printable(text: str) -> str:
    """The text on one line with control characters escaped: ESC as \\x1b, a newline as \\n."""
    return "".join(_escaped(c) if _is_control(c) else c for c in text)


def _is_control(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or ord(c) in _DIRECTIONS


def _escaped(c: str) -> str:
    return c.encode("unicode_escape").decode("ascii")

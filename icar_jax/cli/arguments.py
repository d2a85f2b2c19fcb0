"""Values of flags that several commands take."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, found {text!r}")
    return value


def stdin_paths() -> Iterator[str]:
    """The lines of standard input, as the file system spells names: a list may hold names that are not valid UTF-8."""
    return (os.fsdecode(line) for line in sys.stdin.buffer)

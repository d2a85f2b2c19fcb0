"""What a reader under test is, and what it may do with an input."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.fuzz.mutations import CUT, Change


class WrongSilence(AssertionError):
    """An input was accepted that must be refused, or read as something else than it holds."""


@dataclass
class Reader:
    """A reader of one kind of input.

    Attributes:
        prepare: writes what lies beside the input into a new folder, and returns the valid inputs that are changed.
        read: (folder, input) -> what was read. Raises IcarError or OSError where it refuses.
        change: makes a new input of the valid ones.
        megabytes: bound of memory that one input may take beyond what the process holds.
        refuses_cut: whether every input that was cut to less than half must be refused.
        refuses_changes: whether every input but the valid ones must be refused, as a checksum does.
        make_handmade: makes name -> (input, None if it must be refused, else what `read` must return).
    """

    name: str
    prepare: Callable[[Path], list[bytes]]
    read: Callable[[Path, bytes], Any]
    change: Change
    megabytes: float = 256
    refuses_cut: bool = False
    refuses_changes: bool = False
    make_handmade: Callable[[], dict[str, tuple[bytes, Any]]] = dict

    @functools.cached_property
    def handmade(self) -> dict[str, tuple[bytes, Any]]:
        return self.make_handmade()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "handmade"}

    def run(self, folder: Path, seeds: list[bytes], data: bytes, kind: str) -> None:
        """Reads one input. Raises what `read` raises, and WrongSilence for an answer that is not right."""
        found = self.read(folder, data)
        if kind in self.handmade:
            expected = self.handmade[kind][1]
            if expected is None or found != expected:
                raise WrongSilence(f"read as {found!r:.200}, expected {'an error' if expected is None else repr(expected)}")
        elif data not in seeds and (self.refuses_changes or (self.refuses_cut and kind == CUT)):
            raise WrongSilence(f"accepted after the change '{kind}'")


DEPTHS = b"[" * 200_000
NOT_OBJECTS = {"list": b"[]", "null": b"null", "number": b"3", "nested": DEPTHS, "empty": b"", "half": b'{"a": '}


def refused(**inputs: bytes) -> dict[str, tuple[bytes, Any]]:
    """Handmade inputs that must be refused."""
    return {name: (data, None) for name, data in inputs.items()}

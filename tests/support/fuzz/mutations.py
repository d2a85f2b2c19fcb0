"""Seeded changes of files: of bytes, of the values of JSON, of lines of text."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

CUT = "cut"  # the kind of change that leaves the first part of a file alone
_WORDS = [
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\1\0\0\0",
    b"\xff",
    b"\0",
    b"{",
    b"[" * 99,
    b'"',
    b"\n",
]
VALUES: list[Any] = [
    None, True, False, [], {}, "", "x" * 1000, "\ud800", "../../x", "\0", 0, -1, 1, 2, 7, 10**9, 2**31, 2**63, 10**24, 10**400,
    -(2**63), 0.5,
    1e-300, 1e300, float("inf"), float("-inf"), float("nan"), [[]], [0], [-1], [1.5, "a"], ["a"] * 50, [1, 2, 3, 4],
    {"a": {"b": []}}, [[[[[[[[[[]]]]]]]]]], "gelu", "1",
]  # fmt: skip


def change_bytes(rng: random.Random, seeds: list[bytes]) -> tuple[bytes, str]:
    """(one of the files with one to eight changes, the kind of change)."""
    data = bytearray(rng.choice(seeds))
    if rng.random() < 0.1:
        return bytes(data[: rng.randrange(len(data) // 2 + 1)]), CUT
    for _ in range(2 ** rng.randrange(4)):
        _change(rng, data, seeds)
    return bytes(data), "bytes"


def _change(rng: random.Random, data: bytearray, seeds: list[bytes]) -> None:
    # Headers come first: half of the changes go there.
    end = len(data) + 1 if rng.random() < 0.5 else min(len(data), 64) + 1
    at = rng.randrange(end)
    kind = rng.randrange(6)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = rng.randrange(256)
    elif kind == 2:
        word = rng.choice(_WORDS)
        data[at : at + len(word)] = word
    elif kind == 3:
        del data[at : at + 2 ** rng.randrange(10)]
    elif kind == 4:
        data[at:at] = data[at : at + 2 ** rng.randrange(10)] * rng.choice((1, 1, 1, 50))
    else:
        other = rng.choice(seeds)
        start = rng.randrange(len(other) + 1)
        data[at : at + rng.randrange(1, 200)] = other[start : start + rng.randrange(1, 200)]


def change_json(rng: random.Random, seeds: list[bytes]) -> tuple[bytes, str]:
    """(one of the files with one to three values exchanged, removed, repeated or nested; the kind of change)."""
    kind = rng.random()
    if kind < 0.1:
        return change_bytes(rng, seeds)
    if kind < 0.12:
        return rng.choice(
            (b"[" * 100_000, b'{"a":' * 50_000, b"null", b"[]", b"3", b'"x"', b"", b"\xff\xfe{", b"NaN", b"{}")
        ), "whole"
    content = json.loads(rng.choice(seeds).decode("utf-8-sig"))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = _exchange(rng, content)
    return json.dumps(content).encode(), "json"


def _exchange(rng: random.Random, content: Any) -> Any:
    places = list(_places(content))
    if not places:
        return copy.deepcopy(rng.choice(VALUES))
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "depth", str(key) + "s", "\ud800", "0"))] = copy.deepcopy(holder[key])
    elif kind == 2:
        for _ in range(rng.choice((1, 1, 1, 1, 1, 70, 400))):
            holder[key] = [holder[key]]
    elif kind == 3 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
        holder[key] = rng.choice((-holder[key], holder[key] + 1, holder[key] * 10**6, float(holder[key]), str(holder[key])))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return content


def _places(content: Any) -> Any:
    keys = list(content) if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in keys:
        yield content, key
        yield from _places(content[key])


def change_lines(rng: random.Random, seeds: list[bytes]) -> tuple[bytes, str]:
    """(one of the text files with lines exchanged, doubled or of another content; the kind of change)."""
    lines = rng.choice(seeds).split(b"\n")
    for _ in range(rng.choice((1, 2, 5))):
        at = rng.randrange(len(lines))
        words = lines[at].split(b" ") if b" " in lines[at] else lines[at].split(b",")
        new = json.dumps(rng.choice(VALUES)).encode()[:2000]
        kind = rng.randrange(5)
        if kind == 0:
            words[rng.randrange(len(words))] = new
            lines[at] = (b" " if b" " in lines[at] else b",").join(words)
        elif kind == 1:
            lines[at] = new
        elif kind == 2:
            lines.insert(at, rng.choice(lines))
        elif kind == 3 and len(lines) > 1:
            del lines[at]
        else:
            lines[at] = change_bytes(rng, [lines[at] + b" "])[0]
    return b"\n".join(lines), "lines"


Change = Callable[[random.Random, list[bytes]], tuple[bytes, str]]

"""One reader for all JSON: regular files within bounds, and typed access that names the file and the field.

Whatever is wrong with a file ends in one line of the error class that the caller gives: bytes that are no UTF-8, text that is
no JSON, values nested too deep, a list where an object belongs, and fields that are missing, of another type or impossible.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from icar_jax.errors import DataError, IcarError
from icar_jax.files import limits
from icar_jax.files.opening import read_regular

_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list"}


def parse(
    text: bytes | str, where: str | os.PathLike, error: type[IcarError] = DataError,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:  # fmt: skip
    """The JSON value of a text, or of bytes in UTF-8 with or without a byte order mark.

    `pairs` makes something else of an object's (key, value) pairs than a dict. Raises `error`, which names `where`, for what is
    no JSON, and for more than JSON_DEPTH nested objects and lists.
    """
    try:
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text, object_pairs_hook=pairs)
    except RecursionError as fault:
        raise error(f"{where}: nested deeper than the limit of {limits.JSON_DEPTH} objects and lists") from fault
    except ValueError as fault:
        raise error(f"{where}: not valid JSON in UTF-8: {str(fault)[:200]}") from fault
    _require_shallow(value, where, error)
    return value


def read(
    path: str | os.PathLike, error: type[IcarError] = DataError, most: int = limits.JSON_BYTES,
    pairs: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:  # fmt: skip
    """The JSON value of a regular file of at most `most` bytes. Raises `error`, also if it cannot be read."""
    try:
        data = read_regular(path, most)
    except OSError as fault:
        raise error(f"cannot read {os.fspath(path)}: {fault.strerror or fault}") from fault
    return parse(data, path, error, pairs)


def read_object(path: str | os.PathLike, error: type[IcarError] = DataError) -> dict[str, Any]:
    """The JSON object of a regular file. Raises `error` as `read`, and for any other value."""
    return require_object(read(path, error), path, error)


def require_object(value: Any, where: str | os.PathLike, error: type[IcarError] = DataError) -> dict[str, Any]:
    """`value`, if it is an object. Raises `error`, naming `where`, otherwise."""
    if not isinstance(value, dict):
        raise error(f"{where}: expected a JSON object, found {_shown(value)}")
    return value


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `pairs` of `parse`: a dict, or an error where a key occurs twice and one value would be lost."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _require_shallow(value: Any, where: str | os.PathLike, error: type[IcarError]) -> None:
    level = [value]
    for _ in range(limits.JSON_DEPTH):
        level = [part for whole in level for part in _parts(whole) if isinstance(part, dict | list | tuple)]
        if not level:
            return
    raise error(f"{where}: nested deeper than the limit of {limits.JSON_DEPTH} objects and lists")


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


@dataclass(frozen=True)
class Fields:
    """A JSON object and its place for messages (`where`). A value of null counts as absent.

    Subclasses set `error`, the class that their methods raise.
    """

    where: str
    content: Mapping[str, Any] = field(default_factory=dict)
    error: ClassVar[type[IcarError]] = DataError

    @classmethod
    def read(cls, path: str | os.PathLike) -> Self:
        """The object in a file. Raises `error` where it cannot be read or is no object."""
        return cls(os.fspath(path), read_object(Path(path), cls.error))

    def __bool__(self) -> bool:
        return bool(self.content)

    def section(self, name: str) -> Self:
        """The object under `name`, empty where there is none. Raises `error` for anything but an object."""
        value = self.content.get(name)
        if value is None:
            return type(self)(f"{self.where}: {name}")
        if not isinstance(value, Mapping):
            raise self.error(f"{self.where}: {name} must be an object, found {_shown(value)}")
        return type(self)(f"{self.where}: {name}", value)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of `name`, or `default`. Raises `error` for a value of another type, NaN, infinity, and beyond 2^63."""
        value = self.content.get(name)
        if value is None:
            return default
        fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
        # Integers of any length are JSON; as numbers of a model they are a fault, and float() of them overflows.
        fits = fits and not (isinstance(value, int) and abs(value) >= 1 << 63)
        if not fits or (kind is float and not math.isfinite(value)):
            raise self.error(f"{self.where}: {name} must be {_KINDS[kind]}, found {_shown(value)}")
        return float(value) if kind is float else value

    def required(self, name: str, kind: type) -> Any:
        """As `get`. Raises `error` where there is no value too."""
        if self.content.get(name) is None:
            raise self.error(f"{self.where}: {name} is missing; expected {_KINDS[kind]}")
        return self.get(name, kind)

    def positive(self, name: str, kind: type, default: Any = None) -> Any:
        """As `get`, for a size or an epsilon. Raises `error` for zero and below, and for a size above SIZE, too."""
        value = self.get(name, kind, default)
        if value is not None and not 0 < value <= limits.SIZE:
            raise self.error(f"{self.where}: {name} must be positive and at most {limits.SIZE:,}, found {_shown(value)}")
        return value

    def numbers(self, name: str, kind: type) -> tuple[Any, ...]:
        """The list of numbers under `name`. Raises `error` for a missing list, and as `get` for its entries."""
        listed = self.required(name, list)
        each = type(self)(self.where, {f"{name}[{i}]": value for i, value in enumerate(listed)})
        return tuple(each.required(place, kind) for place in each.content)

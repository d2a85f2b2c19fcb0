"""Typed access to other libraries' JSON configuration files: every value is checked where it is read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icar_jax.errors import IcarError


class ConvertError(IcarError, ValueError):
    """Weights cannot be converted or exported as requested; the message gives place, expectation, finding and fix."""


_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Fields:
    """A JSON object and its place for messages (`where`). A value of null counts as absent."""

    where: str
    content: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.content)

    def section(self, name: str) -> Fields:
        """The object under `name`, empty where there is none. Raises ConvertError for anything but an object."""
        value = self.content.get(name)
        if value is None:
            return Fields(f"{self.where}: {name}")
        if not isinstance(value, Mapping):
            raise ConvertError(f"{self.where}: {name} must be an object, found {value!r:.80}")
        return Fields(f"{self.where}: {name}", value)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of `name`, or `default`. Raises ConvertError for a value of another type and for NaN and infinity."""
        value = self.content.get(name)
        if value is None:
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits or (kind is float and not math.isfinite(value)):
            raise ConvertError(f"{self.where}: {name} must be {_KINDS[kind]}, found {value!r:.80}")
        return value

    def positive(self, name: str, kind: type, default: Any = None) -> Any:
        """As `get`, for a size or an epsilon. Raises ConvertError for zero and below too."""
        value = self.get(name, kind, default)
        if value is not None and not value > 0:
            raise ConvertError(f"{self.where}: {name} must be positive, found {value!r}")
        return value


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises ConvertError, naming the file, where it cannot be read or is no object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConvertError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise ConvertError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content

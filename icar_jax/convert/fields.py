"""Reading configuration files of other libraries: every value is held to its type where it is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from icar_jax.errors import IcarError


class ConvertError(IcarError, ValueError):
    """A source cannot be converted as asked; the message says where, what was expected, what was found, and the fix."""


_KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false", list: "a list"}


@dataclass(frozen=True)
class Fields:
    """A JSON object and where it stands. A value of null counts as absent."""

    where: str
    content: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.content)

    def section(self, name: str) -> Fields:
        """The object below `name`, empty where there is none. Raises ConvertError for anything but an object."""
        value = self.content.get(name)
        if value is None:
            return Fields(f"{self.where}: {name}")
        if not isinstance(value, Mapping):
            raise ConvertError(f"{self.where}: {name} must be an object, found {value!r:.80}")
        return Fields(f"{self.where}: {name}", value)

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The value of `name`, or `default`. Raises ConvertError where it is of another type, or not finite."""
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
        """`get` for a size or an epsilon: above zero."""
        value = self.get(name, kind, default)
        if value is not None and not value > 0:
            raise ConvertError(f"{self.where}: {name} must be positive, found {value!r}")
        return value

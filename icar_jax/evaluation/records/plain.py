"""Records as JSON: a dataclass becomes an object with one key per field, in the order of the fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

_BESIDE = "beside"


def optional(beside: str = "") -> Any:
    """Declares a field that is None by default, and left out of the JSON as long as it, or the field `beside`, is None."""
    return dataclasses.field(default=None, kw_only=True, metadata={_BESIDE: beside})


def plain(value: Any) -> Any:
    """Converts a record to what JSON holds: dicts, lists, numbers, texts and None.

    Integer keys, such as exits, become text. An underscore that keeps a field's name from being a Python keyword is dropped.
    Raises ValueError for NaN or inf, for other keys and for other types; the message gives the path of keys.
    """
    return _plain(value, ())


def _plain(value: Any, where: tuple[str, ...]) -> Any:
    place = "/".join(where) or "the top level"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = _fields(value)
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (str, int)) or isinstance(key, bool):
                raise ValueError(f"metrics: key {key!r} at {place} must be text or an integer")
        return {str(key): _plain(item, (*where, str(key))) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, (*where, str(i))) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"metrics: {place} is {value}, expected a finite number (or None for 'not measured')")
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise ValueError(f"metrics: {place} is a {type(value).__name__}, expected a number, text, list, dict, dataclass or None")


def _fields(record: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(record):
        beside = field.metadata.get(_BESIDE)
        if beside is None or getattr(record, beside or field.name) is not None:
            found[field.name.rstrip("_")] = getattr(record, field.name)
    return found

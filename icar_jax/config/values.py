"""Which values a field of a configuration or of an architecture takes, by its annotation."""

import dataclasses
import math
import typing
from typing import Any

from icar_jax.errors import ConfigError

LARGEST_INTEGER = (1 << 63) - 1  # of any field; rules of single fields are narrower


def typed(name: str, value: Any, want: Any) -> Any:
    """`value` as the annotation `want` has it: lists become tuples.

    `want` is int, float (which integers are too), str, bool, a dataclass, or a tuple[want, ...]. Raises ConfigError, naming the
    field, for another type.
    """
    if typing.get_origin(want) is tuple:
        inner = typing.get_args(want)[0]
        nested = typing.get_origin(inner) is tuple
        if not isinstance(value, tuple | list) or not (nested or all(_is(each, inner) for each in value)):
            of = "tuples" if nested else inner.__name__
            example = {int: "(3,)", float: "(0.5,)", str: "('a',)"}.get(inner, "((3,),)")
            raise ConfigError(f"{name}={value!r:.200} must be a tuple of {of}, for example {example}")
        return tuple(typed(f"{name}[{i}]", each, inner) for i, each in enumerate(value)) if nested else tuple(map(inner, value))
    if not _is(value, want):
        shown = "" if dataclasses.is_dataclass(want) else f"={value!r:.200}"
        raise ConfigError(f"{name}{shown} must be of type {want.__name__}, found {type(value).__name__}")
    return value


def require_finite(name: str, value: Any) -> None:
    """Raises ConfigError for NaN, infinity and integers beyond 64 bits, alone or in (nested) tuples."""
    if isinstance(value, tuple):
        for each in value:
            require_finite(name, each)
    elif isinstance(value, int) and abs(value) > LARGEST_INTEGER or isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}={value!r:.60} must be a finite number of at most 64 bits")


def _is(value: Any, want: type) -> bool:
    if isinstance(value, bool):
        return want is bool
    if want is float and isinstance(value, int):
        return abs(value) <= LARGEST_INTEGER  # float() of larger ones overflows
    return isinstance(value, want)

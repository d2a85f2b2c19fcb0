"""How a wrong name in a configuration is answered."""

import difflib
import typing
from typing import Any

from icar_jax.errors import ConfigError


def unknown(name: str, value: Any, choices: typing.Iterable[str]) -> ConfigError:
    """The error for a value outside a fixed list of names, with the nearest name where one is near."""
    choices = list(choices)
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}{hint}")


def no_field(group: str, name: str, fields: typing.Iterable[str]) -> ConfigError:
    fields = sorted(fields)
    near = difflib.get_close_matches(name, fields, n=1)
    hint = f"did you mean {group}.{near[0]}? " if near else ""
    return ConfigError(f"{group}.{name} is no field of the configuration; {hint}{group} has {', '.join(fields)}")

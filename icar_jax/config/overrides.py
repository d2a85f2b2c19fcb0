"""Configurations as JSON and as overrides on a command line."""

import dataclasses
import json
import typing
from typing import Any

from icar_jax.config.errors import no_field
from icar_jax.config.schema import ExperimentConfig
from icar_jax.errors import ConfigError


def check_override(path: str, cls: type = ExperimentConfig) -> None:
    """Raises ConfigError where `config.a.b` names no field of the configuration, with the nearest field that exists."""
    node, seen = cls, list[str]()
    for part in path.split(".")[1:]:
        if not dataclasses.is_dataclass(node):
            raise ConfigError(f"{path} goes below the field {'.'.join(['config', *seen])}, which has none of its own")
        hints = typing.get_type_hints(node)
        if part not in hints:
            raise no_field(".".join(["config", *seen]), part, hints)
        node = hints[part]
        seen.append(part)
    if dataclasses.is_dataclass(node):
        raise ConfigError(f"{path} is a group of fields; override one of {', '.join(typing.get_type_hints(node))}")


def to_json(config: ExperimentConfig) -> str:
    """The whole configuration as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_dict(values: dict[str, Any], cls: type = ExperimentConfig, prefix: str = "config") -> Any:
    """The inverse of `dataclasses.asdict`; an unknown field raises ConfigError with the nearest known name."""
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise no_field(prefix, key, known)
    made = {}
    for key, value in values.items():
        want = hints[key]
        if dataclasses.is_dataclass(want):
            value = from_dict(value, typing.cast(type, want), f"{prefix}.{key}")
        elif typing.get_origin(want) is tuple:
            value = tuple(value)
        made[key] = value
    return cls(**made)

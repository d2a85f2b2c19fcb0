"""Configurations as JSON and as overrides on a command line."""

import dataclasses
import json
import typing
from typing import Any

from icar_jax.config.errors import no_field
from icar_jax.config.schema import ExperimentConfig
from icar_jax.config.values import require_finite, typed
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


def from_dict(values: Any, cls: type = ExperimentConfig, prefix: str = "config") -> Any:
    """The inverse of `dataclasses.asdict`, of values as JSON has them.

    Raises ConfigError, naming the field after `prefix`, for anything but an object, an unknown field (with the nearest known
    name), a field that is missing or of another type, and a combination that `cls` refuses.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix}: expected an object, found {values!r:.80}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise no_field(prefix, key, fields)
    missing = [name for name, f in fields.items() if name not in values and _is_required(f)]
    if missing:
        raise ConfigError(f"{prefix}: missing {', '.join(missing)}")
    made = {}
    for key, value in values.items():
        want = hints[key]
        if dataclasses.is_dataclass(want):
            made[key] = from_dict(value, typing.cast(type, want), f"{prefix}.{key}")
        else:
            made[key] = typed(f"{prefix}.{key}", value, want)
            require_finite(f"{prefix}.{key}", made[key])
    try:
        return cls(**made)
    except ConfigError:
        raise
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{prefix}: {error}") from error


def _is_required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING

"""Rules that stand beside the fields of a configuration. Each checks one value and raises ConfigError."""

import re
import typing
from dataclasses import dataclass, field
from typing import Any

from icar_jax.config.addresses import require_local, require_weights
from icar_jax.config.choices import FreezeGroup
from icar_jax.config.errors import unknown
from icar_jax.errors import ConfigError

RULE, TASK = "rule", "task"  # keys of a field's metadata


class Rule(typing.Protocol):
    """Checks the value of one field, whose full name starts with 'config.'."""

    def check(self, name: str, value: Any) -> None: ...


def setting(default: Any, rule: Rule | None = None, *, task: str = "") -> Any:
    """A field with its rule. `task`: the only task it has a meaning for; a run of another task must leave its default."""
    return field(default=default, metadata={RULE: rule, TASK: task})


@dataclass(frozen=True)
class OneOf:
    """A name out of a `Literal`."""

    names: Any

    def check(self, name: str, value: Any) -> None:
        if value not in typing.get_args(self.names):
            raise unknown(name, value, typing.get_args(self.names))


@dataclass(frozen=True)
class AtLeast:
    """A number of at least `low`, and at most `high`, which only a slip of the keyboard exceeds."""

    low: float
    fix: str = "raise it"
    high: int = 10**9

    def check(self, name: str, value: Any) -> None:
        if not value >= self.low:
            raise ConfigError(f"{name}={value} must be at least {self.low}; {self.fix}")
        if value > self.high:
            raise ConfigError(f"{name}={value!r:.40} must be at most {self.high:,}; lower it")


@dataclass(frozen=True)
class Within:
    """A number in an interval such as '[0, 1)', or every number of a tuple."""

    interval: str
    hint: str = ""

    def check(self, name: str, value: Any) -> None:
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        for each in value if isinstance(value, tuple) else (value,):
            above = each >= low if self.interval[0] == "[" else each > low
            below = each <= high if self.interval[-1] == "]" else each < high
            if not (above and below):
                raise ConfigError(f"{name}={value!r:.80} must lie in {self.interval}{f'; {self.hint}' if self.hint else ''}")


@dataclass(frozen=True)
class LocalPath:
    """A file or folder of this machine, not an address such as s3://bucket/name; '' names none."""

    def check(self, name: str, value: Any) -> None:
        require_local(name, value)


@dataclass(frozen=True)
class WeightsPath:
    """As LocalPath, or a name on the Hugging Face hub: owner/name, hf://owner/name@revision."""

    def check(self, name: str, value: Any) -> None:
        require_weights(name, value)


@dataclass(frozen=True)
class Ascending:
    """Different numbers of blocks, from 1, in order."""

    def check(self, name: str, value: Any) -> None:
        fixed = tuple(sorted({each for each in value if each >= 1}))
        if tuple(value) != fixed:
            raise ConfigError(f"{name}={value} must be ascending block counts from 1; write {fixed}")


@dataclass(frozen=True)
class Shares:
    """Different shares in (0, 1]."""

    def check(self, name: str, value: Any) -> None:
        if any(not 0 < share <= 1 for share in value) or len(set(value)) < len(value):
            raise ConfigError(f"{name}={value} must be different shares in (0, 1] of full depth's cost, such as (0.6, 0.8)")


@dataclass(frozen=True)
class GroupsOrPatterns:
    """Groups of parameters, or regular expressions for paths of parameters."""

    def check(self, name: str, value: Any) -> None:
        groups = typing.get_args(FreezeGroup)
        for entry in value:
            if entry not in groups:
                _require_pattern(name, entry, f"a group ({', '.join(groups)}) or ")


@dataclass(frozen=True)
class Rates:
    """Entries such as 'vision/blocks/=0.1'."""

    def check(self, name: str, value: Any) -> None:
        for entry in value:
            parse_rate(entry, name)


def parse_rate(entry: str, name: str = "config.optim.rates") -> tuple[str, float]:
    """'vision/blocks/=0.1' -> ('vision/blocks/', 0.1). Raises ConfigError."""
    pattern, _, share = entry.rpartition("=")
    _require_pattern(name, pattern)
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not pattern or not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={entry!r} must read REGEX=SHARE with a share of at least 0: 'vision/blocks/=0.1'")
    return pattern, value


def _require_pattern(name: str, entry: str, more: str = "") -> None:
    try:
        re.compile(entry)
    except re.error as error:
        raise ConfigError(f"{name}={entry!r} must be {more}a regular expression for paths of parameters: {error}") from error

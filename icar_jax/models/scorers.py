"""Which complexity model an architecture describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icar_jax.config import from_dict, unknown
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.token_router import BlocksArch, TokenRouter

ScorerArch = ComplexityArch | BlocksArch


def scorer_arch(values: Mapping[str, Any], where: str) -> ScorerArch:
    """The architecture under "arch" of a complexity checkpoint; one without "type" is a ConvNeXt.

    Raises ConfigError for an unknown type or field, naming `where`.
    """
    kind = values.get("type")
    if kind not in (None, "blocks"):
        raise unknown(f"{where}.type", kind, ("blocks",))
    return from_dict(dict(values), ComplexityArch if kind is None else BlocksArch, where)


def scorer_class(arch: ScorerArch) -> type[ComplexityModel | TokenRouter]:
    """The module that an architecture describes."""
    return TokenRouter if isinstance(arch, BlocksArch) else ComplexityModel

"""Bounds of an architecture's sizes, and the number of blocks that weights hold; both are checked before shapes are built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from icar_jax import pytree
from icar_jax.errors import ModelError
from icar_jax.files import limits

_POSITIVE = (
    *("image_size", "patch_size", "width", "depth", "heads", "mlp_width", "embed_dim", "context_length", "vocabulary"),
    *("dims", "head_blocks"),
)
_MOST = {"depth": limits.DEPTH, "depths": limits.DEPTH, "image_size": 1 << 14, "patch_size": 1 << 14, "registers": 1 << 12}
_OPTIONAL = ("depths", "registers", "projection_width", "num_classes")
_EPSILONS = ("norm_eps", "exit_eps")


def size_error(arch: Any) -> str | None:
    """What is wrong with the sizes and epsilons of an architecture; None if nothing is. Other fields are not looked at."""
    for name in (*_POSITIVE, *_OPTIONAL):
        value = getattr(arch, name, ())
        least, most = int(name in _POSITIVE), _MOST.get(name, limits.SIZE)
        for each in value if isinstance(value, tuple) else (value,):
            if not least <= each <= most:
                return f"{name}={value!r:.80} must lie in {least} to {most:,}"
    for name in _EPSILONS:
        if not 0 <= getattr(arch, name, 0.0) < 1:
            return f"{name}={getattr(arch, name)} must lie in [0, 1)"
    heads, width = getattr(arch, "heads", 1), getattr(arch, "width", 1)
    return f"{heads} heads do not divide the width of {width}" if width % heads else None


def require_depth(depth: int, params: Mapping[str, Any], where: str) -> None:
    """Raises ModelError unless `params`, those of one tower, hold `depth` blocks; nothing is built for that."""
    blocks = params.get("blocks", {}) if isinstance(params, Mapping) else {}
    if len(blocks) != depth:
        raise ModelError(f"{where}: the description says {depth:,} blocks, the weights hold {len(blocks):,}")


def require_depths(arch: Any, params: pytree.Tree, where: str) -> None:
    """As `require_depth`, for each of the towers `arch.vision` and `arch.text` that there is, under its name in `params`."""
    for name in ("vision", "text"):
        if (tower := getattr(arch, name, None)) is not None:
            require_depth(tower.depth, params.get(name, {}), f"{where}: {name} tower")

"""Sharding rules: an ordered table from parameter paths to PartitionSpecs; the first matching pattern applies.

The tensor axis follows Megatron-LM (Shoeybi et al. 2019): the first matrix of a pair is sharded by its output, the second by
its input, so one all-reduce follows each pair. q, k and v share one matrix, so sharding it also moves pieces between
neighbours. An axis that the mesh does not divide is replicated. A large leaf that matches no rule is sharded over fsdp along
its largest divisible axis.
"""

from __future__ import annotations

import math
import re
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from icar_jax import pytree

P = PartitionSpec

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"attn/qkv/kernel$", P("fsdp", "tensor")),
    (r"attn/qkv/bias$", P("tensor")),
    (r"attn/out/kernel$", P("tensor", "fsdp")),
    (r"mlp/fc1/kernel$", P("fsdp", "tensor")),
    (r"mlp/fc1/bias$", P("tensor")),
    (r"mlp/fc2/kernel$", P("tensor", "fsdp")),
    (r"text/embed$", P("tensor", "fsdp")),
    (r"(^|/)proj/kernel$", P("fsdp", None)),
    (r"patch/kernel$", P(None, None, None, "fsdp")),
    (r"(^|/)(bias|scale|gamma|beta|cls|pos|registers|cross|probe|logit_scale|logit_bias)$", P()),
    (r"^exit_logit_(scale|bias)/\d+$", P()),
)
FSDP_FALLBACK_SIZE = 1 << 16  # scalars; smaller unmatched leaves are replicated


def spec_for(path: str, shape: tuple[int, ...], mesh_shape: dict[str, int]) -> PartitionSpec:
    """The PartitionSpec of one leaf; axes that do not divide its shape are dropped."""
    for pattern, spec in RULES:
        if re.search(pattern, path) and len(spec) <= len(shape):
            return P(*(_fit(axis, n, mesh_shape) for axis, n in zip(spec, shape)))
    fsdp = mesh_shape.get("fsdp", 1)
    divisible = [i for i, n in enumerate(shape) if n % fsdp == 0]
    if fsdp > 1 and divisible and math.prod(shape) >= FSDP_FALLBACK_SIZE:
        cut = max(divisible, key=lambda i: shape[i])
        return P(*("fsdp" if i == cut else None for i in range(len(shape))))
    return P()


def _fit(axis: str | None, n: int, mesh_shape: dict[str, int]) -> str | None:
    return axis if axis is not None and n % mesh_shape.get(axis, 1) == 0 else None


def shardings(tree: dict[str, Any], mesh: Mesh) -> pytree.Tree:
    """A NamedSharding for each leaf of a parameter tree; leaves need only a `shape`."""
    shape = dict(mesh.shape)
    return pytree.map_with_path(lambda path, leaf: NamedSharding(mesh, spec_for(path, tuple(leaf.shape), shape)), tree)

"""Projection from the pooled token of a tower to the embedding space: linear, an MLP, both, or none for a bare tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax.models.functional import Module
from icar_jax.models.layers import DType, Linear
from icar_jax.models.ops import gelu_erf

Array = jax.Array
PROJECTIONS = ("linear", "linear_mlp", "mlp", "none")


def projection_error(projection: str, hidden: int, pooled: int, embed_dim: int) -> str | None:
    """Returns why a projection from `pooled` to `embed_dim` channels is invalid; None if it is valid."""
    if projection not in PROJECTIONS:
        return f"projection {projection!r} must be one of {PROJECTIONS}"
    if (hidden > 0) != (projection in ("linear_mlp", "mlp")):
        return f"projection_width {hidden} is the hidden width of 'linear_mlp' and 'mlp', and 0 for other projections"
    if projection == "none" and embed_dim != pooled:
        return f"without a projection, embed_dim {embed_dim} must be the {pooled} channels of the pooled token"
    return None


class ProjectionMlp(Module):
    """Linear, GELU, linear; z [B, P] -> [B, D]."""

    def __init__(
        self, pooled: int, hidden: int, embed_dim: int, *, bias: bool = True, dtype: DType = None,
        param_dtype: DType = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        types: dict[str, Any] = {"bias": bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = gelu_erf
        self.fc1 = Linear(pooled, hidden, std=pooled**-0.5, **types)
        self.fc2 = Linear(hidden, embed_dim, std=hidden**-0.5, **types)

    def __call__(self, z: Array) -> Array:
        return self.fc2(self.activation(self.fc1(z)))


def add_projection(
    module: nnx.Module, projection: str, hidden: int, pooled: int, embed_dim: int, *, bias: bool = False, **types: Any
) -> None:
    """Gives `module` the parameters `proj` and `proj_mlp` of a projection, None where it has none; `types` as of Linear.

    `bias` is that of the linear part. The MLP has biases beside a linear part and none alone, as in OpenCLIP's text towers.
    """
    linear = Linear(pooled, embed_dim, std=pooled**-0.5, bias=bias, **types) if "linear" in projection else None
    module.proj = nnx.data(linear)  # type: ignore[attr-defined]
    mlp = ProjectionMlp(pooled, hidden, embed_dim, bias=linear is not None, **types) if "mlp" in projection else None
    module.proj_mlp = nnx.data(mlp)  # type: ignore[attr-defined]


def project(module: Any, z: Array) -> Array:
    """z [B, P] -> [B, D] by the projection of `module`; the parts are added."""
    parts = [part(z) for part in (module.proj, module.proj_mlp) if part is not None]
    return sum(parts[1:], parts[0]) if parts else z


def embed_cross(tower: Any, norm: nnx.Module | None, cross: Sequence[Array], times: int = 1) -> Array:
    """Cross tokens [B, W] of each block -> float32 [blocks, B, D], by `norm` and the projection of a tower.

    Neither gets a gradient. The projection reads the token `times` times, in place of each pooled token.
    """
    parts = {"norm": norm, "proj": getattr(tower, "proj", None), "proj_mlp": getattr(tower, "proj_mlp", None)}

    def frozen(module: nnx.Module) -> Any:
        graph, state = nnx.split(module)
        return nnx.merge(graph, jax.tree.map(jax.lax.stop_gradient, state))

    own = {name: frozen(module) for name, module in parts.items() if module is not None}
    z = jnp.concatenate(list(cross))
    z = own.pop("norm")(z) if "norm" in own else z
    z = jnp.concatenate([z] * times, axis=-1) if times > 1 else z
    made = [part(z) for part in own.values()]
    z = (sum(made[1:], made[0]) if made else z).astype(jnp.float32)
    return z.reshape(len(cross), -1, z.shape[-1])


def projection_macs(projection: str, hidden: int, pooled: int, embed_dim: int) -> int:
    """Multiply-accumulates of a projection for one image or caption."""
    linear = pooled * embed_dim if "linear" in projection else 0
    return linear + (hidden * (pooled + embed_dim) if "mlp" in projection else 0)

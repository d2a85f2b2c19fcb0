"""Parameter-holding layers shared by all towers, and the bridge from modules to pure functions.

Modules exist to name parameters and to write the forward pass down once. Outside models/ parameters are plain nested
dicts; `Bridge` builds them and runs a module's method on them inside a traced function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from icar_jax import pytree
from icar_jax.models import ops

Array = jax.Array
DType = Any


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


def zeros(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, jnp.float32))


def ones(*shape: int) -> nnx.Param:
    return nnx.Param(jnp.ones(shape, jnp.float32))


class Linear(nnx.Module):
    """x [..., n_in] -> [..., n_out]; kernel [n_in, n_out], optional bias [n_out]."""

    def __init__(self, n_in: int, n_out: int, *, std: float, bias: bool = True, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (n_in, n_out), std)
        self.bias = zeros(n_out) if bias else None

    def __call__(self, x: Array, dtype: DType) -> Array:
        return ops.linear(x, self.kernel[...], None if self.bias is None else self.bias[...], dtype=dtype)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, statistics in float32; keeps the input's dtype."""

    def __init__(self, width: int, eps: float):
        self.scale = ones(width)
        self.bias = zeros(width)
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return ops.layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class PatchConv(nnx.Module):
    """Convolution whose stride equals its kernel, as one matrix product; kernel [P, P, C_in, C_out].

    x [B, H, W, C_in] -> [B, H // P, W // P, C_out]; rows and columns beyond a multiple of P are dropped.
    """

    def __init__(self, patch: int, n_in: int, n_out: int, *, std: float, bias: bool, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (patch, patch, n_in, n_out), std)
        self.bias = zeros(n_out) if bias else None

    def __call__(self, x: Array, dtype: DType) -> Array:
        p, _, c, out = self.kernel[...].shape
        b, h, w = x.shape[0], x.shape[1] // p, x.shape[2] // p
        x = x[:, : h * p, : w * p].reshape(b, h, p, w, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, p * p * c)
        kernel = self.kernel[...].reshape(p * p * c, out)
        return ops.linear(x, kernel, None if self.bias is None else self.bias[...], dtype=dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": ops.gelu_erf,
    "gelu_tanh": ops.gelu_tanh,
    "quick_gelu": ops.quick_gelu,
}


@dataclass(frozen=True)
class Bridge:
    """Pure functions over a module class: parameters in, arrays out.

    `build(rngs)` makes the module. Nothing here holds arrays, so an instance can be closed over by a jitted function.
    """

    build: Callable[[nnx.Rngs], nnx.Module]

    @cached_property
    def _abstract(self) -> tuple[Any, dict]:
        graph, state = nnx.split(nnx.eval_shape(lambda: self.build(nnx.Rngs(0))))
        return graph, nnx.to_pure_dict(state)

    def shapes(self) -> pytree.Tree:
        """Parameters as ShapeDtypeStructs: exact shapes at no cost."""
        return pytree.map_with_path(lambda _, leaf: leaf, self._abstract[1])

    def init(self, key: Array) -> pytree.Tree:
        """Random float32 parameters as a plain nested dict; one program, which a jit around it may create sharded."""

        def make(key: Array) -> pytree.Tree:
            return pytree.map_with_path(lambda _, leaf: leaf, nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key)))))

        return jax.jit(make)(key)

    def bind(self, params: Mapping[str, Any]) -> Any:
        """The module over `params`; use inside a traced function, it costs nothing at run time."""
        graph, template = self._abstract
        return nnx.merge(graph, _with_module_keys(params, template))


def _with_module_keys(params: Mapping[str, Any], template: Mapping) -> dict:
    """String keys back to the module's own: list entries are integers there, and '10' would sort before '2'."""
    return {
        key: _with_module_keys(params[str(key)], sub) if isinstance(sub, Mapping) else params[str(key)]
        for key, sub in template.items()
    }

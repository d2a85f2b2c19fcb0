"""Hand-written derivatives that work in both modes of automatic differentiation.

`jax.custom_vjp` allows a hand-written backward pass but disables forward mode: `jax.jvp`, `jax.hessian`, Hessian-vector
products. `with_derivatives` supports both: forward mode applies the tangent map, reverse mode its hand-written transpose. The
map is a separate primitive, because `jax.custom_derivatives.linear_call` can be neither batched nor differentiated twice.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Array = jax.Array


@dataclass(frozen=True)
class Derivatives:
    """A differentiable function of arrays and static values.

    Attributes:
        forward: (*arrays, *static) -> (out, residuals); residuals are a tuple of arrays.
        tangent: (residuals, tangents, *static) -> tangent of `out`, linear in `tangents`; a tangent is None if its array is
            constant.
        backward: (residuals, cotangent, *static) -> tuple with a cotangent for each array.
        value: (*arrays, *static) -> out, where nothing is differentiated; None: `forward` without its residuals.
    """

    forward: Callable[..., tuple[Array, tuple[Array, ...]]]
    tangent: Callable[..., Array]
    backward: Callable[..., tuple[Array, ...]]
    value: Callable[..., Array] | None = None


def with_derivatives(derivatives: Derivatives, arrays: int) -> Callable[..., Array]:
    """Returns the differentiable function; its first `arrays` arguments are arrays, the others are static and hashable."""

    @functools.lru_cache(maxsize=None)
    def of_static(static: tuple) -> Callable[..., Array]:
        @jax.custom_jvp
        def function(*args: Array) -> Array:
            return derivatives.value(*args, *static) if derivatives.value else derivatives.forward(*args, *static)[0]

        def rule(primals: tuple[Array, ...], tangents: tuple) -> tuple[Array, Array]:
            out, residuals = derivatives.forward(*primals, *static)
            varies = tuple(type(t) is not SymbolicZero for t in tangents)
            if not any(varies):
                return out, jax.numpy.zeros_like(out)
            given = [t for t, moves in zip(tangents, varies) if moves]
            linear = _Linear(derivatives, static, len(residuals), varies)
            (tangent,) = _linear_p.bind(*residuals, *given, linear=linear, aval=jax.typeof(out))
            return out, tangent

        function.defjvp(rule, symbolic_zeros=True)
        return function

    def call(*args: Any) -> Array:
        return of_static(args[arrays:])(*args[:arrays])

    return call


@dataclass(frozen=True)
class _Linear:
    """Static description of one application of a tangent map; its operands are the residuals, then the non-zero tangents."""

    derivatives: Derivatives
    static: tuple
    residuals: int
    varies: tuple[bool, ...]
    batched: int = 0  # number of leading axes that `jax.vmap` has added to all operands

    def apply(self, *operands: Array) -> Array:
        return self._vmapped(self._apply)(*operands)

    def transpose(self, *operands: Array) -> tuple[Array, ...]:
        """(residuals, cotangent) -> cotangents of the non-zero tangents."""
        return self._vmapped(self._transpose)(*operands)

    def _apply(self, *operands: Array) -> Array:
        given = iter(operands[self.residuals :])
        tangents = [next(given) if moves else None for moves in self.varies]
        return self.derivatives.tangent(operands[: self.residuals], tangents, *self.static)

    def _transpose(self, *operands: Array) -> tuple[Array, ...]:
        found = self.derivatives.backward(operands[: self.residuals], operands[-1], *self.static)
        return tuple(each for each, moves in zip(found, self.varies, strict=True) if moves)

    def _vmapped(self, function: Callable) -> Callable:
        return function if not self.batched else _Linear._vmapped(self.outer(), jax.vmap(function))

    def outer(self) -> _Linear:
        """Returns a copy with one batch axis fewer."""
        return _Linear(self.derivatives, self.static, self.residuals, self.varies, self.batched - 1)


_linear_p = Primitive("icar_linear")
_linear_p.multiple_results = True


def _apply_rule(*operands: Array, linear: _Linear, aval: Any) -> list[Array]:
    return [linear.apply(*operands)]


def _jvp_rule(primals: Any, tangents: Any, *, linear: _Linear, aval: Any) -> Any:
    return jax.jvp(lambda *operands: [linear.apply(*operands)], primals, tuple(map(ad.instantiate_zeros, tangents)))


def _transpose_rule(cotangents: Any, *operands: Any, linear: _Linear, aval: Any) -> list[Any]:
    (cotangent,) = cotangents
    unknown = [ad.is_undefined_primal(x) for x in operands]
    if any(unknown[: linear.residuals]):
        raise NotImplementedError("a tangent map of icar_jax.models.autodiff is linear in its tangents, not in its residuals")
    if type(cotangent) is ad.Zero:
        return [ad.Zero(x.aval) if moves else None for x, moves in zip(operands, unknown)]
    found = linear.transpose(*operands[: linear.residuals], cotangent)
    # Tangents that are known here are constants of the linear map and need no cotangent.
    wanted = [c if moves else None for c, moves in zip(found, unknown[linear.residuals :], strict=True)]
    return [None] * linear.residuals + wanted


def _batching_rule(operands: Any, axes: Any, *, linear: _Linear, aval: Any) -> Any:
    size = next(x.shape[axis] for x, axis in zip(operands, axes) if axis is not None)
    spread = [
        jax.numpy.broadcast_to(x, (size, *x.shape)) if axis is None else jax.numpy.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes)
    ]
    more = _Linear(linear.derivatives, linear.static, linear.residuals, linear.varies, linear.batched + 1)
    batched = jax.core.ShapedArray((size, *aval.shape), aval.dtype)
    return _linear_p.bind(*spread, linear=more, aval=batched), [0]


_linear_p.def_impl(jax.jit(_apply_rule, static_argnames=("linear", "aval")))
_linear_p.def_abstract_eval(lambda *_, linear, aval: [aval])  # includes varying axes and sharding
ad.primitive_jvps[_linear_p] = _jvp_rule
ad.primitive_transposes[_linear_p] = _transpose_rule
batching.primitive_batchers[_linear_p] = _batching_rule
mlir.register_lowering(_linear_p, mlir.lower_fun(_apply_rule, multiple_results=True))


def present_sum(*terms: Array | None) -> Array:
    """Returns the sum of the terms that are not None. Raises TypeError if all are."""
    return reduce(operator.add, (term for term in terms if term is not None))

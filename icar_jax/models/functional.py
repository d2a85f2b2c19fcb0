"""The functional form of a module: its structure, and its parameters as a plain nested dict.

    graph, params = clip.split()
    embed = jax.jit(graph.encode_image)
    embed(params, images)

Hot loops hold such a pair: a jitted call takes a dict of hundreds of parameters far faster than a module, and both faster than
`nnx.jit`. Keys are strings, as in checkpoints: params["vision"]["blocks"]["3"]["attn"]["qkv"]["kernel"].
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Generic, Self, TypeVar

import jax
from flax import nnx

from icar_jax import pytree

M = TypeVar("M", bound=nnx.Module)
Params = dict[str, Any]


class Graph(Generic[M]):
    """The structure of a module without its arrays; hashable, equal for equal structures.

    Every method of the module is here a pure function that takes the parameters first: `graph.encode_text(params, tokens)` is
    `module.encode_text(tokens)`, `graph(params, ...)` is `module(...)`. A part of the module is a graph of its own:
    `graph.vision(params["vision"], images)`. Other attributes are the module's: `graph.arch`.

    Attributes:
        shapes: the parameters as jax.ShapeDtypeStruct, a nested dict with string keys.
    """

    def __init__(self, graphdef: nnx.GraphDef, state: Mapping):
        """`state`: the parameters as a pure dict with the module's own keys; of the leaves only shape and dtype are kept."""
        self._graphdef = graphdef
        self._state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(state))
        self._functions: dict[str, Any] = {}
        self.shapes: Params = pytree.map_with_path(lambda _, leaf: leaf, self._state)

    def merge(self, params: Mapping[str, Any]) -> M:
        """The module over `params`, whose leaves may be traced: inside a jitted function it costs nothing at run time.

        Raises KeyError, naming the path, where a parameter is missing.
        """
        return nnx.merge(self._graphdef, _with_module_keys(params, self._state, ""))

    def __call__(self, params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.merge(params)(*args, **kwargs)

    @functools.cached_property
    def _abstract(self) -> M:
        return nnx.merge(self._graphdef, self._state)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._functions:
            return self._functions[name]
        found = getattr(self._abstract, name)
        if isinstance(found, nnx.Module) and not isinstance(found, (nnx.List, nnx.Dict)):
            graphdef, state = nnx.split(found)
            return self._functions.setdefault(name, Graph(graphdef, nnx.to_pure_dict(state)))
        if not inspect.ismethod(found) or found.__self__ is not self._abstract:
            return found

        def pure(params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            return getattr(self.merge(params), name)(*args, **kwargs)

        first = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        signature = inspect.signature(found)
        pure.__name__, pure.__doc__ = name, found.__doc__
        shown = signature.replace(parameters=[first, *signature.parameters.values()])
        pure.__signature__ = shown  # type: ignore[attr-defined]  # jax.jit reads it
        return self._functions.setdefault(name, pure)  # one object a name: jax.jit knows it again

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._graphdef == other._graphdef

    def __hash__(self) -> int:
        return hash(self._graphdef)

    def __repr__(self) -> str:
        return f"Graph({type(self._abstract).__name__}, {pytree.count(self.shapes):,} parameters)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Graph, (self._graphdef, self._state)


class Module(nnx.Module):
    """Base of the models that people hold: `split`, and the same pair without building arrays."""

    def split(self) -> tuple[Graph[Self], Params]:
        """(graph, params): the structure and the parameters, so that `graph.merge(params)` is this module again.

        Raises ValueError for a module that keeps other state, such as the counters of dropout: `nnx.split` carries that.
        """
        graphdef, params, rest = nnx.split(self, nnx.Param, ...)  # type: ignore[misc]
        if len(jax.tree.leaves(rest)):
            raise ValueError(
                f"split() keeps parameters only, and this {type(self).__name__} has other state: {_kinds(rest)}; "
                "use nnx.split and nnx.merge, which carry it, or drop what `sow` kept: nnx.pop(module, nnx.Intermediate)"
            )
        state = nnx.to_pure_dict(params)
        return Graph(graphdef, state), pytree.map_with_path(lambda _, leaf: leaf, state)

    @classmethod
    def graph(cls, *args: Any, **kwargs: Any) -> Graph[Self]:
        """The structure of cls(*args, rngs=..., **kwargs), without allocating anything."""
        abstract = nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0), **kwargs))  # type: ignore[call-arg]
        graphdef, state = nnx.split(abstract)
        return Graph(graphdef, nnx.to_pure_dict(state))

    @classmethod
    def init(cls, key: jax.Array, *args: Any, **kwargs: Any) -> Params:
        """Random parameters of cls(*args, **kwargs) as a nested dict; one program, which a jit around it may create sharded."""

        def make(key: jax.Array) -> Params:
            made = nnx.to_pure_dict(nnx.state(cls(*args, rngs=nnx.Rngs(key), **kwargs)))  # type: ignore[call-arg]
            return pytree.map_with_path(lambda _, leaf: leaf, made)

        return jax.jit(make)(key)


def _with_module_keys(params: Mapping[str, Any], template: Mapping, where: str) -> dict:
    """String keys back to the module's own: list entries are integers there, and '10' would sort before '2'."""
    found = {}
    for key, sub in template.items():
        if str(key) not in params:
            raise KeyError(f"the parameters lack {where}{key}")
        leaf = params[str(key)]
        found[key] = _with_module_keys(leaf, sub, f"{where}{key}/") if isinstance(sub, Mapping) else leaf
    return found


def state_besides_parameters(module: nnx.Module) -> str:
    """What `module` keeps besides parameters, as 'RngCount at drop/rngs/count, ...'; '' where there is nothing."""
    rest = nnx.state(module, nnx.Not(nnx.Param))
    return _kinds(rest) if jax.tree.leaves(rest) else ""


def _kinds(state: nnx.State) -> str:
    named = [f"{type(v).__name__} at {'/'.join(map(str, path))}" for path, v in nnx.to_flat_state(state)]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")

"""The functional form of a module: its structure (`Graph`), and its parameters as a plain nested dict.

    graph, params = clip.split()
    embed = jax.jit(graph.encode_image)
    embed(params, images)

Use it in hot loops: dispatching a jitted call is much faster with a dict of hundreds of parameters than with a module, and both
are faster than `nnx.jit`. Keys are strings, as in checkpoints: params["vision"]["blocks"]["3"]["attn"]["qkv"]["kernel"].
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
    """The structure of a module without its arrays; hashable, and equal for equal structures.

    Every method of the module becomes a pure function that takes the parameters first: `graph.encode_text(params, tokens)` is
    `module.encode_text(tokens)`, `graph(params, ...)` is `module(...)`. A submodule is a graph too:
    `graph.vision(params["vision"], images)`. Other attributes are those of the module: `graph.arch`.

    Attributes:
        shapes: parameters as jax.ShapeDtypeStruct, a nested dict with string keys.
    """

    def __init__(self, graphdef: nnx.GraphDef, state: Mapping):
        """`state`: parameters as a pure dict with the module's keys; only shapes and dtypes of the leaves are kept."""
        self._graphdef = graphdef
        self._state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), dict(state))
        self._functions: dict[str, Any] = {}
        self.shapes: Params = pytree.map_with_path(lambda _, leaf: leaf, self._state)

    def merge(self, params: Mapping[str, Any]) -> M:
        """Returns the module with `params`. Leaves may be traced: inside a jitted function this costs nothing at run time.

        Raises KeyError naming the path of a missing parameter.
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
        return self._functions.setdefault(name, pure)  # one function object per name, so that jax.jit caches hit

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._graphdef == other._graphdef

    def __hash__(self) -> int:
        return hash(self._graphdef)

    def __repr__(self) -> str:
        return f"Graph({type(self._abstract).__name__}, {pytree.count(self.shapes):,} parameters)"

    def __reduce__(self) -> tuple[Any, ...]:
        return Graph, (self._graphdef, self._state)


class Module(nnx.Module):
    """Base class of all models, with `split`, `graph` and `init` for the functional form."""

    def split(self) -> tuple[Graph[Self], Params]:
        """Returns (graph, params), structure and parameters; `graph.merge(params)` is this module again.

        Raises ValueError for a module with other state, such as dropout counters; use `nnx.split` for that.
        """
        graphdef, params, rest = nnx.split(self, nnx.Param, ...)  # type: ignore[misc]
        if len(jax.tree.leaves(rest)):
            raise ValueError(
                f"split() supports parameters only, but this {type(self).__name__} has other state: {_kinds(rest)}; "
                "use nnx.split and nnx.merge, which keep it, or remove values kept by `sow`: nnx.pop(module, nnx.Intermediate)"
            )
        state = nnx.to_pure_dict(params)
        return Graph(graphdef, state), pytree.map_with_path(lambda _, leaf: leaf, state)

    @classmethod
    def graph(cls, *args: Any, **kwargs: Any) -> Graph[Self]:
        """Returns the graph of cls(*args, rngs=..., **kwargs) without allocating arrays."""
        abstract = nnx.eval_shape(lambda: cls(*args, rngs=nnx.Rngs(0), **kwargs))  # type: ignore[call-arg]
        graphdef, state = nnx.split(abstract)
        return Graph(graphdef, nnx.to_pure_dict(state))

    @classmethod
    def init(cls, key: jax.Array, *args: Any, **kwargs: Any) -> Params:
        """Returns random parameters of cls(*args, **kwargs) as a nested dict; jitted, so an outer jit can shard the outputs."""

        def make(key: jax.Array) -> Params:
            made = nnx.to_pure_dict(nnx.state(cls(*args, rngs=nnx.Rngs(key), **kwargs)))  # type: ignore[call-arg]
            return pytree.map_with_path(lambda _, leaf: leaf, made)

        return jax.jit(make)(key)


def _with_module_keys(params: Mapping[str, Any], template: Mapping, where: str) -> dict:
    """Converts string keys back to the module's keys, where list entries are integers ('10' would sort before '2')."""
    found = {}
    for key, sub in template.items():
        if str(key) not in params:
            raise KeyError(f"missing parameter {where}{key}")
        leaf = params[str(key)]
        found[key] = _with_module_keys(leaf, sub, f"{where}{key}/") if isinstance(sub, Mapping) else leaf
    return found


def state_besides_parameters(module: nnx.Module) -> str:
    """Returns a description of the non-parameter state of `module`, as 'RngCount at drop/rngs/count, ...'; '' if none."""
    rest = nnx.state(module, nnx.Not(nnx.Param))
    return _kinds(rest) if jax.tree.leaves(rest) else ""


def _kinds(state: nnx.State) -> str:
    named = [f"{type(v).__name__} at {'/'.join(map(str, path))}" for path, v in nnx.to_flat_state(state)]
    return ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")

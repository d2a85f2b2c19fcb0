"""Rule tables: the mapping between tensors of a source and our parameters, applied in both directions.

A table is a list of `Rule`s. An import checks both sides: every source key matches exactly one rule, every target is filled
exactly once and has its shape. All faults are reported together. Values are read lazily, one target at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from icar_jax import pytree
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import Tensor

FLOATS = ("float16", "bfloat16", "float32", "float64")
_SHOWN = 25  # faults printed at most


@dataclass(frozen=True)
class Transform:
    """A mapping of source arrays to one target array (`forward`) and its inverse (`backward`)."""

    forward: Callable[[list[np.ndarray]], np.ndarray]
    backward: Callable[[np.ndarray], list[np.ndarray]]


def _one(forward: Callable, backward: Callable) -> Transform:
    return Transform(lambda arrays: forward(arrays[0]), lambda array: [backward(array)])


SAME = _one(lambda a: a, lambda a: a)
TRANSPOSE = _one(lambda a: a.T, lambda a: a.T)  # torch Linear [out, in] <-> kernel [in, out]
CONV = _one(lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))  # [O, I, H, W] <-> [H, W, I, O]
POINTWISE = _one(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])  # 1x1 convolution <-> kernel [in, out]
ROW = _one(lambda a: a.reshape(a.shape[-1]), lambda a: a[None, None])  # [1, 1, W] <-> [W]
ROWS = _one(lambda a: a.reshape(a.shape[1:]), lambda a: a[None])  # [1, N, W] <-> [N, W]
SCALAR = _one(lambda a: a.reshape(()), lambda a: a)  # [] or [1] -> []
VECTOR = _one(lambda a: a.reshape(()), lambda a: a[None])  # [1] <-> []
# three matrices q, k, v <-> one matrix in that order
QKV_WEIGHT = Transform(lambda arrays: np.concatenate(arrays).T, lambda a: np.split(a.T, 3))
QKV_BIAS = Transform(np.concatenate, lambda a: np.split(a, 3))
# a layer and the scale of each of its outputs (LayerScale) <-> the scaled layer; backwards the scales are 1
SCALED_WEIGHT = Transform(lambda arrays: (arrays[0] * arrays[1][:, None]).T, lambda a: [a.T, np.ones_like(a[0])])
SCALED_BIAS = Transform(lambda arrays: arrays[0] * arrays[1], lambda a: [a, np.ones_like(a)])


@dataclass(frozen=True)
class Rule:
    """Maps the source keys `sources` to the parameter path `target`; '{}' matches a number, equal on both sides, in order.

    A rule without target drops a tensor that holds no weights; `why` says what it is. `shared` are keys that other rules read
    too; the transform gets them after the sources.
    """

    sources: tuple[str, ...]
    target: str = ""
    transform: Transform = SAME
    why: str = ""
    shared: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All source keys, in the order of the transform's arrays."""
        return (*self.sources, *self.shared)


def rule(source: str | Sequence[str], target: str, transform: Transform = SAME) -> Rule:
    """The rule for one source key, or for several that are joined."""
    return Rule((source,) if isinstance(source, str) else tuple(source), target, transform)


def dropped(source: str, why: str) -> Rule:
    """The rule for a source key that holds no weights."""
    return Rule((source,), why=why)


def linear(source: str, target: str, bias: bool = True) -> list[Rule]:
    """Rules for the weight and bias of a torch Linear."""
    rules = [rule(f"{source}.weight", f"{target}/kernel", TRANSPOSE)]
    return rules + ([rule(f"{source}.bias", f"{target}/bias")] if bias else [])


def scaled(source: str, target: str, scale: str) -> list[Rule]:
    """Rules for the weight and bias of a torch Linear whose outputs are multiplied by the vector `scale`."""
    return [
        Rule((f"{source}.weight",), f"{target}/kernel", SCALED_WEIGHT, shared=(scale,)),
        Rule((f"{source}.bias",), f"{target}/bias", SCALED_BIAS, shared=(scale,)),
    ]


def norm(source: str, target: str) -> list[Rule]:
    """Rules for the weight and bias of a torch LayerNorm."""
    return [rule(f"{source}.weight", f"{target}/scale"), rule(f"{source}.bias", f"{target}/bias")]


def prefixed(rules: Iterable[Rule], source: str = "", target: str = "") -> list[Rule]:
    """The same rules with a prefix before every source key and every target."""
    add = lambda keys: tuple(source + key for key in keys)
    return [Rule(add(r.sources), target + r.target if r.target else "", r.transform, r.why, add(r.shared)) for r in rules]


@dataclass(frozen=True)
class Leaf:
    """A float32 parameter whose values are computed on demand; `sources` names the tensors that it is made from."""

    shape: tuple[int, ...]
    sources: tuple[str, ...]
    read: Callable[[], np.ndarray]
    dtype = np.dtype(np.float32)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype or np.float32)


def import_weights(
    tensors: Mapping[str, Tensor], rules: Sequence[Rule], shapes: Mapping[str, Any], where: str
) -> dict[str, Leaf]:
    """{target path: Leaf} for every parameter of the tree `shapes`, with its shape.

    Raises ConvertError listing all faults: keys without a rule, keys with two rules, targets without a source and the key that
    was expected, wrong shapes, and dtypes other than floats.
    """
    wanted = {path: tuple(leaf.shape) for path, leaf in pytree.flatten(shapes).items()}
    claims, faults = _claims(tensors, rules)
    leaves: dict[str, Leaf] = {}
    for target, (chosen, keys) in sorted(claims.items(), key=lambda item: pytree.natural_key(item[0])):
        absent = [key for key in keys if key not in tensors]
        if absent:
            faults.append(f"missing in the source: {', '.join(absent)} (for {target})")
            wanted.pop(target, None)
            continue
        if target not in wanted:
            faults.append(f"does not belong to this architecture: {', '.join(keys)} (for {target})")
            continue
        parts = [tensors[key] for key in keys]
        shape = wanted.pop(target)
        faults += _faults_of(target, shape, chosen, parts)
        leaves[target] = _leaf(chosen, parts, shape)
    expected = _expected_sources(rules, wanted)
    faults += [
        f"missing in the source: {expected.get(path, '(no rule)')} (for {path} {shape})" for path, shape in wanted.items()
    ]
    if faults:
        shown = faults[:_SHOWN] + ([f"... and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else [])
        lines = "\n  ".join(shown)
        raise ConvertError(f"{where}: {len(faults)} tensors do not fit:\n  {lines}")
    return leaves


def unknown_keys(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> list[str]:
    """One line for each source key that no rule matches."""
    patterns = [_pattern(source) for r in rules for source in r.keys]
    return [_unknown(key, t) for key, t in tensors.items() if not any(p.fullmatch(key) for p in patterns)]


def _unknown(key: str, tensor: Tensor) -> str:
    """A line for a key without a rule, by its name in the file, which may begin with a wrapper's prefix."""
    return f"unknown in the source: {tensor.name or key} {tensor.shape}"


def export_weights(params: Mapping[str, Any], rules: Sequence[Rule], where: str) -> dict[str, Leaf]:
    """{source key: Leaf} of parameters, by the rules in reverse. Raises ConvertError for a parameter without a rule."""
    flat = pytree.flatten(params)
    out: dict[str, Leaf] = {}
    for path, array in flat.items():
        matches = [(r, m) for r in rules if r.target and (m := _pattern(r.target).fullmatch(path))]
        if len(matches) != 1:
            raise ConvertError(f"{where}: {path} matches {len(matches)} rules of the layout, expected one")
        chosen, match = matches[0]
        stand_in = chosen.transform.backward(np.broadcast_to(np.float32(0), tuple(array.shape)))
        for i, (name, part) in enumerate(zip(chosen.keys, stand_in, strict=True)):
            read = lambda chosen=chosen, array=array, i=i: chosen.transform.backward(np.asarray(array, np.float32))[i]
            out[_fill(name, match.groups())] = Leaf(tuple(part.shape), (path,), read)
    return out


def count(names: Iterable[str], pattern: str) -> int:
    """The number of values that '{}' takes in `pattern` among `names`, such as the depth of a tower."""
    regex = _pattern(pattern, prefix=True)
    return len({match.group(1) for name in names if (match := regex.match(name))})


def _pattern(text: str, prefix: bool = False) -> re.Pattern:
    return re.compile(re.escape(text).replace(r"\{\}", r"(\d+)") + (r"(?!\d)" if prefix else ""))


def _fill(text: str, numbers: Sequence[str]) -> str:
    parts = text.split("{}")
    return "".join(a + b for a, b in zip(parts, [*numbers, ""]))


def _claims(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, tuple[Rule, list[str]]], list[str]]:
    """{target: (rule, its source keys)} for every target that a key maps to, and the faults of the keys."""
    patterns = [(r, _pattern(source)) for r in rules for source in r.sources]
    shared = [_pattern(source) for r in rules for source in r.shared]
    claims: dict[str, tuple[Rule, list[str]]] = {}
    faults, waiting = [], []
    for key, tensor in tensors.items():
        matches = [(r, match.groups()) for r, regex in patterns if (match := regex.fullmatch(key))]
        if not matches and any(regex.fullmatch(key) for regex in shared):
            waiting.append(key)
        elif not matches:
            faults.append(_unknown(key, tensor))
        elif len(matches) > 1:
            faults.append(f"claimed by {len(matches)} rules: {key}")
        elif matches[0][0].target:
            chosen, numbers = matches[0]
            target = _fill(chosen.target, numbers)
            if claims.setdefault(target, (chosen, [_fill(s, numbers) for s in chosen.keys]))[0] is not chosen:
                faults.append(f"filled twice: {target} (again by {key})")
    read = {key for _, keys in claims.values() for key in keys}
    return claims, faults + [_unknown(key, tensors[key]) for key in waiting if key not in read]


def _faults_of(target: str, wanted: tuple[int, ...], chosen: Rule, parts: Sequence[Tensor]) -> list[str]:
    faults = [
        f"dtype of {p.name}: expected one of {', '.join(FLOATS)}, found {p.dtype}" for p in parts if p.dtype not in FLOATS
    ]
    have = " and ".join(f"{p.name} {p.shape}" for p in parts)
    try:
        shape = chosen.transform.forward([np.broadcast_to(np.float32(0), p.shape) for p in parts]).shape
    except (ValueError, IndexError):
        return [*faults, f"shape: {have} cannot become {target} {wanted}"]
    if shape != wanted:
        source = [part.shape for part in chosen.transform.backward(np.broadcast_to(np.float32(0), wanted))]
        need = " and ".join(str(tuple(s)) for s in source)
        faults.append(f"shape: expected {need}, found {have} (for {target})")
    return faults


def _leaf(chosen: Rule, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Leaf:
    def read() -> np.ndarray:
        with np.errstate(over="ignore"):  # a number beyond float32 becomes infinity, which the writer refuses by name
            return chosen.transform.forward([part.load().astype(np.float32, copy=False) for part in parts])

    return Leaf(shape, tuple(part.name for part in parts), read)


def _expected_sources(rules: Sequence[Rule], targets: Iterable[str]) -> dict[str, str]:
    found = {}
    for path in targets:
        for r in rules:
            if r.target and (match := _pattern(r.target).fullmatch(path)):
                found[path] = ", ".join(_fill(source, match.groups()) for source in r.keys)
    return found

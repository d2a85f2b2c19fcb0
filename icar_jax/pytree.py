"""Nested parameter dicts: path names, matching and comparison.

Parameters are plain nested dicts with string keys. A leaf is named by its path joined with '/', for example
`vision/blocks/3/attn/qkv/kernel`. Numeric keys sort as numbers, so block 10 follows block 9.

Not jax.tree_util: programs that read checkpoints must not start JAX, and its key paths sort '10' before '9'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from icar_jax.errors import ModelError

Tree = dict[str, Any]
DEEPEST = 64  # parts of a path


def natural_key(path: str) -> tuple:
    """Sort key under which 'blocks/10' follows 'blocks/9'."""
    # Not isdigit, which takes superscripts; and int() refuses thousands of digits.
    return tuple((0, int(part), "") if part.isdecimal() and len(part) < 20 else (1, 0, part) for part in path.split("/"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {path: leaf}, in natural path order. Keys are written as strings."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return {path: flat[path] for path in sorted(flat, key=natural_key)} if not prefix else flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """{path: leaf} -> nested dict with string keys in natural order.

    Raises ModelError for a path below another leaf's, and for more than DEEPEST parts.
    """
    tree: Tree = {}
    for path in sorted(flat, key=natural_key):
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or leaf in node or len(parents) >= DEEPEST:
            raise ModelError(f"{path[:200]!r} names no place for a parameter: another one lies there, or it is too deep")
        node[leaf] = flat[path]
    return tree


def map_with_path(fn: Callable[[str, Any], Any], tree: Mapping[str, Any], prefix: str = "") -> Tree:
    """Applies `fn(path, leaf)` to every leaf and keeps the nesting."""
    out: Tree = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        out[str(key)] = map_with_path(fn, value, path) if isinstance(value, Mapping) else fn(path, value)
    return out


def count(tree: Mapping[str, Any]) -> int:
    """Number of scalars in all leaves; leaves need a `shape` only."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(tree).values())


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """One line for each missing, unexpected or differently shaped leaf; empty when the structures agree."""
    want, have = flatten(expected), flatten(found)
    lines = [f"missing: {p} {tuple(want[p].shape)}" for p in want if p not in have]
    lines += [f"unexpected: {p} {tuple(have[p].shape)}" for p in have if p not in want]
    lines += [
        f"shape of {p}: expected {tuple(want[p].shape)}, found {tuple(have[p].shape)}"
        for p in want
        if p in have and tuple(want[p].shape) != tuple(have[p].shape)
    ]
    return lines


def require_same(expected: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raises ModelError listing every difference between two parameter trees (at most 20 lines)."""
    lines = differences(expected, found)
    if lines:
        shown = "\n  ".join(lines[:20] + ([f"... and {len(lines) - 20} more"] if len(lines) > 20 else []))
        raise ModelError(f"{where}: parameters do not fit the architecture ({len(lines)} differences):\n  {shown}")

"""How near two trees of arrays must be."""

import jax
import numpy as np


def require_near(found, expected, shape):
    """Leaf by leaf, by its norm; a failure names the mesh and the leaf."""
    for (_, f), (path, e) in zip(*(jax.tree.leaves_with_path(t) for t in (found, expected)), strict=True):
        off = np.linalg.norm(np.asarray(f - e, np.float64)) / max(np.linalg.norm(np.asarray(e, np.float64)), 1e-6)
        assert off < 2e-5, (shape, jax.tree_util.keystr(path), off)


def assert_close(found, expected, where=""):
    """Every array equal to 1e-5 of the largest magnitude in it."""
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for f, e in zip(found, expected, strict=True):
        f, e = np.asarray(f, np.float64), np.asarray(e, np.float64)
        assert f.shape == e.shape and np.isfinite(f).all(), where
        assert np.abs(f - e).max() <= 1e-5 * max(np.abs(e).max(), 1e-30), (where, np.abs(f - e).max(), np.abs(e).max())

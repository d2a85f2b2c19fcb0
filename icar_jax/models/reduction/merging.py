"""Merging of matched tokens: kept tokens plus weighted sources, as gathers and one small matrix product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from icar_jax.models.autodiff import Derivatives, with_derivatives
from icar_jax.models.ops import dot
from icar_jax.models.reduction.matching import Matching

Array = jax.Array


def merge(values: Array, sizes: Array, matching: Matching, count: int, importance: Array | None = None) -> tuple[Array, Array]:
    """values [B, N, W], sizes float32 [B, N] -> the same with N - count tokens.

    The result is the mean of what merges, weighted by size. With `importance` float32 [B, N] source and target of a pair are
    weighted by 2 softmax of their importances besides (CrossGET's ensemble). Tokens without a source keep their bits.
    """
    source, target, order = matching
    batch, tokens = source.shape
    place = jnp.arange(tokens)
    pick = lambda at, of: jnp.where(at, of[:, None], 0).sum(-1)  # of[b, index], as a sum: [B, M, N], [B, N] -> [B, M]
    kept_at = (~source & True)[:, None] & (order[:, None] == jnp.arange(tokens - count)[None, :, None])
    source_at = source[:, None] & (jnp.cumsum(source, axis=1)[:, None] == jnp.arange(1, count + 1)[None, :, None])
    kept, gone = pick(kept_at, place[None]), pick(source_at, place[None])
    goal_at = pick(source_at, target)[:, :, None] == place[None, None]  # [B, count, N]
    to = pick(goal_at, order)
    joins = to[:, None] == jnp.arange(tokens - count)[None, :, None]  # [B, N - count, count]
    size, gone_size = pick(kept_at, sizes), pick(source_at, sizes)
    take = jnp.ones_like(gone_size)
    own = jnp.ones_like(size)
    if importance is not None:
        ahead = pick(source_at, importance) - pick(goal_at, importance)
        take = 2 * jax.nn.sigmoid(ahead)
        own = own + jnp.where(joins, (1 - take)[:, None], 0).sum(-1)  # the weights of a pair sum to 2
    total = size + jnp.where(joins, gone_size[:, None], 0).sum(-1)
    own = own * size / total
    part = jnp.where(joins, (take * gone_size)[:, None] / total[:, :, None], 0)
    # Where each of the N tokens went and with which weight, for the backward pass.
    where = jnp.where(source, (source_at * to[:, :, None]).sum(1), order)
    weight = jnp.where(source, (source_at * part.sum(1)[:, :, None]).sum(1), (kept_at * own[:, :, None]).sum(1))
    return _combined(values, *lax.stop_gradient((kept, own, gone, part, where, weight))), lax.stop_gradient(total)


def take_tokens(values: Array, index: Array) -> Array:
    """values [B, N, W], index int [B, M] -> [B, M, W]."""
    return jnp.take_along_axis(values, index[:, :, None], axis=1, mode="promise_in_bounds")


def _combine(values: Array, kept: Array, own: Array, gone: Array, part: Array) -> Array:
    moved = dot(part, take_tokens(values, gone), values.dtype)
    return (own[:, :, None] * take_tokens(values, kept).astype(jnp.float32) + moved).astype(values.dtype)


def _forward(
    values: Array, kept: Array, own: Array, gone: Array, part: Array, where: Array, weight: Array
) -> tuple[Array, tuple[Array, ...]]:
    return _combine(values, kept, own, gone, part), (kept, own, gone, part, where, weight)


def _tangent(saved: tuple[Array, ...], tangents: tuple[Array | None, ...]) -> Array:
    (tangent, *_) = tangents  # of the values: no gradient flows to the weights
    assert tangent is not None
    return _combine(tangent, *saved[:4])


def _backward(saved: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    # Each token went to one place, so the transpose is a gather too, where XLA would scatter.
    where, weight = saved[4:]
    back = (weight[:, :, None] * take_tokens(g, where).astype(jnp.float32)).astype(g.dtype)
    return back, *(jnp.zeros_like(x) for x in saved)


_combined = with_derivatives(Derivatives(_forward, _tangent, _backward), arrays=7)

"""Gradient of a contrastive batch that is encoded in parts (gradient caching, Gao et al. 2021, arXiv:2101.06983).

A contrastive loss does not split over the batch, its encoders do. First all rows are embedded, part by part and without keeping
anything for a backward pass; the loss is then formed over all embeddings at once, with its gradient for each of them; last
every part is embedded again, now with a backward pass from those gradients. The result is the gradient of the whole batch, at
the memory of one part and the price of a second forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from icar_jax.config import ConfigError
from icar_jax.parallel.mesh import BATCH_AXES, batch_shards
from icar_jax.parallel.rules import shardings

Array = jax.Array


def value_and_grad(
    embed: Callable[[dict, dict[str, Array]], Any],
    contrast: Callable[[dict, Any], tuple[Array, dict[str, Array]]],
    params: dict,
    batch: dict[str, Array],
    *,
    parts: int,
    mesh: Mesh,
) -> tuple[tuple[Array, dict[str, Array]], dict]:
    """((loss, metrics), gradient for params), equal to `jax.value_and_grad` of contrast(params, embed(params, batch)).

    embed(params, rows of the batch) -> embeddings, any pytree whose leaves have the rows as leading axis; it must treat each
    row by itself and alike each time it is called. contrast(params, all embeddings) -> (loss, metrics); parameters that it
    reads itself, such as temperatures, get their gradient too. Part k holds the k-th piece of the rows of every device, so
    that no row moves. `parts` = 1 is the ordinary gradient; otherwise gradients are float32, in the layout of `parallel.rules`.
    Raises ConfigError where the parts do not divide the rows of a device.
    """
    if parts == 1:
        return jax.value_and_grad(lambda p: contrast(p, embed(p, batch)), has_aux=True)(params)
    rows, shards = len(next(iter(batch.values()))), batch_shards(mesh)
    if rows % (shards * parts):
        raise ConfigError(
            f"config.train.accumulate={parts} does not divide the {rows / shards:g} rows that each of {shards} devices "
            f"(config.mesh.data x config.mesh.fsdp) holds of config.train.batch_size={rows}; choose a batch size that is "
            f"a multiple of {shards * parts}"
        )
    piece = rows // (shards * parts)

    def place(x: Array, *spec) -> Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def part(tree: Any, k: Array) -> Any:
        """Rows k of [B, ...] leaves: the same piece of each device's own."""

        def take(x):
            own = place(x.reshape(shards, parts, piece, *x.shape[1:]), BATCH_AXES)
            return place(lax.dynamic_index_in_dim(own, k, 1, keepdims=False).reshape(-1, *x.shape[1:]), BATCH_AXES)

        return jax.tree.map(take, tree)

    def whole(x: Array) -> Array:
        """[parts, B / parts, ...] -> [B, ...] in the order of the batch; the inverse of `part` for all k."""
        own = place(x.reshape(parts, shards, piece, *x.shape[2:]), None, BATCH_AXES)
        return place(own.swapaxes(0, 1).reshape(rows, *x.shape[2:]), BATCH_AXES)

    indices = jnp.arange(parts)
    embeddings = jax.tree.map(whole, lax.map(lambda k: embed(params, part(batch, k)), indices))
    loss, pull, metrics = jax.vjp(contrast, params, embeddings, has_aux=True)
    direct, slopes = pull(jnp.ones_like(loss))

    # Sums held like the parameters: each part's gradient is then reduced straight into the slice that a device keeps.
    layout = shardings(params, mesh)
    held = lambda grads: lax.with_sharding_constraint(jax.tree.map(lambda g: g.astype(jnp.float32), grads), layout)

    def add(total, k):
        _, pull = jax.vjp(lambda p: embed(p, part(batch, k)), params)
        return held(jax.tree.map(jnp.add, total, held(pull(part(slopes, k))[0]))), None

    total, _ = lax.scan(add, held(direct), indices)
    return (loss, metrics), total

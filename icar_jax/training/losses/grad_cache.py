"""GradCache: the gradient of a contrastive loss over a batch that is encoded in parts (Gao et al. 2021, arXiv:2101.06983).

A contrastive loss does not split over the batch, but its encoders do. First, all rows are embedded part by part without storing
activations. Second, the loss and its gradient for each embedding are computed over the whole batch. Third, each part is
embedded again, with a backward pass from those gradients. The result is the gradient of the whole batch with the activation
memory of one part, at the cost of a second forward pass.
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
    """Returns ((loss, metrics), gradient), equal to `jax.value_and_grad` of contrast(params, embed(params, batch)).

    Args:
        embed: (params, rows of the batch) -> embeddings, a pytree whose leaves have the rows as leading axis. It must process
            rows independently and deterministically.
        contrast: (params, all embeddings) -> (loss, metrics). Parameters that it reads directly, such as temperatures, get
            their gradient too.
        params: parameters, sharded by `parallel.rules`.
        batch: {entry: [B, ...]}, sharded over the batch axes of `mesh`.
        parts: number of parts; 1 is the ordinary gradient. Otherwise gradients are float32, sharded by `parallel.rules`. Part k
            holds the k-th piece of the rows of every device, so no row moves between devices.

    Raises ConfigError if the parts do not divide the rows of a device.
    """
    if parts == 1:
        return jax.value_and_grad(lambda p: contrast(p, embed(p, batch)), has_aux=True)(params)
    rows, shards = len(next(iter(batch.values()))), batch_shards(mesh)
    if rows % (shards * parts):
        raise ConfigError(
            f"config.train.accumulate={parts} does not divide the {rows / shards:g} rows per device of config.train.batch_size="
            f"{rows} on {shards} devices (config.mesh.data x config.mesh.fsdp); choose a batch size that is a multiple of "
            f"{shards * parts}"
        )
    piece = rows // (shards * parts)

    def place(x: Array, *spec) -> Array:
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

    def part(tree: Any, k: Array) -> Any:
        """Part k of [B, ...] leaves: the k-th piece of the rows of each device."""

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

    # Gradient sums are sharded like the parameters, so each part's gradient is reduce-scattered.
    layout = shardings(params, mesh)
    sharded = lambda grads: lax.with_sharding_constraint(jax.tree.map(lambda g: g.astype(jnp.float32), grads), layout)

    def add(total, k):
        _, pull = jax.vjp(lambda p: embed(p, part(batch, k)), params)
        return sharded(jax.tree.map(jnp.add, total, sharded(pull(part(slopes, k))[0]))), None

    total, _ = lax.scan(add, sharded(direct), indices)
    return (loss, metrics), total

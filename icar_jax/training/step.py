"""Training state and the jitted step with explicit shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from icar_jax import pytree
from icar_jax.parallel.mesh import batch_sharding, replicated
from icar_jax.parallel.rules import shardings
from icar_jax.training.tasks import Task

# {'params': nested dict float32, 'opt_state': optax state, 'step': int32 []}; the position in the data is step x batch,
# and randomness is folded from (seed, step), so nothing else has to be stored to continue a run exactly.
State = dict[str, Any]


def state_shardings(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """A sharding for each leaf of the state; moments follow their parameters."""
    params = shardings(task.shapes, mesh)
    moments = jax.eval_shape(optimizer.init, task.shapes)
    opt_state = optax.tree_map_params(
        optimizer, lambda _, s: s, moments, params, transform_non_params=lambda _: replicated(mesh)
    )
    return {"params": params, "opt_state": opt_state, "step": replicated(mesh)}


def init_state(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int) -> State:
    """Creates parameters and moments already sharded; no device holds the whole model."""

    def make(key: jax.Array) -> State:
        params = task.init(key)
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros([], jnp.int32)}

    return jax.jit(make, out_shardings=state_shardings(task, optimizer, mesh))(jax.random.key(seed))


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """The state as ShapeDtypeStructs with shardings, which is what a checkpoint is restored into."""
    shapes = {
        "params": task.shapes,
        "opt_state": jax.eval_shape(optimizer.init, task.shapes),
        "step": jax.ShapeDtypeStruct([], jnp.int32),
    }
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(task, optimizer, mesh),
    )


def make_step(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, seed: int
) -> Callable[[State, dict[str, jax.Array]], tuple[State, dict[str, jax.Array]]]:
    """The jitted step: (state, batch) -> (state, metrics); the old state's memory is reused.

    Metrics hold `loss`, what the task adds, and `grad_norm` before clipping, all float32 scalars.
    """

    def step(state: State, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        (loss, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(state["params"], batch, key)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        metrics = {"loss": loss, **metrics, "grad_norm": optax.tree.norm(grads)}
        return {"params": params, "opt_state": opt_state, "step": state["step"] + 1}, metrics

    state_sharding = state_shardings(task, optimizer, mesh)
    batch = {name: batch_sharding(mesh) for name in task.fields}
    return jax.jit(
        step,
        in_shardings=(state_sharding, batch),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )


def put_batch(batch: dict[str, Any], fields: tuple[str, ...], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's slice of the global batch as sharded device arrays."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in fields}


def parameter_count(task: Task) -> int:
    return pytree.count(task.shapes)

"""Training state and the jitted step with explicit shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from icar_jax import pytree
from icar_jax.config import ExperimentConfig
from icar_jax.parallel.mesh import batch_sharding, replicated
from icar_jax.parallel.rules import shardings
from icar_jax.training.losses import grad_cache
from icar_jax.training.optimizer import ema_init, ema_update, state_like, trainable
from icar_jax.training.tasks.base import Frozen, Metrics, Task
from icar_jax.training.tasks.kinds import kind_of

# {'params': nested dict float32, 'opt_state': optax state, 'step': int32 [], and with config.optim.ema 'ema' like params}.
# The position in the data is step x batch size and random keys are folded from (seed, step), so nothing else has to be stored
# to resume a run exactly.
State = dict[str, Any]


def state_shardings(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, config: ExperimentConfig) -> State:
    """Returns a sharding for each leaf of the state; moments and averages are sharded like their parameters."""
    params = shardings(task.shapes, mesh)
    opt_state = state_like(optimizer, task.shapes, params, replicated(mesh))
    average = {"ema": params} if config.optim.ema else {}
    return {"params": params, "opt_state": opt_state, "step": replicated(mesh), **average}


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    config: ExperimentConfig,
    params: pytree.Tree | None = None,
) -> State:
    """Returns the initial state, created sharded: no device ever holds the whole model.

    `params`, sharded arrays, are used (and donated) in place of random parameters.
    """
    wanted = state_shardings(task, optimizer, mesh, config)

    def rest(params: pytree.Tree) -> State:
        average = {"ema": ema_init(params)} if config.optim.ema else {}
        return {"params": params, "opt_state": optimizer.init(params), "step": jnp.zeros([], jnp.int32), **average}

    if params is not None:
        return jax.jit(rest, out_shardings=wanted, donate_argnums=0)(params)
    with jax.transfer_guard("allow"):  # transfers the seed
        return jax.jit(lambda key: rest(task.init(key)), out_shardings=wanted)(jax.random.key(config.train.seed))


def abstract_state(task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, config: ExperimentConfig) -> State:
    """Returns the state as ShapeDtypeStructs with shardings, the target for restoring a checkpoint."""
    shapes = {
        "params": task.shapes,
        "opt_state": jax.eval_shape(optimizer.init, task.shapes),
        "step": jax.ShapeDtypeStruct([], jnp.int32),
        **({"ema": jax.eval_shape(ema_init, task.shapes)} if config.optim.ema else {}),
    }
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(task, optimizer, mesh, config),
    )


def make_step(
    task: Task, optimizer: optax.GradientTransformation, mesh: Mesh, config: ExperimentConfig
) -> Callable[[State, dict[str, jax.Array], Frozen], tuple[State, Metrics]]:
    """Returns the jitted step (state, batch, frozen) -> (state, metrics); the old state is donated.

    The batch has the entries `task.fields`; `frozen` holds the arrays of `task.frozen`, which are not trained.

    Metrics are float32 scalars: `loss`, the metrics of the task, and `grad_norm`, the global norm over the trained parameters
    before clipping.
    """
    groups = kind_of(config).frozen_groups

    def gradient(params: pytree.Tree, batch: dict[str, jax.Array], key: jax.Array, frozen: Frozen):
        # With stop_gradient on frozen parameters, XLA never builds the backward pass of a frozen tower.
        freeze = lambda tree: pytree.map_with_path(
            lambda path, leaf: leaf if trainable(path, groups) else jax.lax.stop_gradient(leaf), tree
        )
        if config.train.accumulate > 1:
            return grad_cache.value_and_grad(
                lambda p, part: task.embed(freeze(p), part),
                lambda p, embeddings: task.contrast(freeze(p), embeddings, key),
                params,
                task.draw(batch, key, frozen),  # drawn once, so that both passes over a part see the same values
                parts=config.train.accumulate,
                mesh=mesh,
            )
        return jax.value_and_grad(lambda p: task.loss(freeze(p), batch, key, frozen), has_aux=True)(params)

    def step(state: State, batch: dict[str, jax.Array], frozen: Frozen):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state["step"])
        (loss, metrics), grads = gradient(state["params"], batch, key, frozen)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        if config.optim.ema:
            new["ema"] = ema_update(state["ema"], params, config.optim.ema, state["step"])
        learning = {path: g for path, g in pytree.flatten(grads).items() if trainable(path, groups)}
        return new, {"loss": loss, **metrics, "grad_norm": optax.tree.norm(learning)}

    state_sharding = state_shardings(task, optimizer, mesh, config)
    batch = {name: batch_sharding(mesh) for name in task.fields}
    frozen = {name: shardings(tree, mesh) for name, tree in task.frozen.items()}
    return jax.jit(
        step,
        in_shardings=(state_sharding, batch, frozen),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )


def model_params(state: State) -> pytree.Tree:
    """Returns the parameters to evaluate and export: the moving average if there is one, else the weights."""
    return state.get("ema", state["params"])


def put_batch(batch: dict[str, Any], fields: tuple[str, ...], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns this process's slice of the global batch as device arrays sharded over the batch axes of `mesh`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in fields}


def parameter_count(task: Task) -> int:
    """Returns the number of parameters of the task's model."""
    return pytree.count(task.shapes)

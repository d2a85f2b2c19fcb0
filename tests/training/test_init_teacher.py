"""A run that is held to what the weights it starts from say of each image."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, LossConfig, MeshConfig
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import flops
from icar_jax.models.clip import Clip
from icar_jax.parallel.mesh import make_mesh
from icar_jax.parallel.rules import shardings
from icar_jax.planner import flops as plan_flops
from icar_jax.training.loop import train
from icar_jax.training.losses import grad_cache
from icar_jax.training.step import put_batch
from icar_jax.training.tasks.kinds import kind_of
from tests.support import drawn, programs
from tests.support.comparing import require_near
from tests.support.programs import on_eight_devices
from tests.support.runs import CAPTIONS, batch_of, tiny_config

WEIGHT = 3.0


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 300)


@pytest.fixture(scope="module")
def origin(tokenizer, tmp_path_factory):
    """A random checkpoint of the tiny run's tower, without exits and merging."""
    return _write(tmp_path_factory.mktemp("origin") / "model", tokenizer, 0)


def _write(folder, tokenizer, seed):
    config = tiny_config()
    config.clip = dataclasses.replace(config.clip, exits=())
    task = kind_of(config).task(tokenizer)
    return checkpoint.write(folder, "clip", task.description, drawn.params(task.shapes, seed), tokenizer.to_json())


def held(origin, merge=(0, 1), exits=(2,), weight=WEIGHT, **train):
    config = tiny_config(init=str(origin), **train)
    config.clip = dataclasses.replace(config.clip, merge=merge, exits=exits)
    config.loss = LossConfig(distill_init=weight, exit_weights=(0.2, 1.0) if exits else ())
    return config


def one_device():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


def made(config, tokenizer, rows=8, mesh=None):
    """(task, first parameters, batch, frozen arrays)."""
    kind = kind_of(config)
    task = kind.task(tokenizer, mesh or one_device())
    start = pytree.flatten(checkpoint.read(config.train.init, "clip").params)
    fresh = pytree.flatten(drawn.params(task.shapes, 5))
    params = pytree.unflatten({path: start.get(path, leaf) for path, leaf in fresh.items()})
    frozen = pytree.map_with_path(lambda _, leaf: np.asarray(leaf), kind.frozen_params(task))
    return task, params, batch_of(tokenizer, task, rows), frozen


def test_the_loss_is_what_the_embeddings_have_moved_by(origin, tokenizer):
    config = held(origin)
    task, params, batch, frozen = made(config, tokenizer)
    value, metrics = jax.jit(task.loss)(params, batch, jax.random.key(0), frozen)
    plain, _ = jax.jit(kind_of(held(origin, weight=0.0)).task(tokenizer).loss)(params, batch, jax.random.key(0))
    started = Clip.graph(kind_of(held(origin, (), ())).arch(tokenizer))
    pixels = jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1
    then = jax.jit(started.encode_image)(checkpoint.read(origin, "clip").params, pixels)
    now = jax.jit(Clip.graph(task.arch).encode_image_exits)(params, pixels)
    moved = {exit: 1 - float(np.mean(np.sum(np.asarray(z) * then, axis=1))) for exit, z in now.items()}
    assert moved[3] > 0.001  # patches merged
    assert float(metrics["distill_init"]) == pytest.approx((0.2 * moved[2] + moved[3]) / 1.2, rel=1e-4)
    assert float(value) == pytest.approx(float(plain) + WEIGHT * float(metrics["distill_init"]), rel=1e-5)


def test_where_nothing_changed_nothing_is_lost(origin, tokenizer):
    task, params, batch, frozen = made(held(origin, (), ()), tokenizer)
    (_, metrics), grads = jax.jit(jax.value_and_grad(task.loss, has_aux=True, argnums=3))(
        params, batch, jax.random.key(0), frozen
    )
    assert float(metrics["distill_init"]) == pytest.approx(0, abs=1e-6)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(grads["init"]))  # the copy does not learn


def test_a_tower_of_another_size_is_refused(origin, tokenizer):
    config = held(origin)
    config.clip = dataclasses.replace(config.clip, image_size=96)
    with pytest.raises(ConfigError, match="64 pixels, but this run has 96; set config.clip.image_size=64"):
        kind_of(config).task(tokenizer)


def test_the_forward_pass_of_the_copy_is_counted(origin):
    config, plain = held(origin), held(origin, weight=0.0)
    arch, copy = kind_of(config).arch(None), kind_of(held(origin, (), ())).arch(None)
    more = plan_flops.step_flops(config, arch).model - plan_flops.step_flops(plain, arch).model
    assert more == config.train.batch_size * flops.vision_flops(copy.vision)


@pytest.mark.check
def test_accumulated_gradient_equals_the_whole_batch(origin, tokenizer):
    config, key = held(origin), jax.random.key(5)
    task, params, batch, frozen = made(config, tokenizer)
    expected = jax.jit(jax.value_and_grad(lambda p: task.loss(p, batch, key, frozen), has_aux=True))(params)
    found = jax.jit(
        lambda p: grad_cache.value_and_grad(
            task.embed, lambda p, z: task.contrast(p, z, key), p, task.draw(batch, key, frozen), parts=2, mesh=one_device()
        )
    )(params)  # fmt: skip
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def eight_against_one(origin: str) -> dict:
    """Loss and gradient on each mesh against one device, the copy cut up as parameters are; blocks scanned on one of them."""
    words, key, expected, checked = Tokenizer.train(CAPTIONS, 300), jax.random.key(5), None, 0
    for shape, scan in (((1, 1, 1), False), ((8, 1, 1), False), ((2, 4, 1), True), ((2, 2, 2), False)):
        mesh, config = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))]), held(origin, scan_blocks=scan)
        task, params, batch, frozen = made(config, words, 16, mesh)
        params = jax.device_put(params, shardings(task.shapes, mesh))
        frozen = {name: jax.device_put(frozen[name], shardings(tree, mesh)) for name, tree in task.frozen.items()}
        batch = put_batch(batch, task.fields, mesh)
        gradient = jax.jit(jax.value_and_grad(lambda p, b, f: task.loss(p, b, key, f), has_aux=True))
        found = jax.device_get(gradient(params, batch, frozen))
        expected = expected or found
        require_near(found, expected, shape)
        checked += 1
    return {"checked": checked}


@pytest.mark.check
def test_eight_devices_equal_one(origin):
    script = "import json, sys\nfrom tests.training.test_init_teacher import eight_against_one\n"
    script += "print(json.dumps(eight_against_one(sys.argv[1])))"
    assert on_eight_devices(script, str(origin), fast=False) == {"checked": 4}


@pytest.mark.check
def test_a_first_start_that_saved_nothing_leaves_no_trace(origin, tokenizer, tmp_path):
    """What the run began with is what it began with when it first saved its state."""
    start = tmp_path / "start"
    shutil.copytree(origin, start)
    train(held(start), tmp_path / "run", stop_after=0)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(start)
    _write(start, tokenizer, 1)
    train(held(start), tmp_path / "run", stop_after=2)
    train(held(start), tmp_path / "run")
    assert len(programs.curve(tmp_path / "run")) == 4


@pytest.mark.check
def test_a_run_resumes_exactly_and_only_with_the_weights_it_began_with(origin, tokenizer, tmp_path):
    start = tmp_path / "start"
    shutil.copytree(origin, start)
    config = held(start)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "cut", stop_after=2)
    train(config, tmp_path / "other", stop_after=2)
    train(config, tmp_path / "cut")
    assert programs.curve(tmp_path / "cut") == programs.curve(tmp_path / "whole")
    assert "distill_init" in programs.curve(tmp_path / "whole")[0]
    shutil.rmtree(start)
    with pytest.raises(ConfigError, match=f"config.train.init={start}: .*does not exist"):
        train(config, tmp_path / "other")
    _write(start, tokenizer, 1)
    with pytest.raises(ConfigError, match=f"config.train.init={start} differs from the model that {tmp_path / 'other'}"):
        train(config, tmp_path / "other")

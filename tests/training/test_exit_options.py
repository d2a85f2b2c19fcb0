"""The levers as fields of a run: what they go together with, how a step draws, resumes, accumulates and shards."""

import dataclasses

import jax
import numpy as np
import pytest

from icar_jax import architectures
from icar_jax.config import ClipConfig, ConfigError, ExperimentConfig, LossConfig, MeshConfig, TrainConfig, validate
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.parallel.mesh import make_mesh
from icar_jax.parallel.rules import shardings
from icar_jax.planner import flops
from icar_jax.training.loop import train
from icar_jax.training.losses import grad_cache
from icar_jax.training.step import put_batch
from icar_jax.training.tasks.kinds import kind_of
from tests.support import programs
from tests.support.comparing import assert_close, require_near
from tests.support.programs import on_eight_devices
from tests.support.runs import CAPTIONS, batch_of, tiny_config


def config_of(task="clip", exits=(2,), freeze=(), layer_dropout=0.0, exit_head="linear", init="", **loss):
    return ExperimentConfig(
        task=task,
        clip=ClipConfig(variant="vit_demo", exits=exits, exit_head=exit_head),
        loss=LossConfig(**loss),
        train=TrainConfig(freeze=freeze, layer_dropout=layer_dropout, init=init),
    )


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"exit_head": "adaptor"}, "config.clip.exit_head='adaptor'.*did you mean 'adapter'"),
        ({"mixed": -1.0}, r"config.loss.mixed=-1.0 must lie in \[0, 1000000\]; 0 switches it off"),
        ({"distill_kl": float("inf")}, "config.loss.distill_kl=inf must lie in"),
        ({"distill_init": -1.0}, "config.loss.distill_init=-1.0 must lie in"),
        (
            {"distill_init": 1.0, "init": "x", "freeze": ("image",)},
            "config.loss.distill_init=1.0 has no effect while config.train.freeze=",
        ),
        ({"distill_init": 1.0}, "config.loss.distill_init=1.0 aims at .*config.train.init='' names none"),
        ({"distill_cosine": 1.0, "exits": ()}, r"config.loss.distill_cosine=1.0 is about early exits, and config.clip.exits="),
        ({"layer_dropout": 1.0}, r"config.train.layer_dropout=1.0 must lie in \[0, 1\)"),
        ({"layer_dropout": 0.1, "freeze": ("image",)}, "config.train.layer_dropout=0.1 .*config.train.freeze=.*'image'"),
        ({"mixed": 1.0, "direction": "image_to_text"}, "config.loss.mixed=1.0 .*config.loss.direction='image_to_text'"),
        ({"distill_kl": 1.0, "kind": "sigmoid"}, "config.loss.distill_kl=1.0 .*config.loss.kind='sigmoid'"),
        ({"distill_kl": 1.0, "chunk": 8}, "config.loss.distill_kl=1.0 .*config.loss.chunk=8"),
        ({"task": "complexity", "mixed": 1.0}, "config.loss.mixed=1.0 is for task 'clip' only"),
        ({"task": "complexity", "layer_dropout": 0.5}, "config.train.layer_dropout=0.5 is for task 'clip' only"),
    ],
)
def test_what_does_not_go_together_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(config_of(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"mixed": 1.0, "distill_cosine": 1.0, "kind": "sigmoid", "chunk": 8, "layer_dropout": 0.2},
        {"mixed": 1.0, "distill_kl": 1.0, "distill_cosine": 1.0, "freeze": ("text",), "exit_head": "attention"},
        {"exits": (), "layer_dropout": 0.2},
    ],
)
def test_what_goes_together_is_let_pass(fields):
    validate(config_of(**fields))


def test_flops_of_a_step_count_the_matrix_of_the_mixed_gallery_and_the_gradient_of_kl():
    config, arch = config_of(exits=(2, 4)), architectures.clip_arch(ClipConfig(variant="vit_demo", exits=(2, 4)))
    matrix = 2 * config.train.batch_size**2 * arch.vision.embed_dim
    more = lambda **loss: flops.step_flops(config_of(exits=(2, 4), **loss), arch).model - plain
    plain = flops.step_flops(config, arch).model
    assert more(mixed=1.0) == 3 * matrix
    assert more(distill_kl=1.0) == 2 * matrix
    assert more(distill_cosine=1.0) == 0


# --- with real steps ---


def all_levers(**train):
    config = tiny_config(layer_dropout=0.4, **train)
    config.clip = dataclasses.replace(config.clip, exits=(1, 2), exit_head="adapter", merge=(0, 1))
    config.loss = LossConfig(distill_cosine=0.5, distill_kl=0.5, mixed=0.5, exit_weights=(0.2, 0.3, 0.5))
    return config


@pytest.mark.check
def test_accumulated_gradient_equals_the_whole_batch():
    """Both passes over a part see the blocks that were drawn for its images, and the exits are drawn for the whole batch."""
    tokenizer, mesh = Tokenizer.train(CAPTIONS, 300), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    task, key = kind_of(all_levers()).task(tokenizer, mesh), jax.random.key(5)
    params, batch = jax.jit(task.init)(jax.random.key(0)), batch_of(tokenizer, task)
    whole = jax.jit(jax.value_and_grad(lambda p, k: task.loss(p, batch, k), has_aux=True))

    def parts(p, k):
        contrast = lambda p, found: task.contrast(p, found, k)
        return grad_cache.value_and_grad(task.embed, contrast, p, task.draw(batch, k), parts=2, mesh=mesh)

    expected = whole(params, key)
    assert_close(jax.jit(parts)(params, key), expected)
    assert float(whole(params, jax.random.key(6))[0][0]) != float(expected[0][0])


@pytest.mark.check
def test_a_run_with_all_levers_resumes_exactly_and_logs_them(tmp_path):
    train(all_levers(), tmp_path / "whole")
    train(all_levers(), tmp_path / "cut", stop_after=2)
    train(all_levers(), tmp_path / "cut")
    assert programs.curve(tmp_path / "cut") == programs.curve(tmp_path / "whole")
    assert {"distill_cosine", "distill_kl", "loss_mixed"} <= set(programs.curve(tmp_path / "whole")[0])


def eight_against_one() -> dict:
    """Loss and gradient of all levers on each mesh, against one device; `scan_blocks` on one of them."""
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    key, expected, checked = jax.random.key(5), None, 0
    for shape, scan in (((1, 1, 1), False), ((8, 1, 1), False), ((2, 4, 1), True), ((2, 2, 2), False)):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
        task = kind_of(all_levers(scan_blocks=scan)).task(tokenizer, mesh)
        params = jax.jit(task.init, out_shardings=shardings(task.shapes, mesh))(jax.random.key(0))
        batch = put_batch(batch_of(tokenizer, task, 16), task.fields, mesh)
        found = jax.jit(jax.value_and_grad(lambda p, b, task=task: task.loss(p, b, key), has_aux=True))(params, batch)
        found = jax.device_get(found)
        expected = expected or found
        require_near(found, expected, shape)
        checked += 1
    return {"checked": checked}


@pytest.mark.check
def test_eight_devices_equal_one():
    script = (
        "import json\nfrom tests.training.test_exit_options import eight_against_one\nprint(json.dumps(eight_against_one()))"
    )
    assert on_eight_devices(script, fast=False) == {"checked": 4}

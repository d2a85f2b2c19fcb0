"""Training with token reduction: CrossGET's losses against the official code, options, schedules, meshes and real runs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax import architectures
from icar_jax.config import ClipConfig, ConfigError, ExperimentConfig, LossConfig, MeshConfig, TrainConfig, from_dict, validate
from icar_jax.convert.convert import in_memory
from icar_jax.convert.layouts.base import Options
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models import flops
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.reduction.routes import route
from icar_jax.parallel.mesh import make_mesh
from icar_jax.parallel.rules import shardings
from icar_jax.planner import flops as plan_flops
from icar_jax.training.loop import train
from icar_jax.training.losses import grad_cache
from icar_jax.training.losses.contrastive import contrastive
from icar_jax.training.losses.crossget import cross_loss
from icar_jax.training.step import put_batch
from icar_jax.training.tasks.kinds import kind_of
from tests.support import crossget, programs
from tests.support.comparing import assert_close, require_near
from tests.support.programs import on_eight_devices
from tests.support.runs import CAPTIONS, batch_of, tiny_config


def test_losses_and_gradients_are_those_of_the_official_code(tmp_path):
    case = crossget.case()
    options = Options(reduce="crossget", image_r=crossget.IMAGE_R, text_r=crossget.TEXT_R)
    loaded = in_memory(crossget.write(tmp_path / "model.pth"), options)
    clip = Clip.graph(from_dict(loaded.description["arch"], ClipArch, "arch"))
    images, tokens = jnp.asarray(case["images"].transpose(0, 2, 3, 1)), jnp.asarray(case["tokens"], jnp.int32)

    def losses(params):
        image, of_image = clip.encode_image_with_cross(params, images, (2,))
        text, of_text = clip.encode_text_with_cross(params, tokens)
        aligned = contrastive(image[2], text, clip.logit_scales(params)[2], ids=jnp.asarray(case["idx"]))
        crossed = cross_loss(of_image, of_text)
        return (aligned + crossed) / 2, (aligned, crossed, cross_loss(of_image, of_text, "jensen_shannon"))

    (total, parts), gradient = jax.jit(jax.value_and_grad(losses, has_aux=True))(loaded.params)
    np.testing.assert_allclose(total, case["loss"], rtol=1e-6)
    np.testing.assert_allclose(parts[:2], (case["loss_ita"], case["loss_kd"]), rtol=1e-6)
    assert float(parts[2]) == pytest.approx(0.1630, abs=1e-4)  # the textbook's, of the same tokens
    for tower, name in (("vision", "visual.transformer.cross_image"), ("text", "transformer.cross_text")):
        np.testing.assert_allclose(gradient[tower]["cross"], case[f"grad/{name}"][0], atol=1e-6)


def config_of(loss=(), train=(), **clip):
    kept = {"variant": "vit_demo", "exits": (2,), "reduce": "crossget", "patch_size": 16, **clip}
    return ExperimentConfig(clip=ClipConfig(**kept), loss=LossConfig(**dict(loss)), train=TrainConfig(**dict(train)))


@pytest.mark.parametrize(
    "config, message",
    [
        (config_of(reduce="cross_get"), "config.clip.reduce='cross_get'.*did you mean 'crossget'"),
        (config_of(merge=(1,)), r"config.clip.merge=\(1,\) and config.clip.reduce='crossget' both remove tokens"),
        (config_of(reduce="none", reduce_to=0.6), "config.clip.reduce_to=0.6 needs a method"),
        (config_of(reduce_r=(1,), reduce_to=0.6), r"config.clip.reduce_r=\(1,\) and config.clip.reduce_to=0.6 both set"),
        (config_of(reduce="tome", reduce_text=(1,)), r"config.clip.reduce_text=\(1,\) is for config.clip.reduce='crossget'"),
        (config_of({"cross": 1.0}, reduce="tome"), "config.loss.cross=1.0 compares cross tokens.*found 'tome'"),
        (config_of({"cross_form": "js"}), "config.loss.cross_form='js'.*jensen_shannon"),
        (config_of({"image_ids": True, "chunk": 8}), "config.loss.image_ids=True .*config.loss.chunk=8"),
        (config_of({"image_ids": True, "kind": "sigmoid"}), "config.loss.image_ids=True .*config.loss.kind='sigmoid'"),
        (config_of(train={"cache_frozen": True}), "config.train.cache_frozen=True .*config.clip.reduce='crossget'"),
    ],
)
def test_what_does_not_go_together_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        validate(config)


@pytest.mark.parametrize(
    "clip, message",
    [
        (
            {"reduce": "tome", "reduce_r": (4,)},
            r"reduce_r=4 in each of 6 blocks asks for 24 tokens, and 16 of 17 can merge .1 are protected.; use 0 to 2",
        ),
        ({"reduce": "tome", "reduce_r": (0,) * 7}, "has 7 entries, but the tower has 6 blocks"),
        ({"reduce": "drop", "reduce_r": (16,)}, "after block 2 there are 16 patches, and 0 to 15 can be dropped"),
        (
            {"reduce": "drop", "reduce_r": (4,), "reduce_after": 1, "pool": "first_patch"},
            r"'first_patch' does not work at exits",
        ),
        ({"reduce": "tome", "reduce_to": 0.1}, r"reduce_to=0.1: with 'tome' the tower costs at least 0\.\d+ of its FLOPs"),
        (
            {"reduce": "tome", "reduce_r": (1,), "reduce_after": 6},
            "reduce_after=6 leaves none of the 6 blocks to remove tokens",
        ),
        ({"depth": 4}, "4 image blocks and 3 text blocks, and 3 does not divide 4"),
        ({"reduce_text": (40,)}, "reduce_text=40 in each of 3 blocks asks for 120 tokens, and 75 of 78 can merge"),
        (
            {"reduce": "tome", "reduce_to": 0.7, "reduce_routes": (0.9,)},
            "a route costs 0.87.* of full depth, more than the tower",
        ),
    ],
)
def test_schedules_that_the_tower_cannot_have_are_named_with_their_numbers(clip, message):
    with pytest.raises(ConfigError, match=message):
        architectures.clip_arch(config_of(**clip).clip)


def test_a_configuration_gives_the_schedule_and_the_routes():
    full = architectures.clip_arch(config_of(reduce="none").clip).vision
    cost = lambda vision, exit=None: flops.vision_flops(vision, exit) / flops.vision_flops(full)
    vision = architectures.clip_arch(config_of(reduce="tome", reduce_to=0.8).clip).vision
    assert 0.75 < cost(vision) <= 0.8 and not vision.routes
    routed = architectures.clip_arch(config_of(reduce="tome", reduce_routes=(0.8, 0.6)).clip).vision
    assert routed.schedule == () and routed.schedules[0] == vision.schedule
    assert routed.routes == (2, route(6, 2), route(6, 1), 6) == routed.all_exits
    assert [cost(routed, e) for e in routed.routes] == sorted(cost(routed, e) for e in routed.routes)
    dropped = architectures.clip_arch(config_of(reduce="drop", reduce_r=(6,), reduce_after=3).clip).vision
    assert (dropped.schedule, dropped.tokens_after(3), dropped.tokens_after(4)) == ((0, 0, 6), 17, 11)
    step = lambda config: plan_flops.step_flops(config, architectures.clip_arch(config.clip)).model
    assert step(config_of(reduce="tome", reduce_to=0.8)) < step(config_of(reduce="tome", reduce_routes=(0.8, 0.6)))


# --- with real steps ---


def every_option(**train):
    """CrossGET with two schedules in both towers, and the losses that go with it."""
    config = tiny_config(**train)
    config.clip = dataclasses.replace(
        config.clip, exits=(1, 2), image_size=64, patch_size=16, reduce="crossget", reduce_r=(2,), reduce_text=(2,),
        reduce_routes=(0.7,),
    )  # fmt: skip
    config.loss = LossConfig(cross=0.5, image_ids=True, distill_cosine=0.5)
    return config


@pytest.mark.check
def test_accumulated_gradient_equals_the_whole_batch_with_the_schedule_that_was_drawn():
    tokenizer, mesh = Tokenizer.train(CAPTIONS, 300), make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    task, key = kind_of(every_option()).task(tokenizer, mesh), jax.random.key(5)
    params, batch = jax.jit(task.init)(jax.random.key(0)), with_ids(batch_of(tokenizer, task))
    whole = jax.jit(jax.value_and_grad(lambda p, k: task.loss(p, batch, k), has_aux=True))

    def parts(p, k):
        contrast = lambda p, found: task.contrast(p, found, k)
        return grad_cache.value_and_grad(task.embed, contrast, p, task.draw(batch, k), parts=2, mesh=mesh)

    expected = whole(params, key)
    assert_close(jax.jit(parts)(params, key), expected)
    assert len({round(float(whole(params, jax.random.key(k))[0][0]), 6) for k in range(6)}) == 2  # two schedules


def with_ids(batch):
    return {**batch, "index": np.arange(len(batch["image"]), dtype=np.int32) // 2}


@pytest.mark.check
def test_a_run_resumes_exactly_and_logs_the_cross_loss(tmp_path):
    train(every_option(), tmp_path / "whole")
    train(every_option(), tmp_path / "cut", stop_after=2)
    train(every_option(), tmp_path / "cut")
    curve = programs.curve(tmp_path / "whole")
    assert programs.curve(tmp_path / "cut") == curve and curve[-1]["loss_cross"] > 0
    assert curve[-1]["loss_cross"] != curve[0]["loss_cross"]


@pytest.mark.check
def test_a_trained_model_starts_runs_with_and_without_reduction(tmp_path):
    train(every_option(), tmp_path / "crossget")
    notes = {}
    for name, clip in (("tome", {"reduce": "tome", "reduce_text": (), "reduce_routes": ()}), ("again", {})):
        config = every_option(init=str(tmp_path / "crossget"))
        config.clip = dataclasses.replace(config.clip, **clip)
        config.loss = LossConfig() if name == "tome" else config.loss
        kind = kind_of(validate(config))
        task = kind.task(kind.tokenizer(None, None))
        notes[name] = []
        kind.initial_params(task, notes[name].append)
    assert any("the cross tokens of its vision tower are dropped" in line for line in notes["tome"])
    assert not any("cross tokens" in line for line in notes["again"])


def eight_against_one() -> dict:
    """Loss and gradient of every option on each mesh, against one device; with remat and `scan_blocks` on one of them."""
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    key, expected, checked = jax.random.key(5), None, 0
    for shape, more in (((1, 1, 1), {}), ((8, 1, 1), {}), ((2, 4, 1), {"scan_blocks": True, "remat": "dots"}), ((2, 2, 2), {})):
        mesh = make_mesh(MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
        task = kind_of(every_option(**more)).task(tokenizer, mesh)
        params = jax.jit(task.init, out_shardings=shardings(task.shapes, mesh))(jax.random.key(0))
        batch = put_batch(with_ids(batch_of(tokenizer, task, 16)), task.fields, mesh)
        found = jax.jit(jax.value_and_grad(lambda p, b, task=task: task.loss(p, b, key), has_aux=True))(params, batch)
        found = jax.device_get(found)
        expected = expected or found
        require_near(found, expected, shape)
        checked += 1
    return {"checked": checked}


@pytest.mark.check
def test_eight_devices_equal_one():
    """Ties too: patches that are each other's nearest always tie, and their order must not depend on the mesh."""
    script = (
        "import json\nfrom tests.training.test_token_reduction_runs import eight_against_one\n"
        "print(json.dumps(eight_against_one()))"
    )
    assert on_eight_devices(script, fast=False) == {"checked": 4}

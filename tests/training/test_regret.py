"""Regret against its definition, written plainly; runs that learn it, and what stops them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, validate
from icar_jax.data.images import Preprocess
from icar_jax.data.loader.batches import train_batches
from icar_jax.data.scenes import Scenes
from icar_jax.evaluation.routing.calibration import make_bundle
from icar_jax.models.clip import Clip
from icar_jax.models.exit_regret import ExtraNegatives, cosine_regret, loss_regret, unit_ranks
from icar_jax.training.loop import train
from icar_jax.training.tasks import regret
from icar_jax.training.tasks.kinds import kind_of
from tests.support.regret import plain_regret, unit
from tests.support.runs import metric_lines, regret_config


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2, 5, 9]), st.sampled_from([1.0, 14.0, 60.0]), st.integers(0, 2**32 - 1))
def test_loss_regret_is_the_infonce_of_one_early_image_among_full_ones(n, scale, seed):
    rng = np.random.default_rng(seed)
    exit, full, text = (unit(rng, n, 5) for _ in range(3))
    found = loss_regret(exit, full, text, scale)
    np.testing.assert_allclose(found, plain_regret(exit, full, text, scale), atol=1e-4 * scale)
    found = loss_regret(exit, full, text, scale, weighed=True)
    np.testing.assert_allclose(found, plain_regret(exit, full, text, scale, weighed=True), atol=1e-4 * scale)
    np.testing.assert_allclose(loss_regret(full, full, text, scale), 0, atol=1e-6 * scale)
    np.testing.assert_allclose(cosine_regret(exit, full), [1 - a @ b for a, b in zip(exit, full)], atol=1e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 5), st.booleans(), st.integers(0, 2**32 - 1))
def test_rivals_count_as_pairs_of_the_batch_but_for_those_in_it(same, weighed, seed):
    rng = np.random.default_rng(seed)
    exit, full, text = (unit(rng, 4, 5) for _ in range(3))
    image, caption = unit(rng, 6, 5), unit(rng, 6, 5)
    kept = np.arange(6) != same
    found = loss_regret(exit, full, text, 14.0, ExtraNegatives(image, caption, ~kept), weighed)
    whole = [np.concatenate(each) for each in ((exit, image[kept]), (full, image[kept]), (text, caption[kept]))]
    np.testing.assert_allclose(found, plain_regret(*whole, 14.0, weighed)[:4], atol=2e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12))
def test_unit_ranks_share_the_mean_of_ties(values):
    expected = (rankdata(values) - 1) / max(len(values) - 1, 1)
    np.testing.assert_allclose(unit_ranks(np.array(values, np.float32)), expected, atol=1e-6)


def batch_of(config, task):
    source = Scenes("train", 50, image_size=32)
    tokenizer = regret.clip_tokenizer(config)
    reading = {"batch_size": 8, "seed": 0, "num_threads": 0, "others": task.others}
    with train_batches(source, task.preprocess, tokenizer, task.context_length, **reading) as batches:
        batch = next(batches)
    return {name: batch[name] for name in task.fields}


_EACH = [("blocks", 0, "loss"), ("convnextv2_tests", 32, "kl"), ("convnextv2_tests", 48, "cosine")]
_ALL = [(variant, size, kind) for variant, size, _ in _EACH for kind in ("loss", "kl", "cosine")]


@pytest.mark.parametrize(
    ("variant", "size", "kind"), [*_EACH, *(pytest.param(*case, marks=pytest.mark.check) for case in _ALL if case not in _EACH)]
)
def test_targets_are_the_ranks_of_the_clips_own_regrets(variant, size, kind, clip_folder):
    config = regret_config(clip_folder, variant)
    config.complexity.image_size, config.complexity.regret, config.complexity.exit = size or 224, kind, 2
    kind_ = kind_of(validate(config))
    task = kind_.task()
    batch, frozen = batch_of(config, task), kind_.frozen_params(task)
    assert ("clip_image" in batch) == (size == 48), "a second picture only where the CLIP sees another one"
    teacher = regret.teacher(config)
    clip, params = Clip.graph(teacher.clip.arch), frozen["clip"]
    pixels = (batch.get("clip_image", batch["image"]) / 255).astype(np.float32)
    mean, std = (np.array(v, np.float32) for v in (teacher.preprocess.mean, teacher.preprocess.std))
    embeds = jax.jit(lambda p, x: clip.encode_image_exits(p, x, (2, 3)))(params, (pixels - mean) / std)
    if kind != "cosine":
        text = np.asarray(jax.jit(clip.encode_text)(params, batch["tokens"]))
        scale = float(clip.logit_scales(params)[3])
        expected = plain_regret(np.asarray(embeds[2]), np.asarray(embeds[3]), text, scale, kind == "kl")
    else:
        assert "tokens" not in batch
        expected = 1 - np.sum(np.asarray(embeds[2]) * np.asarray(embeds[3]), axis=1)
    whole = jax.device_get(task.init(jax.random.key(0)))
    tower = None
    if variant == "blocks":
        flat = pytree.flatten(params)
        whole = pytree.map_with_path(
            lambda path, leaf: flat[path.replace("tower/", "vision/", 1)] if path.startswith("tower/") else leaf, whole
        )
        from icar_jax.models.token_router import TokenRouter

        tower = jax.jit(TokenRouter.graph(task.arch).tokens)(whole, (pixels - mean) / std)
    found, metrics = teacher.target(batch, frozen, tower, 1 if variant == "blocks" else 0)
    np.testing.assert_allclose(found, (rankdata(expected) - 1) / 7, atol=1e-6)
    assert float(metrics["regret"]) == pytest.approx(expected.mean(), abs=1e-4)
    (loss, metrics), grads = jax.jit(jax.value_and_grad(lambda f: task.loss(whole, batch, jax.random.key(1), f), has_aux=True))(
        frozen
    )
    assert np.isfinite(loss) and 0 <= loss <= 1 and set(metrics) == {"regret"}
    assert not any(np.any(g) for g in jax.tree.leaves(grads)), "no gradient reaches the CLIP"


def test_second_pictures_go_through_the_same_random_changes():
    source, same = Scenes("train", 20, image_size=32), Preprocess(32, "squash")
    from icar_jax.data.augment import Augment

    augment = Augment("crop", flip=True, rotate=20, brightness=0.3)
    reading = {"batch_size": 6, "seed": 3, "augment": augment, "num_threads": 0}
    with train_batches(source, same, None, others={"again": same}, **reading) as batches:
        batch = next(batches)
    with train_batches(source, same, None, **reading) as batches:
        alone = next(batches)
    np.testing.assert_array_equal(batch["again"], batch["image"])
    np.testing.assert_array_equal(batch["image"], alone["image"])


def without_speed(workdir):
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in metric_lines(workdir)]


@pytest.mark.parametrize("variant", ["blocks", pytest.param("convnextv2_tests", marks=pytest.mark.check)])
def test_a_run_learns_regret_and_keeps_the_clip_out_of_its_checkpoint(variant, clip_folder, tmp_path):
    config = regret_config(clip_folder, variant, steps=4)
    folder = train(config, tmp_path / "run")
    trained = checkpoint.read(folder, "complexity")
    about = trained.description
    assert about["target"] == "regret"
    sha = checkpoint.describe(clip_folder)["hashes"][checkpoint.WEIGHTS]
    assert about["regret"] == {"kind": "loss", "exit": 1, "rivals": 0, "clip": str(clip_folder), "sha256": sha}
    assert trained.tokenizer is None and not (tmp_path / "run" / "tokenizer.json").exists()
    names = list(pytree.flatten(trained.params))
    assert not any(name.startswith(("clip", "text", "vision")) for name in names)
    assert not any("/blocks/1/" in name for name in names if name.startswith("tower")), "the router's own block alone"
    assert all("regret" in line for line in metric_lines(tmp_path / "run"))
    make_bundle(clip_folder, folder, tmp_path / "bundle", thresholds=(0.4, 0.6))
    pictures = [record.image() for record in Scenes("val", 5, image_size=32)]
    assert icar_jax.load(tmp_path / "bundle", batch_size=8).route(pictures).embeddings.shape == (5, 24)
    # Cut off and continued it is the same run.
    train(config, tmp_path / "cut", stop_after=2)
    again = checkpoint.read(train(config, tmp_path / "cut"), "complexity").params
    for path, leaf in pytree.flatten(trained.params).items():
        np.testing.assert_array_equal(leaf, pytree.flatten(again)[path])
    assert without_speed(tmp_path / "run") == without_speed(tmp_path / "cut")


def test_a_continued_run_needs_the_clip_it_began_with(clip_folder, tmp_path):
    clip = shutil.copytree(clip_folder, tmp_path / "clip")
    config = regret_config(clip)
    train(config, tmp_path / "run", stop_after=2)
    file = clip / checkpoint.DESCRIPTION
    about = json.loads(file.read_text())
    about["hashes"][checkpoint.WEIGHTS] = "0" * 64
    file.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match="differs from the CLIP that .*run started with.*restore the original one"):
        train(config, tmp_path / "run")
    shutil.rmtree(clip)
    with pytest.raises(ConfigError, match="config.complexity.clip=.*clip does not exist"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"complexity.clip": ""}, "config.complexity.clip='' but config.complexity.target='regret'"),
        ({"complexity.clip": "nowhere"}, "config.complexity.clip=nowhere: nowhere does not exist"),
        ({"complexity.exit": 3}, r"config.complexity.exit=3 is not an early exit of .*after \(1, 2\) blocks"),
        ({"complexity.exit": -1}, "config.complexity.exit=-1 must be an exit"),
        ({"complexity.target": "rank"}, "config.complexity.target='rank'"),
        ({"complexity.regret": "l2"}, "config.complexity.regret='l2'"),
        ({"complexity.head": "classification"}, "config.complexity.head='classification', but .* has no classes"),
        ({"complexity.target": "rating", "complexity.exit": 1}, "config.complexity.exit=1 is for .*target='regret'"),
        ({"data.source": "ratings", "data.root": "x"}, "config.data.source='ratings', but .*target='regret' learns"),
        ({"complexity.rivals": 10**6}, "rivals=1000000 extra negatives, but the training set has 200 images; set"),
        ({"complexity.rivals": -1}, "config.complexity.rivals=-1 must be 0, or a number of training pairs"),
        ({"complexity.rivals": 4, "complexity.regret": "cosine"}, "rivals=4 .*regret='loss' or 'kl' .found 'cosine'"),
        ({"complexity.rivals": 4, "complexity.target": "rating"}, "config.complexity.rivals=4 is for .*target='regret'"),
        ({"data.ratings": "x.csv"}, "config.data.ratings='x.csv', but .*target='regret' learns"),
    ],
)  # fmt: skip
def test_faults_are_named_before_anything_is_written(fields, message, clip_folder, tmp_path):
    config = regret_config(clip_folder)
    for name, value in fields.items():
        group, field = name.split(".")
        setattr(getattr(config, group), field, value)
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def changed(clip_folder, folder, **arch):
    """A copy of the CLIP with another description of its vision tower."""
    copy = shutil.copytree(clip_folder, folder)
    about = json.loads((copy / checkpoint.DESCRIPTION).read_text())
    about["arch"]["vision"] |= arch
    (copy / checkpoint.DESCRIPTION).write_text(json.dumps(about))
    return copy


def test_a_clip_without_exits_tokenizer_or_its_weights_is_named(clip_folder, tmp_path):
    plain = changed(clip_folder, tmp_path / "plain", exits=())
    with pytest.raises(ConfigError, match="has no early exit, so there is no regret to learn"):
        train(regret_config(plain, "convnextv2_tests"), tmp_path / "run")
    mute = shutil.copytree(clip_folder, tmp_path / "mute")
    (mute / checkpoint.TOKENIZER).unlink()
    with pytest.raises(ConfigError, match="has no tokenizer, but regret 'loss' reads captions"):
        train(regret_config(mute, "convnextv2_tests"), tmp_path / "run")
    other = changed(clip_folder, tmp_path / "other", mlp_width=128)
    with pytest.raises(ConfigError, match="its weights do not match its description"):
        train(regret_config(other, "convnextv2_tests"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_teacher_is_counted(clip_folder):
    from icar_jax.models import flops
    from icar_jax.planner.flops import step_flops

    config = regret_config(clip_folder, "convnextv2_tests")
    rated = dataclasses.replace(config, complexity=dataclasses.replace(config.complexity, target="rating", clip=""))
    arch = regret.teacher(config).clip.arch
    extra = step_flops(config, kind_of(config).task().arch).model - step_flops(rated, kind_of(rated).task().arch).model
    among = dataclasses.replace(config, complexity=dataclasses.replace(config.complexity, rivals=50))
    more = step_flops(among, kind_of(among).task().arch).model - step_flops(config, kind_of(config).task().arch).model
    assert more == config.train.batch_size * 3 * 2 * 50 * arch.vision.embed_dim
    pair = flops.vision_flops(arch.vision) + flops.head_flops(arch.vision, 1) + flops.text_flops(arch.text)
    assert extra == pytest.approx(config.train.batch_size * pair)

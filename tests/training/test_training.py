"""The step, the loop and resuming. Two steps, then two more, equal four steps bit for bit."""

import json
import logging as std_logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, OptimConfig
from icar_jax.data.loader.batches import UnreadableImages
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.parallel.mesh import make_mesh
from icar_jax.training.loop import NonFiniteLoss, train
from icar_jax.training.losses import contrastive
from icar_jax.training.optimizer import decays, group, make_optimizer, schedule
from icar_jax.training.step import init_state, make_step
from icar_jax.training.tasks.kinds import kind_of
from icar_jax.workdir import save_config
from tests.support.runs import metric_lines as lines
from tests.support.runs import tiny_config


def weights(workdir, kind="clip"):
    return pytree.flatten(checkpoint.read(workdir / "model", kind).params)


@pytest.mark.parametrize("task", ["clip", pytest.param("complexity", marks=pytest.mark.check)])
def test_two_steps_then_two_more_equal_four_bit_for_bit(task, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(task), whole)
    train(tiny_config(task), parts, stop_after=2)
    assert not (parts / "model").exists()
    train(tiny_config(task), parts)
    expected, found = weights(whole, task), weights(parts, task)
    assert expected.keys() == found.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    timeless = [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines(whole)]
    assert [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines(parts)] == timeless
    assert [line["step"] for line in timeless] == [1, 2, 3, 4]
    icar_jax.load(parts)


def test_a_finished_run_stays_as_it_is(tmp_path):
    train(tiny_config(), tmp_path)
    before = weights(tmp_path)
    train(tiny_config(), tmp_path)
    assert all(np.array_equal(before[p], leaf) for p, leaf in weights(tmp_path).items())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_the_loss_falls_and_is_logged_for_every_exit(tmp_path):
    config = tiny_config(steps=30, checkpoint_every=30)
    config.data.scenes_size = 8  # few enough to be learnt by heart in seconds
    train(config, tmp_path)
    log = lines(tmp_path)
    assert {"loss", "loss_2", "loss_3", "scale_2", "grad_norm", "lr"} <= log[0].keys()
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 30


def test_another_configuration_in_the_same_workdir_is_refused(tmp_path):
    train(tiny_config(), tmp_path, stop_after=2)
    other = tiny_config(batch_size=4)
    with pytest.raises(ConfigError, match=r"config.train.batch_size was 8, now 4"):
        train(other, tmp_path)
    relaxed = tiny_config(log_every=2)  # bookkeeping may change
    train(relaxed, tmp_path)


@pytest.mark.check
def test_a_non_finite_loss_names_step_and_files_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    real = contrastive.contrastive
    config = tiny_config()
    train(config, tmp_path, stop_after=2)
    monkeypatch.setattr(contrastive, "contrastive", lambda *a, **k: real(*a, **k) * jnp.nan)
    named = r"step 3: not finite: .*loss.*files of the batch: scenes/train/\d+.*checkpoint of step 2.*--config.optim.lr=0.0005"
    with pytest.raises(NonFiniteLoss, match=named):
        train(config, tmp_path)
    monkeypatch.undo()
    train(config, tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in weights(tmp_path).values())
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]


def test_a_run_that_diverged_continues_with_the_settings_its_message_names(tmp_path, capsys):
    config = tiny_config(steps=6)
    config.optim.lr, config.optim.clip_norm = 1e-3, 0.0
    train(config, tmp_path, stop_after=2)
    config.optim.lr = config.optim.weight_decay = 1e3  # steered into the wall: this too is logged
    with pytest.raises(NonFiniteLoss, match=r"step 4: not finite.*checkpoint of step 2.*the same batches.*clip_norm may"):
        train(config, tmp_path)
    config = tiny_config(steps=5)
    config.optim.exit_lr, config.optim.clip_norm, config.optim.weight_decay, config.optim.warmup_steps = 1e-4, 1.0, 0.1, 0
    capsys.readouterr()
    train(config, tmp_path)
    assert "config.optim.clip_norm from 0.0 to 1.0" in capsys.readouterr().out
    events = [line for line in lines(tmp_path) if "event" in line]
    assert [(e["step"], e["event"]) for e in events] == [(2, "config_changed")] * 2
    assert events[0]["changed"] == {"config.optim.lr": [0.001, 1e3], "config.optim.weight_decay": [0.05, 1e3]}
    assert events[1]["changed"] == {
        "config.optim.lr": [1e3, 0.001], "config.optim.exit_lr": [0.001, 0.0001], "config.optim.weight_decay": [1e3, 0.1],
        "config.optim.clip_norm": [0.0, 1.0], "config.optim.warmup_steps": [2, 0], "config.train.steps": [6, 5],
    }  # fmt: skip
    assert [line["step"] for line in lines(tmp_path) if "event" not in line] == [1, 2, 3, 4, 5]
    assert all(np.isfinite(leaf).all() for leaf in weights(tmp_path).values())
    with pytest.raises(ConfigError, match=r"config.train.steps=4, but the run in .* is at step 5"):
        train(tiny_config(steps=4), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["train"]["steps"] == 5


@pytest.mark.check
def test_training_on_a_folder_with_a_broken_picture_names_and_counts_it(tmp_path, caplog):
    root = tmp_path / "photos"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["file,caption,split"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(root / "images" / f"{i:02d}.png")
        rows += [f"{i:02d}.png,picture number {i} of many,train", f"{i:02d}.png,a noisy thing {i},train"]
    (root / "images" / "07.png").write_bytes(b"broken")
    (root / "captions.csv").write_text("\n".join(rows) + "\n")
    config = tiny_config(steps=10, checkpoint_every=10)
    config.data.source, config.data.root, config.data.calibration_size = "folder", str(root), 4
    config.data.resize, config.data.crop_scale = "crop", 0.6
    with caplog.at_level(std_logging.WARNING):
        train(config, tmp_path / "w")
    assert "07.png" in caplog.text and "1 unreadable image files" in caplog.text
    assert icar_jax.load(tmp_path / "w").encode_text(["picture"]).shape == (1, 64)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.check)])
def test_a_folder_of_broken_pictures_ends_in_a_message(workers, tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i}.jpg").write_bytes(b"broken")
    rows = [f"{i}.jpg,a caption,train" for i in range(20)]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption,split", *rows]))
    config = tiny_config()
    config.data.source, config.data.root, config.data.calibration_size = "folder", str(tmp_path), 2
    config.data.workers = workers
    with pytest.raises(UnreadableImages, match=r"Most of the files seem unreadable(.|\n)*\.jpg"):
        train(config, tmp_path / "w")


def test_a_mistake_does_not_spoil_the_workdir(tmp_path):
    config = tiny_config(steps=1)
    config.data.tokenizer = str(tmp_path / "nowhere.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        train(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()
    # A run that ended before its first checkpoint left nothing to continue: another configuration may take its place.
    (tmp_path / "w").mkdir()
    other = tiny_config(steps=2)
    other.data.vocabulary = 270
    save_config(tmp_path / "w", other)
    (tmp_path / "w" / "tokenizer.json").write_text("stale")
    train(tiny_config(steps=1), tmp_path / "w")
    assert icar_jax.load(tmp_path / "w").clip.arch.text.vocabulary > 270


def test_changed_training_images_are_noticed(tmp_path):
    train(tiny_config(), tmp_path, stop_after=2)
    (tmp_path / "data.json").write_text(json.dumps({"images": 199, "names_sha256": "0"}))
    with pytest.raises(ConfigError, match="training images changed.*199 images then, 200 now"):
        train(tiny_config(), tmp_path)


def test_a_damaged_config_is_named(tmp_path):
    train(tiny_config(), tmp_path, stop_after=2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not valid JSON .*the file is damaged"):
        train(tiny_config(), tmp_path)


@pytest.mark.check
def test_cut_captions_are_counted(tmp_path, caplog):
    config = tiny_config(steps=2)
    config.clip.context_length = 4
    with caplog.at_level(std_logging.WARNING):
        train(config, tmp_path)
    assert "16 of 16 captions (100.0%) were longer than the context of 4 tokens" in caplog.text


def test_tensorboard_events_are_written(tmp_path):
    train(tiny_config(steps=1, tensorboard=True), tmp_path)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_tensorboard_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match="needs tensorboardX: pip install"):
        train(tiny_config(tensorboard=True), tmp_path)


def test_an_unwritable_workdir_is_known_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(tiny_config(), tmp_path / "file" / "w")


def test_contrastive_loss_against_a_loop():
    rng = np.random.default_rng(0)
    image, text = (rng.standard_normal((6, 5)) for _ in range(2))
    image, text = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (image, text))
    logits = 7.0 * image @ text.T
    rows = [np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(6)]
    cols = [np.log(np.exp(logits[:, i]).sum()) - logits[i, i] for i in range(6)]
    f32 = [jnp.asarray(z, jnp.float32) for z in (image, text)]
    assert contrastive.contrastive(*f32, 7.0) == pytest.approx((np.mean(rows) + np.mean(cols)) / 2, rel=1e-5)
    assert contrastive.contrastive(*f32, 7.0, "image_to_text") == pytest.approx(np.mean(rows), rel=1e-5)


def test_exit_weights_are_normalised():
    assert contrastive.exit_weights((), (3, 6)) == {3: 0.5, 6: 0.5}
    assert contrastive.exit_weights((1.0, 3.0), (3, 6)) == {3: 0.25, 6: 0.75}


def test_complexity_losses():
    logits, target = jnp.array([[0.0], [2.0]]), jnp.array([0.5, 0.0])
    expected = np.mean([0, (1 / (1 + np.exp(-2))) ** 2])
    assert contrastive.complexity_loss(logits, target, "regression", 0.5) == pytest.approx(expected, rel=1e-5)
    logits, target = jnp.array([[0.0, 1.0], [3.0, 0.0]]), jnp.array([0.9, 0.2])
    expected = np.mean([np.log(1 + np.exp(-1)), np.log(1 + np.exp(-3))])
    assert contrastive.complexity_loss(logits, target, "classification", 0.5) == pytest.approx(expected, rel=1e-5)


def test_parameter_groups_and_decay():
    assert group("vision/exits/3/proj/kernel") == "exit"
    assert group("exit_logit_scale/3") == group("logit_scale") == "temperature"
    assert group("vision/blocks/3/attn/qkv/kernel") == group("text/embed") == "backbone"
    assert decays("vision/proj/kernel", 2) and decays("stages/0/blocks/0/conv_dw/kernel", 4)
    assert not decays("vision/pos", 2) and not decays("vision/ln_post/scale", 1) and not decays("logit_scale", 0)


def test_each_group_moves_at_its_own_rate():
    config = OptimConfig(lr=1e-3, exit_lr=1e-2, temperature_lr=1e-1, weight_decay=0, clip_norm=0, warmup_steps=0)
    params = {"logit_scale": jnp.ones(()), "vision": {"exits": {"3": {"w": jnp.ones(3)}}, "proj": {"kernel": jnp.ones(3)}}}
    optimizer = make_optimizer(config, 10)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    flat = {p: float(np.ravel(u)[0]) for p, u in pytree.flatten(updates).items()}
    assert flat == pytest.approx({"logit_scale": -0.1, "vision/exits/3/w": -0.01, "vision/proj/kernel": -0.001}, rel=1e-4)


def test_schedule_warms_up_and_ends():
    share = schedule(OptimConfig(warmup_steps=10, final_lr=0.1), 100)
    values = [float(share(s)) for s in range(100)]
    assert values[0] == pytest.approx(0.1) and values[9] == pytest.approx(1.0) and max(values) <= 1.0
    assert all(a >= b for a, b in zip(values[10:], values[11:])) and values[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.check)])
def test_the_baseline_is_the_same_step_with_no_early_exit(dtype):
    config = tiny_config(dtype=dtype)
    config.clip.exits = ()
    tokenizer = Tokenizer.train(["a red circle", "two squares"], 300)
    task = kind_of(config).task(tokenizer)
    optimizer = make_optimizer(config.optim, 4)
    mesh = make_mesh(config.mesh)
    state = init_state(task, optimizer, mesh, config)
    step = make_step(task, optimizer, mesh, config)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8),
        "tokens": tokenizer(["a red circle"] * 8, task.context_length),
    }
    state, metrics = step(state, batch, {})
    assert {k for k in metrics if k.startswith("loss")} == {"loss", "loss_3"}
    assert metrics["loss"] == pytest.approx(np.log(8), rel=0.5) and int(state["step"]) == 1
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state["params"]))

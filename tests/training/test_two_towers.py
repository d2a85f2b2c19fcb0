"""Training from two pretrained towers: trunks stay frozen, kept outputs replace images and captions, rates fall with depth."""

import dataclasses
import json
import os

import numpy as np
import pytest

from configs import lit
from icar_jax import checkpoint, pytree
from icar_jax.config import ConfigError, from_dict
from icar_jax.training import frozen_outputs
from icar_jax.training.loop import train
from icar_jax.training.optimizer import layer_share, trainable
from icar_jax.training.output_folders import make_room
from tests.support import small_towers

PLAIN = {
    "task": "clip",
    "clip": {
        "variant": "init", "head": "cls_mean", "embed_dim": 8, "projection": "linear_mlp", "projection_width": 12,
        "exits": (1, 2), "exit_sum": True, "exit_start": "random", "context_length": 10,
    },
    "data": {"source": "scenes", "scenes_size": 40, "calibration_size": 8, "scenes_pixels": 32, "threads": 1},
    "optim": {"warmup_steps": 2},
    "train": {
        "steps": 6, "batch_size": 16, "dtype": "float32", "log_every": 1, "checkpoint_every": 6,
        "freeze": ("image_trunk", "text_trunk"),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    return small_towers.write(tmp_path_factory.mktemp("towers"))


def settings(towers, **changes):
    config = json.loads(json.dumps(PLAIN)) | {}
    config["train"] |= {"init_image": str(towers[0]), "init_text": str(towers[1])}
    for part, values in changes.items():
        config[part] |= values
    return from_dict(config)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_run_from_two_towers_trains_heads_alone_and_kept_outputs_change_nothing(towers, tmp_path):
    plain = train(settings(towers), tmp_path / "plain")
    kept = {"cache_frozen": True, "cache_folder": str(tmp_path / "cache")}
    cached = train(settings(towers, train=kept), tmp_path / "cached")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "plain"), rtol=1e-5)
    ours, theirs = (pytree.flatten(checkpoint.read(folder, "clip").params) for folder in (cached, plain))
    for path, leaf in ours.items():
        np.testing.assert_allclose(leaf, theirs[path], rtol=1e-3, atol=1e-4, err_msg=path)
    tower = pytree.flatten(checkpoint.read(towers[0], "vision").params)
    same = [path for path in tower if path.startswith("vision/blocks/")]
    assert same and all(np.array_equal(tower[path], ours[path]) for path in same)
    about = checkpoint.describe(cached)
    assert about["arch"]["vision"]["head"] == "cls_mean" and about["arch"]["vision"]["exits"] == [1, 2]
    assert checkpoint.read(cached, "clip").tokenizer == small_towers.TOKENIZER.to_json()
    folders = {path.name.split("-")[0]: path for path in (tmp_path / "cache").iterdir()}
    assert folders.keys() == {"image", "text"}
    written = [(path / "rows.bin").stat().st_mtime_ns for path in folders.values()]
    train(settings(towers, train={**kept, "seed": 1}), tmp_path / "seed")  # another seed reads the same outputs
    assert [(path / "rows.bin").stat().st_mtime_ns for path in folders.values()] == written


def test_kept_outputs_of_several_blocks_change_nothing_either(towers, tmp_path):
    heads = {"head_blocks": 2, "text_head_blocks": 2, "exits": (2,), "exit_sum": False}
    plain = train(settings(towers, clip=heads), tmp_path / "plain")
    kept = {"cache_frozen": True, "cache_folder": str(tmp_path / "cache")}
    train(settings(towers, clip=heads, train=kept), tmp_path / "cached")
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "plain"), rtol=1e-5)
    about = checkpoint.describe(plain)["arch"]
    assert (about["vision"]["head_blocks"], about["text"]["head_blocks"]) == (2, 2)
    params = checkpoint.read(plain, "clip").params
    assert params["vision"]["proj"]["kernel"].shape == (2 * 2 * 24, 8)
    wrong = (
        r"vision head_blocks: 2 in the checkpoint, 1 in the run\nTo start from these weights:\n  --config.clip.head_blocks=2$"
    )
    with pytest.raises(ConfigError, match=wrong):
        other = settings(towers, clip={"head_blocks": 1, "exits": (2,), "exit_sum": False})
        other.train.init, other.train.init_image, other.train.init_text = str(plain), "", ""
        train(other, tmp_path / "other")


def test_views_of_augmented_images_are_kept_and_odd_ones_are_mirrored(towers, tmp_path):
    kept = {"cache_frozen": True, "cache_folder": str(tmp_path / "cache"), "cache_views": 2}
    train(settings(towers, train=kept, data={"flip": True}), tmp_path / "run")
    (folder,) = (tmp_path / "cache").glob("image-*")
    first = np.fromfile(folder / "first.bin", np.int64)
    assert first[:3].tolist() == [0, 2, 4] and first[-1] == 80
    rows = np.fromfile(folder / "rows.bin", np.float32).reshape(80, 3, 2, 24)
    assert np.abs(rows[0::2] - rows[1::2]).max() > 1e-3


def test_a_stopped_computation_resumes(towers, tmp_path, monkeypatch):
    monkeypatch.setattr(frozen_outputs, "_BATCH", 8)
    monkeypatch.setattr(frozen_outputs, "_SAVE_EVERY", 1)
    run = settings(towers, train={"cache_frozen": True, "cache_folder": str(tmp_path / "cache")})
    train(run, tmp_path / "whole")
    (folder,) = (tmp_path / "cache").glob("image-*")
    expected = (folder / "rows.bin").read_bytes()
    rows = 3 * 2 * 24 * 4
    (folder / "done.json").unlink()
    (folder / "rows.bin").write_bytes(expected[: 20 * rows])  # 16 rows were counted, 4 more written
    places = np.where(np.arange(40) < 16, np.arange(40), -1)
    (folder / "first.bin").write_bytes(places.tobytes())
    (folder / "progress.json").write_text(json.dumps({"done": 16, "rows": 16}))
    train(run, tmp_path / "again")
    np.testing.assert_allclose(
        np.frombuffer((folder / "rows.bin").read_bytes(), np.float32), np.frombuffer(expected, np.float32), atol=1e-5
    )
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_the_folder_of_outputs_stays_within_its_bound(towers, tmp_path):
    kept = {"cache_frozen": True, "cache_folder": str(tmp_path / "cache")}
    with pytest.raises(ConfigError, match=r"cache_gb=1e-06, but the outputs of this run need .* GB; raise it"):
        train(settings(towers, train={**kept, "cache_gb": 1e-6}), tmp_path / "small")
    train(settings(towers, train=kept), tmp_path / "first")
    before = set((tmp_path / "cache").iterdir())
    size = sum(file.stat().st_size for path in before for file in path.iterdir())
    # Room for one run: outputs of other scenes push out those before.
    train(settings(towers, train={**kept, "cache_gb": 1.2 * size / 1e9}, data={"scenes_size": 39}), tmp_path / "second")
    after = {path for path in (tmp_path / "cache").iterdir() if (path / "done.json").is_file()}
    assert len(after & before) < len(before) and len(after - before) == 2


@pytest.mark.parametrize("changes, message", [
    ({"train": {"freeze": ("text_trunk",), "cache_frozen": True, "init_text": ""}}, "names one tower of a CLIP; name"),
    ({"clip": {"variant": "vit_b32"}}, "so config.clip.variant='vit_b32' cannot; use 'init'"),
    ({"train": {"init": "somewhere"}}, "so config.train.init='somewhere' cannot; leave it empty"),
    ({"train": {"freeze": (), "cache_frozen": True}}, "config.train.freeze=\\(\\) freezes none"),
    ({"train": {"cache_frozen": True}, "data": {"flip": True}}, "cache_views=1: that number of augmented views"),
    ({"train": {"cache_frozen": True, "cache_views": 2}}, "cache_views=2: that number of augmented views"),
    ({"train": {"cache_frozen": True}, "loss": {"distill_init": 1.0}}, "distill_init"),
    ({"train": {"init_image": "/nowhere"}}, "config.train.init_image=/nowhere .* does not exist"),
], ids=range(8))  # fmt: skip
def test_settings_that_do_not_fit_are_named(towers, tmp_path, changes, message):
    base = {"loss": {}} if "loss" in changes else {}
    config = settings(towers)
    for part, values in ({**base} | changes).items():
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **values)})
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_variant_init_needs_weights():
    config = from_dict({"task": "clip", "clip": {"variant": "init"}})
    with pytest.raises(ConfigError, match="config.clip.variant='init' is the architecture of the weights"):
        train(config, "unused")


@pytest.mark.parametrize("path, frozen", [
    ("vision/patch/kernel", "image_trunk"), ("vision/blocks/2/mlp/fc1/kernel", "image_trunk"), ("vision/pos", "image_trunk"),
    ("vision/ln_post/scale", ""), ("vision/proj/kernel", ""), ("vision/exits/2/ln/bias", ""), ("logit_scale", ""),
    ("text/embed", "text_trunk"), ("text/ln_embed/scale", "text_trunk"), ("text/proj_mlp/fc1/kernel", ""),
])  # fmt: skip
def test_a_trunk_is_a_tower_without_heads(path, frozen):
    assert [name for name in ("image_trunk", "text_trunk") if not trainable(path, (name,))] == ([frozen] if frozen else [])


def test_layer_wise_decay_falls_from_the_heads_down():
    share = lambda path: layer_share(path, {"vision": 12, "text": 6}, 0.5)
    assert [share(f"vision/blocks/{i}/attn/qkv/kernel") for i in (11, 10, 0)] == [0.5, 0.25, 0.5**12]
    assert [share(path) for path in ("vision/pos", "text/embed", "text/blocks/5/mlp/fc1/bias")] == [0.5**13, 0.5**7, 0.5]
    assert [share(path) for path in ("vision/proj/kernel", "vision/exits/3/ln/scale", "logit_scale")] == [1, 1, 1]


def test_room_is_made_of_other_folders_only(tmp_path):
    for number, name in enumerate(("image-old", "image-new", "text-ours", "unrelated")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.bin").write_bytes(bytes(100))
        os.utime(tmp_path / name, (number, number))
    ours = [tmp_path / "text-ours", tmp_path / "image-ours"]
    make_room(tmp_path, ours, 100, 310e-9)
    assert {path.name for path in tmp_path.iterdir()} == {"image-new", "text-ours", "unrelated"}
    with pytest.raises(ConfigError, match=r"cache_gb=1.5e-07, but the outputs of this run need 2e-07 GB"):
        make_room(tmp_path, ours, 100, 150e-9)
    assert (tmp_path / "image-new").is_dir()


def test_batches_of_captions_leave_padding_out():
    tokens = np.array([[5, 0, 0, 0] * 5, [7, 8, 9, 0] + [0] * 16, [1] * 20, [2, 0, 3] + [0] * 17, [4] * 9 + [0] * 11], np.int32)
    found = list(frozen_outputs._by_length(tokens, 0, 2))
    assert sorted(np.concatenate([rows for rows, _ in found]).tolist()) == [0, 1, 2, 3, 4]
    assert [(rows.tolist(), some.shape[1]) for rows, some in found] == [([1, 3], 8), ([4, 0], 20), ([2], 20)]
    for rows, some in found:
        assert np.array_equal(some, tokens[rows, : some.shape[1]]) and not tokens[rows, some.shape[1] :].any()
    (everything, whole), *_ = frozen_outputs._by_length(tokens, -1, 8)
    assert everything.tolist() == [0, 1, 2, 3, 4] and whole.shape == tokens.shape


def test_the_recipe_and_its_form_with_fewer_tokens():
    locked, reduced = (lit.get_config(how) for how in ("locked", "reduced"))
    assert (reduced.clip.reduce, reduced.clip.reduce_to) == ("tome", 0.8)
    reduced.clip.reduce, reduced.clip.reduce_to = locked.clip.reduce, locked.clip.reduce_to
    assert reduced == locked and locked.clip.head_blocks <= min(locked.clip.exits)
    with pytest.raises(ConfigError, match="use configs/lit.py:locked, :reduced, :unlocked"):
        lit.get_config("frozen")

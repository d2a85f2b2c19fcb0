"""`icar join`: the towers keep their bits, the projections are new, and what cannot be joined is named."""

import dataclasses

import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint, cli, pytree
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.join import Joint, join
from icar_jax.convert.layouts.base import Options
from icar_jax.convert.layouts.open_clip_export import text_config
from icar_jax.data.images import Preprocess
from tests.support import small_towers
from tests.support.small_towers import TEXT


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folders of a vision tower and of a text tower."""
    return small_towers.write(tmp_path_factory.mktemp("towers"))


def trunk(folder, part, tower):
    flat = pytree.flatten(checkpoint.read(folder, part).params)
    heads = ("proj", "proj_mlp", "exits")
    return {path: leaf for path, leaf in flat.items() if path.startswith(tower) and path.split("/")[1] not in heads}


@pytest.mark.parametrize("joint", [
    Joint(embed_dim=8), Joint(8, "cls_mean", "linear_mlp", 20, (1, 2)), Joint(8, "mean", exits=(2,), seed=3),
], ids=str)  # fmt: skip
def test_the_towers_keep_their_bits(towers, joint, tmp_path):
    folder = join(*towers, tmp_path / "joined", joint)
    for kind, tower, source in (("vision", "vision", towers[0]), ("text", "text", towers[1])):
        ours, theirs = trunk(folder, "clip", tower), trunk(source, kind, tower)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in theirs)
    model = icar_jax.load(folder, batch_size=4)
    assert model.exits == (*joint.exits, 3) and model.embed_dim == 8
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    for exit in model.exits:
        np.testing.assert_allclose(np.linalg.norm(model.encode_image([image], exit=exit)), 1, atol=1e-5)
    assert model.encode_text(["a red ball", "dogs"]).shape == (2, 8)
    assert model.preprocess == Preprocess(32)
    flat = pytree.flatten(checkpoint.read(folder, "clip").params)
    for exit in joint.exits:
        np.testing.assert_array_equal(flat[f"vision/exits/{exit}/ln/scale"], flat["vision/ln_post/scale"])
        np.testing.assert_array_equal(flat[f"vision/exits/{exit}/proj/kernel"], flat["vision/proj/kernel"])
    again = pytree.flatten(checkpoint.read(join(*towers, tmp_path / "again", joint), "clip").params)
    assert all(np.array_equal(flat[path], again[path]) for path in flat)
    other = join(*towers, tmp_path / "other", dataclasses.replace(joint, seed=joint.seed + 1))
    assert not np.array_equal(
        pytree.flatten(checkpoint.read(other, "clip").params)["text/proj/kernel"], flat["text/proj/kernel"]
    )


def test_the_towers_of_clips_can_be_joined(towers, clip_folder, tmp_path):
    mixed = join(clip_folder, towers[1], tmp_path / "a", Joint(8, exits=(1,)))
    assert icar_jax.load(mixed).exits == (1, 3)
    assert icar_jax.load(join(towers[0], mixed, tmp_path / "b", Joint(6))).embed_dim == 6


@pytest.mark.parametrize("joint, options, message", [
    (Joint(0), {}, "--embed-dim=0"), (Joint(8, "middle"), {}, "cannot be joined so.*middle"),
    (Joint(8, exits=(3,)), {}, "exits"), (Joint(8, projection="linear_mlp"), {}, "projection_width 0"),
    (Joint(8), {"image_options": Options(image_size=64)}, "no use for --image-size"),
], ids=str)  # fmt: skip
def test_what_cannot_be_joined_is_named(towers, joint, options, message, tmp_path):
    with pytest.raises(ConvertError, match=message):
        join(*towers, tmp_path / "joined", joint, **options)
    assert not (tmp_path / "joined").exists()


def test_towers_of_the_wrong_kind(towers, complexity_folder, tmp_path):
    image, text = towers
    for a, b, message in (
        (text, text, "kind"), (image, image, "kind"), (complexity_folder, text, "kind"),
        (tmp_path / "no", text, "does not exist"),
    ):  # fmt: skip
        with pytest.raises((ConvertError, checkpoint.CheckpointError), match=message):
            join(a, b, tmp_path / "joined")
    bare = checkpoint.write(tmp_path / "bare", "text", {"arch": dataclasses.asdict(TEXT)}, checkpoint.read(text, "text").params)
    with pytest.raises(ConvertError, match="has no tokenizer"):
        join(image, bare, tmp_path / "joined")
    for tower, encode in zip(towers, ("encode_text", "encode_image"), strict=True):
        with pytest.raises(checkpoint.CheckpointError, match="tower alone; `icar join` makes a CLIP of two towers"):
            getattr(icar_jax.load(tower), encode)([])


def test_the_command(towers, tmp_path, capsys):
    words = ["--embed-dim", "8", "--head", "cls_mean", "--projection-width", "20", "--exits", "2"]
    cli.main(["join", "--image", str(towers[0]), "--text", str(towers[1]), str(tmp_path / "joined"), *words])
    assert "Checkpoint: " in capsys.readouterr().out
    assert icar_jax.load(tmp_path / "joined").exits == (2, 3)
    more = ["--head-blocks", "2", "--text-head-blocks", "2"]
    cli.main(["join", "--image", str(towers[0]), "--text", str(towers[1]), str(tmp_path / "several"), *words, *more])
    arch = checkpoint.describe(tmp_path / "several")["arch"]
    assert (arch["vision"]["head_blocks"], arch["text"]["head_blocks"]) == (2, 2)
    assert icar_jax.load(tmp_path / "several").encode_text(["a red ball"]).shape == (1, 8)
    with pytest.raises(SystemExit):
        cli.main(["export", str(tmp_path / "several"), str(tmp_path / "out"), "--to", "hf"])
    assert "its text head reads the last 2 blocks (head_blocks)" in capsys.readouterr().err
    plain = dataclasses.replace(TEXT, post_norm=False, projection="linear", embed_dim=8, head_blocks=2, pool="end", pad_id=-1)
    with pytest.raises(ConvertError, match=r"the open_clip layout .*its text head reads the last 2 blocks"):
        text_config(plain)
    cli.main(["describe", str(towers[1])])
    assert '"kind": "text"' in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["join", "--image", str(towers[0]), "--text", str(towers[1]), str(tmp_path / "j"), "--embed-dim", "0"])
    assert "error: --embed-dim=0" in capsys.readouterr().err

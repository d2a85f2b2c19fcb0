"""A vision tower alone embeds, indexes and searches by image; a text tower alone embeds text; the rest ends in one sentence."""

import pickle

import jax
import numpy as np
import pytest
from PIL import Image

import icar_jax
from icar_jax import checkpoint
from icar_jax.checkpoint import CheckpointError
from icar_jax.cli import main
from icar_jax.convert.convert import convert
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.encoders import LoneArch, TextModel, VisionModel
from icar_jax.models.vision import VisionTower
from tests.support import parity_cases


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A converted DINOv2 with registers."""
    folder = tmp_path_factory.mktemp("vision")
    convert(parity_cases.write_source(parity_cases.load("hf_dinov2_registers"), folder / "source"), folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A converted sentence encoder with a WordPiece vocabulary."""
    folder = tmp_path_factory.mktemp("text")
    source = parity_cases.write_source(parity_cases.load("bert"), folder / "source")
    words = ["[PAD]", *(f"[unused{i}]" for i in range(60)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", ",", "red"]
    (source / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    convert(source, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for name in "abcde":
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{name}.png")
    return folder


def test_a_vision_tower_embeds_images(vision, photos):
    model = icar_jax.load(vision)
    assert isinstance(model.clip, VisionModel) and model.arch == LoneArch(vision=model.clip.vision.arch)
    assert model.exits == (model.arch.vision.depth,) and not model.encodes_text and model.tokenizer is None
    files = sorted(photos.iterdir())
    found = model.encode_image(files)
    pixels = np.stack([model.preprocess.resize(Image.open(file)) for file in files]).astype(np.float32) / 255
    pixels = (pixels - np.asarray(model.preprocess.mean, np.float32)) / np.asarray(model.preprocess.std, np.float32)
    params = checkpoint.read(vision, "vision").params["vision"]
    depth = model.arch.vision.depth
    expected = np.asarray(jax.jit(VisionTower.graph(model.arch.vision))(params, pixels)[depth])
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_allclose(again.encode_image(files[:2]), found[:2], atol=1e-6)
    assert again.identity == model.identity and list(model.identity) == ["clip"]


def test_a_text_tower_embeds_text(text):
    model = icar_jax.load(text)
    assert isinstance(model.clip, TextModel) and model.exits == () and isinstance(model.tokenizer, Tokenizer)
    found = model.encode_text(["a dog", "a red cat, a dog"])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    tokens = model.tokenizer(["a dog", "a red cat, a dog"], model.arch.text.context_length)
    np.testing.assert_allclose(found, model.clip.encode_text(tokens), atol=1e-6)
    np.testing.assert_allclose(pickle.loads(pickle.dumps(model)).encode_text(["a dog"]), found[:1], atol=1e-6)


def test_what_a_tower_cannot_do_is_said(vision, text, photos):
    with pytest.raises(CheckpointError, match=r"encode_text needs a text tower, and .* is an image tower alone; `icar join`"):
        icar_jax.load(vision).encode_text(["a dog"])
    with pytest.raises(CheckpointError, match="encode_image needs an image tower, and .* is a text tower alone"):
        icar_jax.load(text).encode_image([np.zeros((9, 9, 3), np.uint8)])
    with pytest.raises(CheckpointError, match="is a vision model|no checkpoint of kind clip"):
        icar_jax.Clip.from_pretrained(vision)


def test_changes_to_a_tower_apply(vision):
    model = icar_jax.load(vision)
    pixels = [np.full((9, 9, 3), 90, np.uint8)]
    before = model.encode_image(pixels)
    model.clip.vision.ln_post.scale[...] = -model.clip.vision.ln_post.scale[...]
    assert np.abs(model.encode_image(pixels) - before).max() > 0.01
    assert "changed" in model.identity["clip"]


def test_a_vision_tower_indexes_and_searches_by_image(vision, photos, tmp_path, capsys):
    pytest.importorskip("lancedb")
    store = tmp_path / "store"
    main(["index", str(photos), "--checkpoint", str(vision), "--store", str(store)])
    capsys.readouterr()
    main(["search", "--image", str(photos / "c.png"), "--store", str(store), "-k", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].endswith("c.png") and float(lines[1].split()[1]) > 0.999
    with pytest.raises(SystemExit) as stopped:
        main(["search", "a dog", "--store", str(store)])
    said = capsys.readouterr().err + str(stopped.value)
    assert "needs a text tower" in said and "Traceback" not in said


def test_a_text_tower_indexes_nothing(text, photos, tmp_path, capsys):
    pytest.importorskip("lancedb")
    with pytest.raises(SystemExit) as stopped:
        main(["index", str(photos), "--checkpoint", str(text), "--store", str(tmp_path / "store")])
    assert "needs an image tower" in capsys.readouterr().err + str(stopped.value)
    assert not (tmp_path / "store" / "meta.lance").exists()


def test_a_vision_tower_writes_a_corpus(vision, photos, tmp_path):
    main(["embed", str(photos), "--checkpoint", str(vision), "--out", str(tmp_path / "corpus")])
    assert (tmp_path / "corpus").is_dir()

"""Tokenizers of converted models, and weights going back out in every layout."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import CheckpointError
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.source import open_source
from icar_jax.data.tokenizer import Tokenizer
from tests.support import parity_cases


def source_of(name, folder):
    case = parity_cases.load(name)
    return case, parity_cases.write_source(case, folder / "source")


# --- tokenizers -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captions_tokenizer():
    return Tokenizer.train(["a dog on a beach", "two dogs running", "a beach"] * 3, 300)


def hf_with_tokenizer(tmp_path, tokenizer):
    """hf_quick_gelu with the vocabulary of `tokenizer`."""
    case, source = source_of("hf_quick_gelu", tmp_path)
    weights = load_file(source / "model.safetensors")
    key = "text_model.embeddings.token_embedding.weight"
    weights[key] = np.random.default_rng(0).standard_normal((tokenizer.vocab_size, weights[key].shape[1])).astype(np.float32)
    save_file(weights, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["vocab_size"] = tokenizer.vocab_size
    (source / "config.json").write_text(json.dumps(config))
    return source


def test_without_a_tokenizer_images_encode_and_texts_say_how_to_add_one(tmp_path, captions_tokenizer):
    source = hf_with_tokenizer(tmp_path, captions_tokenizer)
    report = convert(source, tmp_path / "out")
    assert "no tokenizer was found" in report.notes[0]
    model = icar_jax.load(tmp_path / "out")
    assert model.encode_image([np.zeros((9, 9, 3), np.uint8)]).shape == (1, model.embed_dim)
    with pytest.raises(CheckpointError, match=r"icar convert .*out .*out --tokenizer FILE"):
        model.encode_text(["a dog"])
    captions_tokenizer.save(tmp_path / "tok.json")
    before = checkpoint.read(tmp_path / "out", "clip")
    convert(tmp_path / "out", tmp_path / "out", Options(tokenizer=str(tmp_path / "tok.json")))
    after = checkpoint.read(tmp_path / "out", "clip")
    assert not pytree.differences(before.params, after.params) and after.tokenizer == captions_tokenizer.to_json()
    assert icar_jax.load(tmp_path / "out").encode_text(["a dog"]).shape == (1, model.embed_dim)
    with pytest.raises(ConvertError, match="only --tokenizer can be given"):
        convert(tmp_path / "out", tmp_path / "out", Options(exits=(1,)))


def test_a_tokenizer_beside_the_weights_is_taken_and_one_that_does_not_fit_is_refused(tmp_path, captions_tokenizer):
    source = hf_with_tokenizer(tmp_path, captions_tokenizer)
    captions_tokenizer.save(source / "tokenizer.json")
    report = convert(source, tmp_path / "out")
    assert report.description["tokenizer"] == "tokenizer.json" and not report.notes
    Tokenizer.train(["other words entirely"] * 3, 270).save(tmp_path / "other.json")
    with pytest.raises(ConvertError, match="not this model's tokenizer"):
        convert(source, tmp_path / "out2", Options(tokenizer=str(tmp_path / "other.json")))
    with pytest.raises(ConvertError, match="not found"):
        convert(source, tmp_path / "out2", Options(tokenizer=str(tmp_path / "none.json")))


# --- back out ---------------------------------------------------------------------------------------------------------------

BACK = {
    "hf_quick_gelu": "hf", "hf_gelu": "hf", "siglip": "hf", "open_clip_gelu": "open_clip", "open_clip_custom_text": "open_clip",
    "hf_vision_clip": "hf", "hf_text_clip": "hf", "icar": "icar", "icc": "icar", "ic9600": "icar",
    "convnext_v1_linear": "timm", "convnext_v2_conv_mlp": "timm",
}  # fmt: skip


@pytest.mark.parametrize("name", list(BACK))
def test_there_and_back_is_bit_exact(name, tmp_path):
    case, source = source_of(name, tmp_path)
    options = Options(**{k: v for k, v in case.options.items() if k != "exits" or name == "icar"})
    convert(source, tmp_path / "there", options)
    written = export(tmp_path / "there", tmp_path / "back", BACK[name])
    original, back = open_source(source), open_source(written.path)
    assert back.layout == original.layout
    dropped_keys = ("position_ids", "attn_mask")
    names = {n: n.replace("text.", "", 1) if name == "open_clip_custom_text" else n for n in original.tensors}
    assert {names[n] for n in names if not n.endswith(dropped_keys)} == set(back.tensors)
    for key, tensor in original.tensors.items():
        if not key.endswith(dropped_keys):
            np.testing.assert_array_equal(back.tensors[names[key]].load(), tensor.load().astype(back.tensors[names[key]].dtype))
            assert back.tensors[names[key]].shape == tensor.shape
    # and in again: the same checkpoint, from the files of the export alone (heads cannot be seen in toy shapes)
    kept = Options(heads=options.heads, exits=options.exits) if name == "icar" else Options()
    convert(written.path, tmp_path / "again", kept)
    first, second = (checkpoint.read(tmp_path / f, checkpoint.describe(tmp_path / f)["kind"]) for f in ("there", "again"))
    assert first.description["arch"] == second.description["arch"]
    assert first.description.get("preprocess") == second.description.get("preprocess")
    assert first.description.get("threshold") == second.description.get("threshold")
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_openai_there_and_back_is_bit_exact(tmp_path):
    source, params = parity_cases.openai_source(tmp_path)
    convert(source, tmp_path / "there")
    written = export(tmp_path / "there", tmp_path / "back", "openai")
    convert(written.path / "model.pt", tmp_path / "again")
    first, second = (checkpoint.read(tmp_path / folder, "clip") for folder in ("there", "again"))
    assert all(first.description[part] == second.description[part] for part in ("arch", "preprocess"))
    for loaded in (first, second):
        jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_exits_that_a_layout_cannot_hold_are_named(tmp_path):
    _, source = source_of("hf_gelu", tmp_path)
    convert(source, tmp_path / "out", Options(exits=(1,)))
    assert "those after 1 blocks were left out" in export(tmp_path / "out", tmp_path / "back", "hf").notes[0]
    with pytest.raises(ConvertError, match="exits pool 'cls', the layout's read the first patch"):
        export(tmp_path / "out", tmp_path / "b2", "icar")
    with pytest.raises(ConvertError, match="activations are gelu and gelu, the layout means quick_gelu"):
        export(tmp_path / "out", tmp_path / "b2", "openai")
    with pytest.raises(ConvertError, match="exists already"):
        export(tmp_path / "out", tmp_path / "back", "hf")
    with pytest.raises(ConvertError, match="--to=tf must be one of"):
        export(tmp_path / "out", tmp_path / "b2", "tf")
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "back"}


def test_a_siglip_cannot_leave_in_a_layout_without_its_head(tmp_path):
    case, source = source_of("siglip", tmp_path)
    convert(source, tmp_path / "out", Options(**case.options))
    for layout in ("openai", "open_clip", "icar"):
        with pytest.raises(ConvertError, match="attention-pool head"):
            export(tmp_path / "out", tmp_path / "back", layout)


def test_sharded_folders(tmp_path):
    case, source = source_of("hf_gelu", tmp_path)
    whole = convert(source, tmp_path / "whole").description["hashes"]
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[::2]), dict(list(weights.items())[1::2])]
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for half, file in zip(halves, files):
        save_file(half, source / file)
    index = {"weight_map": {key: file for half, file in zip(halves, files) for key in half}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert convert(source, tmp_path / "sharded").description["hashes"] == whole
    (source / files[1]).unlink()
    with pytest.raises(ConvertError, match=files[1]):
        convert(source, tmp_path / "out")


def test_the_icc_threshold_routes_a_converted_icar(tmp_path):
    """Converted CLIP and classifier become a bundle with the threshold the classifier brought, and that routes."""
    from icar_jax.evaluation.routing.calibration import make_bundle

    for name in ("icar", "icc"):
        case = parity_cases.load(name)
        folder = tmp_path / name
        folder.mkdir()
        convert(parity_cases.write_source(case, folder / "s"), folder / "model", Options(**case.options))
    out = make_bundle(tmp_path / "icar/model", tmp_path / "icc/model", tmp_path / "bundle")
    routing = checkpoint.describe(out)["routing"]
    assert routing["thresholds"] == [0.43] and routing["found"]["method"] == "stored with the complexity model"
    model = icar_jax.load(out)
    pictures = list(np.random.default_rng(0).integers(0, 255, (5, 24, 24, 3), np.uint8))
    routed = model.route(pictures)
    assert set(routed.exits) <= {13, 14} and routed.embeddings.shape == (5, model.embed_dim)
    shutil.rmtree(tmp_path / "bundle")
    with pytest.raises(ValueError, match="--thresholds"):
        make_bundle(tmp_path / "icar/model", tmp_path / "icc/model", tmp_path / "bundle", shares=(0.5,))


@pytest.mark.parametrize("name, kind", [("convnext_v2_linear", "convnext"), ("timm_vit", "vision")])
def test_the_tag_of_timm_survives(name, kind, tmp_path):
    _, source = source_of(name, tmp_path)
    config = json.loads((source / "config.json").read_text())
    config.setdefault("pretrained_cfg", {})["tag"] = "augreg_in21k"
    (source / "config.json").write_text(json.dumps(config))
    report = convert(source, tmp_path / "model")
    assert report.description["source"]["tag"] == "augreg_in21k" and report.description["source"]["architecture"]
    made = export(tmp_path / "model", tmp_path / "out", "timm").path
    assert json.loads((made / "config.json").read_text())["pretrained_cfg"]["tag"] == "augreg_in21k"

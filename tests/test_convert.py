"""From the command line: what a user types, what appears, what is refused, and that nothing else is touched."""

import json
import shutil

import jax
import numpy as np
import parity_cases
import pytest
from safetensors.numpy import load_file, save_file

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import from_dict
from icar_jax.convert import engine
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.engine import dropped, import_weights, rule
from icar_jax.convert.errors import ConvertError
from icar_jax.convert.export import export
from icar_jax.convert.positions import resize_positions
from icar_jax.convert.settings import PRESETS, choose_heads, hf_preprocess
from icar_jax.convert.source import open_source
from icar_jax.convert.tensors import Tensor
from icar_jax.data.images import Preprocess
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import ClipArch


def source_of(name, folder):
    case = parity_cases.load(name)
    return case, parity_cases.write_source(case, folder / "source")


def arrays(**shapes):
    return {
        name.replace("__", "."): Tensor(name.replace("__", "."), shape, "float32", lambda s=shape: np.ones(s, np.float32))
        for name, shape in shapes.items()
    }


# --- the engine ------------------------------------------------------------------------------------------------------------

RULES = [
    rule("block.{}.weight", "blocks/{}/kernel", engine.TRANSPOSE),
    rule([f"{p}.bias" for p in "qkv"], "bias", engine.QKV_BIAS),
    dropped("ids", "not a weight"),
]
SHAPES = pytree.unflatten(
    {"blocks/0/kernel": np.zeros((2, 3)), "blocks/1/kernel": np.zeros((2, 3)), "bias": np.zeros(6)}
)
GOOD = {"block__0__weight": (3, 2), "block__1__weight": (3, 2), "q__bias": (2,), "k__bias": (2,), "v__bias": (2,), "ids": (9,)}


def test_every_source_key_and_every_target_once():
    leaves = import_weights(arrays(**GOOD), RULES, SHAPES, "here")
    assert {name: leaf.shape for name, leaf in leaves.items()} == {"blocks/0/kernel": (2, 3), "blocks/1/kernel": (2, 3), "bias": (6,)}
    assert leaves["bias"].sources == ("q.bias", "k.bias", "v.bias")


@pytest.mark.parametrize("removed", range(2))
def test_deleting_a_row_of_the_table_names_the_orphan_and_the_unfilled_target(removed):
    rules = [r for i, r in enumerate(RULES) if i != removed]
    with pytest.raises(ConvertError) as error:
        import_weights(arrays(**GOOD), rules, SHAPES, "here")
    text = str(error.value)
    orphan, target = [("unknown in the source: block.0.weight", "blocks/0/kernel"), ("unknown in the source: q.bias", "bias")][removed]
    assert orphan in text and f"for {target} " in text


def test_all_faults_are_reported_together():
    tensors = arrays(**{**GOOD, "block__1__weight": (5, 2), "stray": (1,)})
    del tensors["v.bias"]
    tensors["block.0.weight"] = Tensor("block.0.weight", (3, 2), "int64", lambda: np.zeros((3, 2), np.int64))
    with pytest.raises(ConvertError) as error:
        import_weights(tensors, RULES, SHAPES, "here")
    for part in (
        "here: 4 tensors do not fit",
        "unknown in the source: stray (1,)",
        "missing in the source: v.bias (for bias)",
        "shape: expected (3, 2), found block.1.weight (5, 2) (for blocks/1/kernel)",
        "dtype of block.0.weight: expected one of float16, bfloat16, float32, float64, found int64",
    ):
        assert part in str(error.value)


def test_a_key_that_two_rules_claim_is_a_fault_of_the_table():
    with pytest.raises(ConvertError, match=r"claimed by 2 rules: block\.0\.weight"):
        import_weights(arrays(**GOOD), [*RULES, rule("block.0.weight", "other")], SHAPES, "here")


@pytest.mark.parametrize("name", [n for n in dir(engine) if isinstance(getattr(engine, n), engine.Transform)])
def test_transforms_go_there_and_back(name):
    transform = getattr(engine, name)
    target = {"CONV": (2, 2, 3, 4), "SAME": (4, 6), "SCALAR": (), "VECTOR": (), "ROW": (6,), "QKV_BIAS": (6,)}.get(name, (4, 6))
    array = np.random.default_rng(0).standard_normal(target)
    np.testing.assert_array_equal(transform.forward(transform.backward(array)), array)


# --- detection and what the source leaves open ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", parity_cases.names())
def test_layouts_are_detected_by_content(name, tmp_path):
    case, source = source_of(name, tmp_path)
    assert open_source(source).layout == case.layout.replace("open_clip_custom", "open_clip")


def bare_open_clip(tmp_path):
    """An OpenCLIP state dict without the config beside it."""
    case, source = source_of("open_clip_gelu", tmp_path)
    for file in source.parent.glob("*.json") if source.is_file() else source.glob("*.json"):
        file.unlink()
    return case, source


def test_a_bare_state_dict_needs_activation_heads_and_preprocessing(tmp_path):
    case, source = bare_open_clip(tmp_path)
    with pytest.raises(ConvertError, match="--activation=quick_gelu: OpenAI") as error:
        convert(source, tmp_path / "out")
    assert "--activation=gelu: most other" in str(error.value)
    with pytest.raises(ConvertError, match="pass --heads VISION TEXT"):
        convert(source, tmp_path / "out", Options(activation="gelu"))
    heads = (2, case.files["open_clip_config.json"]["model_cfg"]["text_cfg"]["heads"])
    with pytest.raises(ConvertError, match="--preprocess=half: crop, bicubic; laion2b_s32b_b82k") as error:
        convert(source, tmp_path / "out", Options(activation="gelu", heads=heads))
    assert all(preset in str(error.value) for preset in PRESETS)
    assert not (tmp_path / "out").exists()
    report = convert(source, tmp_path / "out", Options(activation="gelu", heads=heads, preprocess="half"))
    assert report.description["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    assert report.description["arch"]["vision"]["activation"] == "gelu"


def test_flags_that_contradict_the_source_are_refused(tmp_path):
    _, source = source_of("hf_gelu", tmp_path)
    with pytest.raises(ConvertError, match="--activation=quick_gelu, but config.json says gelu"):
        convert(source, tmp_path / "out", Options(activation="quick_gelu"))
    with pytest.raises(ConvertError, match="--activation=relu must be one of"):
        convert(source, tmp_path / "out", Options(activation="relu"))
    with pytest.raises(ConvertError, match="--preprocess=foo is neither a file nor one of"):
        convert(source, tmp_path / "out", Options(preprocess="foo"))


def test_a_config_of_another_model_is_refused(tmp_path):
    _, source = source_of("hf_gelu", tmp_path)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 512
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match=r"vision_config.hidden_size: config.json says 512, the weights say 160"):
        convert(source, tmp_path / "out")
    config["vision_config"].update(hidden_size=160, hidden_act="relu")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConvertError, match="hidden_act 'relu' is not supported"):
        convert(source, tmp_path / "out")


def test_head_widths_of_the_published_towers():
    for width, depth, heads in ((768, 12, 12), (1024, 24, 16), (1280, 32, 16), (1408, 40, 16), (1664, 48, 16)):
        assert choose_heads(0, None, width, depth, "vision", "here") == heads
    assert choose_heads(0, None, 1280, 32, "text", "here") == 20


def test_hugging_face_preprocessors():
    crop = {"do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True,
            "crop_size": {"height": 224, "width": 224}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}  # fmt: skip
    assert hf_preprocess(crop, "x") == Preprocess(224, "crop", "bicubic", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert hf_preprocess({**crop, "size": 224, "crop_size": 224}, "x").resize_mode == "crop"
    squash = {**crop, "size": {"height": 384, "width": 384}, "resample": 2, "do_center_crop": False}
    assert hf_preprocess({"image_processor": squash}, "x") == Preprocess(384, "squash", "bilinear", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    for change in ({"resample": 1}, {"do_normalize": False}, {"crop_size": {"height": 200, "width": 200}}, {"rescale_factor": 1.0}):
        with pytest.raises(ConvertError, match=next(iter(change))):
            hf_preprocess({**crop, **change}, "x")


def test_unknown_layouts_and_places_are_explained(tmp_path):
    with pytest.raises(ConvertError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match="holds no weights; expected model.safetensors"):
        convert(tmp_path / "empty", tmp_path / "out")
    for names, message in (
        (["resnet.conv1.weight"], "unknown layout; expected the names of one of openai, open_clip, hf_clip"),
        (["visual.trunk.blocks.0.weight"], "timm model"),
        (["downsample_layers.0.0.weight"], "original ConvNeXt layout"),
    ):
        save_file({n: np.zeros(2, np.float32) for n in names}, tmp_path / "w.safetensors")
        with pytest.raises(ConvertError, match=message):
            convert(tmp_path / "w.safetensors", tmp_path / "out")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "v.safetensors")
    with pytest.raises(ConvertError, match="several files of weights, name one of them: v.safetensors, w.safetensors"):
        convert(tmp_path, tmp_path / "out")


# --- what comes out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, exits, pool", [("hf_quick_gelu", (1,), "cls"), ("open_clip_gelu", (1,), "mean"), ("siglip", (1,), "")])
def test_added_exits_start_from_the_final_head(name, exits, pool, tmp_path):
    case, source = source_of(name, tmp_path)
    depth = convert(source, tmp_path / "plain", Options(**case.options)).description["arch"]["vision"]["depth"]
    convert(source, tmp_path / "out", Options(**{**case.options, "exits": exits, "pool": pool}))
    plain, loaded = checkpoint.read(tmp_path / "plain", "clip"), checkpoint.read(tmp_path / "out", "clip")
    arch = from_dict(loaded.description["arch"], ClipArch, "arch")
    assert arch.vision.exits == exits and depth == arch.vision.depth
    head, final = loaded.params["vision"]["exits"]["1"], plain.params["vision"]
    for mine, theirs in (("ln", "ln_post"), ("map" if name == "siglip" else "proj",) * 2):
        jax.tree.map(np.testing.assert_array_equal, head[mine], final[theirs])
    assert loaded.params["exit_logit_scale"]["1"] == plain.params["logit_scale"]
    model = icar_jax.load(tmp_path / "out")
    picture = np.zeros((20, 30, 3), np.uint8)
    assert model.encode_image([picture], exit=1).shape == (1, arch.vision.embed_dim)


def test_exits_beyond_the_tower_and_unknown_pools_are_refused(tmp_path):
    _, source = source_of("hf_gelu", tmp_path)
    with pytest.raises(ConvertError, match="--exits 99: exits"):
        convert(source, tmp_path / "out", Options(exits=(99,)))
    with pytest.raises(ConvertError, match="--pool=max must be one of"):
        convert(source, tmp_path / "out", Options(exits=(1,), pool="max"))
    with pytest.raises(ConvertError, match="not a multiple of the patch size"):
        convert(source, tmp_path / "out", Options(image_size=17))


def test_a_bare_icar_state_dict_needs_its_exit(tmp_path):
    case, source = source_of("icar", tmp_path)
    save_file({key: np.asarray(value) for key, value in case.weights.items()}, tmp_path / "bare.safetensors")
    with pytest.raises(ConvertError, match=r"pass --exits BLOCKS.*13 for early_exit_layer 12"):
        convert(tmp_path / "bare.safetensors", tmp_path / "out", Options(**case.options))
    with pytest.raises(ConvertError, match="one trained exit, after 13 blocks"):
        convert(source, tmp_path / "out", Options(**{**case.options, "exits": (5,)}))


def test_positions_keep_the_class_token_and_a_constant_stays_constant():
    pos = np.concatenate([np.full((1, 3), 7.0), np.full((16, 3), 2.0)]).astype(np.float32)
    resized = resize_positions(pos, 7, True)
    assert resized.shape == (50, 3) and resized.dtype == np.float32
    np.testing.assert_allclose(resized[0], 7)
    np.testing.assert_allclose(resized[1:], 2, rtol=1e-6)
    np.testing.assert_allclose(resize_positions(pos, 4, True), pos, rtol=1e-6)
    with pytest.raises(ValueError, match="no square grid"):
        resize_positions(pos, 7, False)


def test_an_existing_destination_is_kept_when_the_source_is_broken(tmp_path):
    case, source = source_of("convnext_v2_linear", tmp_path)
    convert(source, tmp_path / "out", Options(**case.options))
    before = checkpoint.describe(tmp_path / "out")
    key = "stages.1.blocks.0.mlp.grn.weight"
    weights = {**case.weights, key: np.full_like(case.weights[key], np.nan)}
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(ConvertError, match=rf"NaN or infinity, nothing was written: {key} \(1 tensors\)"):
        convert(tmp_path / "nan.safetensors", tmp_path / "out", Options(preprocess="imagenet"))
    assert checkpoint.describe(tmp_path / "out") == before
    assert checkpoint.read(tmp_path / "out", "convnext")
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        convert(source, tmp_path / "photos", Options(**case.options))
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "photos", "nan.safetensors"}


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
    "icar": "icar", "icc": "icar", "convnext_v1_linear": "timm", "convnext_v2_conv_mlp": "timm",
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
    assert first.description["preprocess"] == second.description["preprocess"]
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
    from icar_jax.evaluation.calibration import make_bundle

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



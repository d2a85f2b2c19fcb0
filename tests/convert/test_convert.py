"""The rule engine, detection, what is refused, what comes out, and that nothing else is touched."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import from_dict
from icar_jax.convert import rules as engine
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError, Fields
from icar_jax.convert.files.tensors import Tensor
from icar_jax.convert.positions import resize_positions
from icar_jax.convert.rules import dropped, import_weights, rule
from icar_jax.convert.settings import PRESETS, choose_heads, hf_preprocess, resized
from icar_jax.convert.source import open_source
from icar_jax.data.images import Preprocess
from icar_jax.models.clip import ClipArch
from tests.support import parity_cases


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
SHAPES = pytree.unflatten({"blocks/0/kernel": np.zeros((2, 3)), "blocks/1/kernel": np.zeros((2, 3)), "bias": np.zeros(6)})
GOOD = {"block__0__weight": (3, 2), "block__1__weight": (3, 2), "q__bias": (2,), "k__bias": (2,), "v__bias": (2,), "ids": (9,)}


def test_every_source_key_and_every_target_once():
    leaves = import_weights(arrays(**GOOD), RULES, SHAPES, "here")
    assert {name: leaf.shape for name, leaf in leaves.items()} == {
        "blocks/0/kernel": (2, 3),
        "blocks/1/kernel": (2, 3),
        "bias": (6,),
    }
    assert leaves["bias"].sources == ("q.bias", "k.bias", "v.bias")


@pytest.mark.parametrize("removed", range(2))
def test_deleting_a_row_of_the_table_names_the_orphan_and_the_unfilled_target(removed):
    rules = [r for i, r in enumerate(RULES) if i != removed]
    with pytest.raises(ConvertError) as error:
        import_weights(arrays(**GOOD), rules, SHAPES, "here")
    text = str(error.value)
    orphan, target = [("unknown in the source: block.0.weight", "blocks/0/kernel"), ("unknown in the source: q.bias", "bias")][
        removed
    ]
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
    target = {
        "CONV": (2, 2, 3, 4),
        "SAME": (4, 6),
        "SCALAR": (),
        "VECTOR": (),
        "ROW": (6,),
        "QKV_BIAS": (6,),
        "SCALED_BIAS": (6,),
    }.get(name, (4, 6))
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
    with pytest.raises(ConvertError, match="--activation=quick_gelu, but config.json: vision_config says gelu"):
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
    box = {"height": 224, "width": 224}
    crop = {"do_resize": True, "size": {"shortest_edge": 224}, "resample": 3, "do_center_crop": True, "crop_size": box}
    crop |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}
    assert hf_preprocess(Fields("x", crop)) == Preprocess(224, "crop", "bicubic", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert hf_preprocess(Fields("x", {**crop, "size": 224, "crop_size": 224})).resize_mode == "crop"
    squash = {**crop, "size": {"height": 384, "width": 384}, "resample": 2, "do_center_crop": False}
    assert hf_preprocess(Fields("x", {"image_processor": squash})) == Preprocess(
        384, "squash", "bilinear", (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    )
    smaller = hf_preprocess(Fields("x", {**crop, "crop_size": {"height": 200, "width": 200}}))
    assert (smaller.image_size, smaller.resize_to) == (200, 224)
    assert [resized(smaller, side).resize_to for side in (100, 150, 168)] == [112, 168, 188]
    for change in (
        {"resample": 1},
        {"do_normalize": False},
        {"crop_size": {"height": 240, "width": 240}},
        {"rescale_factor": 1.0},
    ):
        with pytest.raises(ConvertError, match=next(iter(change))):
            hf_preprocess(Fields("x", {**crop, **change}))


def test_unknown_layouts_and_places_are_explained(tmp_path):
    with pytest.raises(ConvertError, match="does not exist"):
        convert(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvertError, match="holds no weights; expected model.safetensors"):
        convert(tmp_path / "empty", tmp_path / "out")
    for names, message in (
        (["resnet.conv1.weight"], "unknown layout; expected the names of one of openai, crossget, open_clip"),
        (["visual.trunk.blocks.0.weight"], "timm model"),
        (["downsample_layers.0.0.weight"], "original ConvNeXt layout"),
        (["downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"], "original ConvNeXt layout"),
    ):
        save_file({n: np.zeros(2, np.float32) for n in names}, tmp_path / "w.safetensors")
        with pytest.raises(ConvertError, match=message):
            convert(tmp_path / "w.safetensors", tmp_path / "out")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "v.safetensors")
    with pytest.raises(ConvertError, match="several files of weights, name one of them: v.safetensors, w.safetensors"):
        convert(tmp_path, tmp_path / "out")


# --- what comes out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, exits, pool", [("hf_quick_gelu", (1,), "cls"), ("open_clip_gelu", (1,), "mean"), ("siglip", (1,), "")]
)
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
    with pytest.raises(ValueError, match="not a square grid"):
        resize_positions(pos, 7, False)


def test_an_existing_destination_is_kept_when_the_source_is_broken(tmp_path):
    case, source = source_of("convnext_v2_linear", tmp_path)
    convert(source, tmp_path / "out", Options(**case.options))
    before = checkpoint.describe(tmp_path / "out")
    key = "stages.1.blocks.0.mlp.grn.weight"
    weights = {**case.weights, key: np.full_like(case.weights[key], np.nan)}
    save_file(weights, tmp_path / "nan.safetensors")
    with pytest.raises(ConvertError, match=rf"holds NaN.*nothing was written: {key} \(1 tensors\)"):
        convert(tmp_path / "nan.safetensors", tmp_path / "out", Options(preprocess="imagenet"))
    assert checkpoint.describe(tmp_path / "out") == before
    assert checkpoint.read(tmp_path / "out", "convnext")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        convert(source, tmp_path / "photos", Options(**case.options))
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "photos", "nan.safetensors"}


# --- the destination ---------------------------------------------------------------------------------------------------------


def test_strangers_in_an_old_checkpoint_survive_its_replacement(tmp_path):
    """Somebody's weights, figures of an evaluation, a bundle: what is not the checkpoint's own moves over to the new one."""
    case, source = source_of("hf_gelu", tmp_path)
    convert(source, tmp_path / "out")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        (tmp_path / "out" / name).write_bytes((source / name).read_bytes())
    (tmp_path / "out" / "metrics.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    convert(source, tmp_path / "link", Options(exits=(1,)))
    assert (tmp_path / "out" / "metrics.json").read_text() == "{}" and (tmp_path / "link").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert checkpoint.read(tmp_path / "out", "clip").description["arch"]["vision"]["exits"] == [1]
    assert {p.name for p in tmp_path.iterdir()} == {"source", "out", "link"}


def test_an_empty_folder_may_be_filled_and_a_file_is_no_parent(tmp_path):
    _, source = source_of("hf_gelu", tmp_path)
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file or lies below one"):
        convert(source, tmp_path / "file" / "out")

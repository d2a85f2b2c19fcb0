"""Vision towers of transformers and timm: what becomes of LayerScale, positions and preprocessing, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest

import icar_jax
from icar_jax import checkpoint, pytree
from icar_jax.checkpoint import CheckpointError
from icar_jax.config import from_dict
from icar_jax.convert import rules as engine
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import Tensor
from icar_jax.convert.positions import resize_positions
from icar_jax.convert.source import open_source
from icar_jax.models.vision import VisionArch, VisionTower
from tests.support import parity_cases
from tests.support.vision_sources import arch_of, converted, refusal, source_of

CASES = (
    "hf_dinov2", "hf_dinov2_swiglu", "hf_dinov2_registers", "hf_vit", "timm_vit", "timm_dinov2", "timm_registers", "timm_mean",
    "timm_clip",
)  # fmt: skip


# --- LayerScale ------------------------------------------------------------------------------------------------------------


def test_folded_layer_scale_is_the_unfolded_layer():
    rng = np.random.default_rng(0)
    weight, bias, scale = (rng.standard_normal(shape).astype(np.float32) for shape in ((4, 6), (4,), (4,)))
    tensors = {name: Tensor(name, array.shape, "float32", lambda a=array: a)
               for name, array in (("fc.weight", weight), ("fc.bias", bias), ("scale", scale))}  # fmt: skip
    rules = engine.scaled("fc", "out", "scale")
    shapes = {"out": {"kernel": np.zeros((6, 4)), "bias": np.zeros(4)}}
    leaves = engine.import_weights(tensors, rules, shapes, "here")
    folded = {path: np.asarray(leaf) for path, leaf in leaves.items()}
    assert leaves["out/kernel"].sources == ("fc.weight", "scale")
    x = rng.standard_normal((3, 6))
    unfolded = (x @ weight.T.astype(np.float64) + bias) * scale
    np.testing.assert_allclose(x @ folded["out/kernel"] + folded["out/bias"], unfolded, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(folded["out/kernel"], weight.T * scale)  # each value rounded once, in float32
    np.testing.assert_array_equal(folded["out/bias"], bias * scale)
    # Backwards the scales are 1, once for both.
    back = engine.export_weights(pytree.unflatten(folded), rules, "here")
    assert set(back) == set(tensors)
    np.testing.assert_array_equal(back["scale"], np.ones(4))
    np.testing.assert_array_equal(back["fc.weight"], folded["out/kernel"].T)
    # A scale that belongs to no layer is unknown, and a layer without its scale incomplete.
    with pytest.raises(ConvertError, match="missing in the source: scale"):
        engine.import_weights({k: v for k, v in tensors.items() if k != "scale"}, rules, shapes, "here")
    with pytest.raises(ConvertError, match=r"unknown in the source: scale \(4,\)"):
        engine.import_weights({"scale": tensors["scale"]}, rules, {}, "here")
    with pytest.raises(ConvertError, match="shape"):
        engine.import_weights(tensors | {"scale": Tensor("scale", (5,), "float32", lambda: np.ones(5))}, rules, shapes, "here")


def test_every_block_of_a_source_is_scaled_once(tmp_path):
    case = parity_cases.load("hf_dinov2")
    _, params = converted("hf_dinov2", tmp_path)
    wide = {name: array.astype(np.float32) for name, array in case.weights.items()}
    for i in range(2):
        layer, block = f"dinov2.encoder.layer.{i}", params["vision"]["blocks"][str(i)]
        for name, to, n in (("attention.output.dense", block["attn"]["out"], 1), ("mlp.fc2", block["mlp"]["fc2"], 2)):
            scale = wide[f"{layer}.layer_scale{n}.lambda1"]
            assert np.abs(scale - 1).max() > 0.1
            np.testing.assert_array_equal(to["kernel"], (wide[f"{layer}.{name}.weight"] * scale[:, None]).T)
            np.testing.assert_array_equal(to["bias"], wide[f"{layer}.{name}.bias"] * scale)
        np.testing.assert_array_equal(block["mlp"]["fc1"]["kernel"], wide[f"{layer}.mlp.fc1.weight"].T)


# --- what a tower becomes --------------------------------------------------------------------------------------------------


def test_architectures_are_read(tmp_path):
    read = {name: arch_of(converted(name, tmp_path / name)[0]) for name in CASES}
    assert {name: (a.registers, a.ffn, a.head) for name, a in read.items()} == {
        "hf_dinov2": (0, "mlp", "cls"), "hf_dinov2_swiglu": (0, "swiglu", "cls"), "hf_dinov2_registers": (3, "mlp", "cls"),
        "hf_vit": (0, "mlp", "cls"), "timm_vit": (0, "mlp", "cls"), "timm_dinov2": (0, "mlp", "cls"),
        "timm_registers": (4, "swiglu", "cls"), "timm_mean": (2, "mlp", "mean"), "timm_clip": (0, "mlp", "cls"),
    }  # fmt: skip
    assert {a.projection for a in read.values()} == {"none"} and all(a.embed_dim == a.width for a in read.values())
    assert {name: a.norm_eps for name, a in read.items() if a.norm_eps != 1e-6} == {"hf_vit": 1e-12, "timm_clip": 1e-5}
    assert {name for name, a in read.items() if a.pre_norm} == {name for name, a in read.items() if not a.patch_bias} == {
        "timm_clip"
    }  # fmt: skip
    assert {name: a.activation for name, a in read.items() if a.activation != "gelu"} == {
        "timm_mean": "gelu_tanh", "timm_clip": "quick_gelu",
    }  # fmt: skip
    assert not read["timm_mean"].class_token


def test_parameters_have_the_names_of_a_tower_in_a_clip(tmp_path):
    report, params = converted("hf_dinov2_registers", tmp_path)
    assert set(params) == {"vision"}
    assert not pytree.differences(params, {"vision": VisionTower.graph(arch_of(report)).shapes})
    assert (report.description["kind"], "tokenizer" in report.description) == ("vision", False)
    assert report.notes[0] == "left out: the token of masked patches"
    assert "model: image_size 30" in report.summary()
    assert converted("hf_vit", tmp_path / "v")[0].notes == ["left out: the classifier"]
    assert converted("timm_vit", tmp_path / "t")[0].notes == ["left out: the classifier (head)"]


@pytest.mark.parametrize("name", CASES)
def test_added_exits_start_from_the_norm_of_full_depth(name, tmp_path):
    report, params = converted(name, tmp_path, exits=(1,))
    arch, vision = arch_of(report), params["vision"]
    assert (arch.exits, arch.pool) == ((1,), arch.head)
    assert set(vision["exits"]["1"]) == {"ln"}
    jax.tree.map(np.testing.assert_array_equal, vision["exits"]["1"]["ln"], vision["ln_post"])
    images = np.zeros((1, arch.image_size, arch.image_size, 3), np.float32)
    assert VisionTower.graph(arch)(vision, images, (1,))[1].shape == (1, arch.embed_dim)


def test_another_size_resizes_positions_as_the_library_does(tmp_path):
    for name, antialias in (("hf_dinov2_swiglu", False), ("hf_dinov2_registers", True), ("timm_dinov2", True)):
        case = parity_cases.load(name)
        report, params = converted(name, tmp_path / name, **case.options)
        positions = next(array for key, array in case.weights.items() if key.endswith(("position_embeddings", "pos_embed")))
        expected = resize_positions(positions[0], 3, True, antialias)
        np.testing.assert_array_equal(params["vision"]["pos"], expected)
        how = "bicubic, antialiased" if antialias else "bicubic"
        assert report.description["source"]["positions"] == f"resized from 5 x 5 to 3 x 3, {how}"
        assert "positions" not in converted(name, tmp_path / f"{name}_plain")[0].description["source"]
    assert "not a multiple of the patch size" in refusal("hf_dinov2", tmp_path, options=Options(image_size=20))


def test_plain_bicubic_interpolation_reads_four_positions():
    line = np.arange(5.0)[:, None] * np.ones(5)
    grid = resize_positions(line.reshape(25, 1), 3, False, antialias=False).reshape(3, 3)
    np.testing.assert_allclose(grid[:, 1], grid[:, 2])
    # Centres lie at 1/3, 2 and 11/3; Keys' cubic with a = -3/4, the edge's value repeated beyond it.
    taps = lambda t: np.array([ref_cubic(t + 1), ref_cubic(t), ref_cubic(1 - t), ref_cubic(2 - t)])
    assert grid[0, 0] == pytest.approx(taps(1 / 3) @ [0, 0, 1, 2]) and grid[1, 0] == pytest.approx(2)
    assert grid[2, 0] == pytest.approx(taps(2 / 3) @ [2, 3, 4, 4])
    same = np.random.default_rng(0).standard_normal((25, 2))
    np.testing.assert_allclose(resize_positions(same, 5, False, antialias=False), same, atol=1e-12)


def ref_cubic(d, a=-0.75):
    return (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)


def test_preprocessing_keeps_the_ratio_of_the_crop(tmp_path):
    report, _ = converted("hf_dinov2", tmp_path)
    assert {key: report.description["preprocess"][key] for key in ("image_size", "resize_to", "resize_mode")} == {
        "image_size": 12, "resize_to": 14, "resize_mode": "crop",
    }  # fmt: skip
    report, _ = converted("hf_dinov2_swiglu", tmp_path / "r", image_size=42)
    assert report.description["preprocess"]["resize_to"] == 48  # 256 / 224 of 42
    assert not [note for note in report.notes if "prepares" in note]
    assert "prepares 224 and resizes" in converted("hf_dinov2_swiglu", tmp_path / "s")[0].notes[1]
    squashed = converted("hf_vit", tmp_path / "v")[0].description["preprocess"]
    assert squashed["resize_mode"] == "squash" and "resize_to" not in squashed
    assert converted("timm_vit", tmp_path / "t")[0].description["preprocess"]["resize_to"] == 17  # 16 / 0.9, rounded down
    assert "resize_to" not in converted("timm_dinov2", tmp_path / "d")[0].description["preprocess"]
    own = converted("hf_dinov2", tmp_path / "p", preprocess="imagenet")[0].description["preprocess"]
    assert own["image_size"] == 12 and "resize_to" not in own


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "teacher.backbone.", "module.model."])
@pytest.mark.parametrize("name", ["timm_dinov2", "hf_dinov2"])
def test_wrapped_names(name, prefix, tmp_path):
    case = parity_cases.load(name)
    wrapped = {prefix + key: array for key, array in case.weights.items()}
    _, source = source_of(name, tmp_path, wrapped)
    convert(source, tmp_path / "out")
    _, params = converted(name, tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.read(tmp_path / "out", "vision").params, params)


@pytest.mark.parametrize("key", ["state_dict_ema", "teacher", "model"])
def test_state_dicts_of_training_programs(key, tmp_path):
    case = dataclasses.replace(parity_cases.load("timm_vit"), state_key=key, extra={"epoch": 3})
    convert(parity_cases.write_source(case, tmp_path / "s"), tmp_path / "out")
    _, params = converted("timm_vit", tmp_path / "plain")
    jax.tree.map(np.testing.assert_array_equal, checkpoint.read(tmp_path / "out", "vision").params, params)


def test_a_bare_state_dict_of_timm_needs_the_user(tmp_path):
    case = dataclasses.replace(parity_cases.load("timm_vit"), files={})
    source = parity_cases.write_source(case, tmp_path / "s")
    with pytest.raises(ConvertError, match="--activation=gelu"):
        convert(source, tmp_path / "no")
    with pytest.raises(ConvertError, match="--heads NUMBER for a tower alone"):
        convert(source, tmp_path / "no", Options(activation="gelu"))
    with pytest.raises(ConvertError, match="--heads takes one number, for there is one tower; found 2"):
        convert(source, tmp_path / "no", Options(activation="gelu", heads=(2, 2)))
    with pytest.raises(ConvertError, match="--preprocess=imagenet"):
        convert(source, tmp_path / "no", Options(activation="gelu", heads=(2,)))
    report = convert(source, tmp_path / "out", Options(activation="gelu", heads=(2,), preprocess="imagenet"))
    assert arch_of(report) == arch_of(converted("timm_vit", tmp_path / "plain")[0])


# --- what a tower alone cannot do ------------------------------------------------------------------------------------------


def test_a_tower_is_no_clip(tmp_path):
    converted("hf_vit", tmp_path)
    with pytest.raises(CheckpointError, match="is a vision model, expected clip.*`icar join` makes a CLIP of two towers"):
        icar_jax.Clip.from_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match="no checkpoint of kind clip"):
        icar_jax.Clip.from_pretrained(tmp_path / "model")


# --- back again ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_computes_the_same(name, tmp_path):
    first, params = converted(name, tmp_path)
    layout = first.description["source"]["layout"]
    written = export(tmp_path / "model", tmp_path / "back", layout.split("_")[0])
    assert open_source(written.path).layout == layout
    second = convert(written.path, tmp_path / "again")
    again = checkpoint.read(tmp_path / "again", "vision").params
    assert arch_of(second) == arch_of(first)
    assert second.description["preprocess"] == first.description["preprocess"]
    if name != "timm_registers":  # the class token's position becomes part of it
        jax.tree.map(np.testing.assert_array_equal, again, params)
    else:
        images = parity_cases.load(name).images[:, :16, :16]
        run = lambda p: VisionTower.graph(arch_of(first))(p["vision"], images)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(again), run(params))


def test_what_was_added_to_a_tower_is_named(tmp_path):
    _, source = source_of("hf_dinov2", tmp_path)
    for layout in ("hf", "timm"):
        convert(source, tmp_path / layout, Options(exits=(1,)))
        with pytest.raises(
            ConvertError, match=f"the {layout} layout cannot hold this model: it has early exits, after 1 blocks"
        ):
            export(tmp_path / layout, tmp_path / "no", layout)
    with pytest.raises(CheckpointError, match=r"no checkpoint of kind clip or bundle|found .*\(vision\)"):
        export(tmp_path / "hf", tmp_path / "no", "open_clip")
    assert not (tmp_path / "no").exists()


def test_a_tower_leaves_in_another_librarys_layout(tmp_path):
    """What came from transformers is written for timm, and the other way round where the layout can hold it."""
    _, params = converted("hf_dinov2_registers", tmp_path)
    out = convert(export(tmp_path / "model", tmp_path / "t", "timm").path, tmp_path / "again")
    assert arch_of(out) == from_dict(checkpoint.describe(tmp_path / "model")["arch"], VisionArch, "arch")
    again = checkpoint.read(tmp_path / "again", "vision").params["vision"]
    np.testing.assert_allclose(again["cls"] + again["pos"][0], params["vision"]["cls"] + params["vision"]["pos"][0], atol=1e-6)
    converted("timm_mean", tmp_path / "m")
    with pytest.raises(ConvertError, match="it has no class token; it does not pool the class token"):
        export(tmp_path / "m" / "model", tmp_path / "no", "hf")

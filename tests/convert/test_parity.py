"""Converted weights against the library they come from: float32, 1e-5 a layer and 1e-4 a tower.

Each case is compared twice: with the golden file, which needs no PyTorch, and, marked `parity`, with other weights that the
library computes now.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from icar_jax import checkpoint, pytree
from icar_jax.config import from_dict
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.positions import resize_positions
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXt, ConvNeXtArch
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.vision import VisionArch, VisionTower
from tests.support import parity_cases as cases

LIVE_SEED = 7
HF_POSITIONS = "embeddings.position_embeddings"
POSITIONS, TYPES = f"{HF_POSITIONS}.weight", "embeddings.token_type_embeddings.weight"
ARCHS = {
    "clip": ClipArch, "vision": VisionArch, "text": TextArch, "complexity": ComplexityArch, "convnext": ConvNeXtArch,
}  # fmt: skip
SEEDS = [pytest.param(None, id="golden"), pytest.param(LIVE_SEED, id="live", marks=pytest.mark.parity)]
SOURCES = [
    pytest.param((name, *seed.values), id=f"{name}-{seed.id}", marks=seed.marks) for seed in SEEDS for name in cases.names()
]


@dataclass(frozen=True)
class Model:
    """A case after its conversion."""

    case: cases.Case
    arch: Any
    params: dict


def case_of(name, seed):
    return cases.load(name) if seed is None else cases.build(name, seed)


def converted(case, folder, **options):
    """The case written as a source, converted and read back."""
    source = cases.write_source(case, folder / "source")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in (case.options | options).items()}
    convert(source, folder / "model", Options(**given))
    read = checkpoint.read(folder / "model", case.kind)
    return Model(case, from_dict(read.description["arch"], ARCHS[case.kind], "arch"), read.params)


@pytest.fixture(scope="module", params=SOURCES)
def model(request, tmp_path_factory):
    name, seed = request.param
    return converted(case_of(name, seed), tmp_path_factory.mktemp(name))


# --- parity ----------------------------------------------------------------------------------------------------------------


def test_towers(model):
    case, outputs = model.case, model.case.outputs
    found = {}
    if case.kind == "clip":
        clip = Clip.graph(model.arch)
        embeds = jax.jit(clip.encode_image_exits)(model.params, case.images)
        found = {f"exit_{blocks}": z for blocks, z in embeds.items()}
        found["image_embeds"] = found.pop(f"exit_{model.arch.vision.depth}")
        found["text_embeds"] = jax.jit(clip.encode_text)(model.params, case.inputs["tokens"])
    elif case.kind == "complexity":
        found["logits"] = jax.jit(ComplexityModel.graph(model.arch).logits)(model.params, case.images)
    elif case.kind == "vision":
        found = tower_outputs(model)
    elif case.kind == "text":
        found["features"] = jax.jit(TextTower.graph(model.arch))(model.params["text"], case.inputs["tokens"])
    else:
        name = "logits" if model.arch.num_classes else "features"
        found[name] = jax.jit(ConvNeXt.graph(model.arch))(model.params, case.images)
    expected = {name for name in outputs if name.split("_")[0] in ("image", "text", "logits", "features")}
    expected |= {name for name in outputs if name.removeprefix("exit_").isdigit()}
    assert set(found) == expected
    for name in expected:
        np.testing.assert_allclose(found[name], outputs[name], rtol=0, atol=1e-4, err_msg=name)


def tower_outputs(model):
    """The tower's output, and all tokens after the last norm where the library norms them before it pools."""
    tower, depth = VisionTower.graph(model.arch), model.arch.depth

    def run(params, images):
        made, tokens = tower(params, images, (depth,), intermediates=True)
        normed = tower.merge(params).ln_post(tokens[f"blocks/{depth - 1}"])
        return {"features": made[depth]} | ({"features_tokens": normed} if "features_tokens" in model.case.outputs else {})

    return jax.jit(run)(model.params["vision"], model.case.images)


def test_layers(model):
    assert model.case.layers
    for path, found in run_layers(model).items():
        np.testing.assert_allclose(found, model.case.layers[path][1], rtol=1e-5, atol=1e-5, err_msg=path)


def run_layers(model):
    """{path: what this layer of the converted model makes of the input that the original layer had}."""
    run = partial(run_layer, model.arch, model.case.kind)
    together = jax.jit(lambda params, inputs: {path: run(path, params, x) for path, x in inputs.items()})
    return together(model.params, {path: x for path, (x, _) in model.case.layers.items()})


def run_layer(arch, kind, path, params, x):
    root, rest = ("", path) if kind == "convnext" else path.split("/", 1)
    graph = ConvNeXt.graph(arch.backbone if kind == "complexity" else arch) if kind in ("complexity", "convnext") else None
    if kind in ("vision", "text"):
        graph = (VisionTower if kind == "vision" else TextTower).graph(arch)
    if kind == "clip":
        graph = VisionTower.graph(arch.vision) if root == "vision" else TextTower.graph(arch.text)
    layer = graph.merge(params[root] if root else params)
    for part in rest.split("/"):
        layer = layer[int(part)] if part.isdigit() else getattr(layer, part)
    return layer(jnp.asarray(x))


def test_every_value_arrives_once_and_unrounded(model):
    """Key biases cancel in the softmax and rounding may hide below the tolerances: so the values themselves are compared."""
    case, flat = model.case, pytree.flatten(model.params)
    if model.case.options.get("exits"):
        flat = {path: leaf for path, leaf in flat.items() if "/exits/" not in path and not path.startswith("exit_logit_scale")}
    if any("layer_scale" in name or ".ls1." in name for name in case.weights):
        pytest.skip("LayerScale is multiplied into other weights, which test_vision_layouts.py compares")
    left_out = ("temp_clamp", "head.weight", "head.bias", "classifier.weight", "classifier.bias")
    kept = {name: array for name, array in case.weights.items() if array.dtype.kind == "f" and name not in left_out}
    if "image_size" in case.options:  # resized, and compared in test_resized_positions
        kept = {n: array for n, array in kept.items() if n not in ("visual.positional_embedding", f"vit.{HF_POSITIONS}")}
        flat.pop("vision/pos")
    if case.layout in ("bert", "open_clip_encoder"):  # positions are a sum, compared in test_positions_of_text_encoders
        prefix = "text.transformer." if case.layout == "open_clip_encoder" else "roberta."
        beside = (POSITIONS, TYPES, "lm_head.", *(("pooler.",) if case.kind == "text" else ()))
        kept = {n: array for n, array in kept.items() if not n.removeprefix(prefix).startswith(beside)}
        flat.pop("text/pos")
    expected = np.sort(np.concatenate([array.astype(np.float32).ravel() for array in kept.values()]))
    np.testing.assert_array_equal(np.sort(np.concatenate([np.ravel(leaf) for leaf in flat.values()])), expected)


def test_temperatures(model):
    outputs = model.case.outputs
    if model.case.kind == "clip":
        np.testing.assert_array_equal(model.params["logit_scale"], outputs["logit_scale"])
        assert np.shape(model.params["logit_scale"]) == ()
    assert ("logit_bias" in model.params) == ("logit_bias" in outputs)
    if "logit_bias" in outputs:
        np.testing.assert_array_equal(model.params["logit_bias"], outputs["logit_bias"])
    if "exit_logit_scale" in outputs:
        np.testing.assert_array_equal(model.params["exit_logit_scale"]["13"], outputs["exit_logit_scale"])


@pytest.mark.parametrize("seed", SEEDS)
def test_resized_positions(seed):
    case = case_of("open_clip_resized", seed)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(resize_positions(case.weights["visual.positional_embedding"], 6, class_token=True), case.outputs["resized_positions"])
    grids = [name.split("/")[1:] for name in case.outputs if name.startswith("positions/")]
    assert len(grids) == 4
    for old, new in grids:
        positions, expected = case.inputs[f"positions/{old}"], case.outputs[f"positions/{old}/{new}"]
        close(resize_positions(positions, int(new), class_token=True), expected)
        close(resize_positions(positions[1:], int(new), class_token=False), expected[1:])


@pytest.mark.parametrize("name, prefix, first", [
    ("bert", "", 0), ("roberta", "roberta.", 2), ("open_clip_xlm_roberta", "text.transformer.", 2),
])  # fmt: skip
def test_positions_of_text_encoders(name, prefix, first, tmp_path):
    model = golden_model(name, tmp_path)
    weights, length = model.case.weights, getattr(model.arch, "text", model.arch).context_length
    expected = weights[prefix + POSITIONS][first : first + length] + weights[prefix + TYPES][0]
    np.testing.assert_array_equal(model.params["text"]["pos"], expected)


# --- what the cases cover --------------------------------------------------------------------------------------------------


def test_golden_files_are_small():
    assert sum(file.stat().st_size for file in cases.GOLDEN.iterdir()) < 3_300_000


def golden_model(name, folder, **options):
    return converted(cases.load(name), folder, **options)


def test_architectures_are_read(tmp_path):
    read = {name: golden_model(name, tmp_path / name).arch for name in cases.names()}
    clips = {name: arch for name, arch in read.items() if isinstance(arch, ClipArch)}
    head_widths = {name: arch.vision.width // arch.vision.heads for name, arch in clips.items()}
    assert (head_widths["hf_quick_gelu"], head_widths["openai"]) == (64, 64)
    assert (head_widths["hf_gelu"], head_widths["open_clip_gelu"]) == (80, 88)
    quick = {name for name, arch in clips.items() if arch.vision.activation == arch.text.activation == "quick_gelu"}
    assert quick == {"hf_quick_gelu", "clip_336", "openai", "open_clip_custom_text"}
    assert {name for name, arch in clips.items() if arch.vision.activation == "gelu_tanh"} == {"siglip"}
    pools = {name: arch.text.pool for name, arch in clips.items()}
    assert (pools["hf_quick_gelu"], pools["hf_gelu"], pools["siglip"]) == ("argmax", "end", "last")
    assert read["hf_gelu"].text.end_id == 65
    assert (read["clip_336"].vision.image_size, read["open_clip_resized"].vision.image_size) == (336, 48)
    icar = read["icar"].vision
    assert (icar.depth, icar.exits, icar.pool, read["icar"].temperature) == (14, (13,), "first_patch", "own")
    convnexts = {name[9:]: (arch.version, arch.num_classes) for name, arch in read.items() if name.startswith("convnext_")}
    assert convnexts == {"v1_linear": (1, 10), "v1_conv_mlp": (1, 0), "v2_linear": (2, 0), "v2_conv_mlp": (2, 7)}
    encoders = {name: arch for name, arch in read.items() if isinstance(arch, TextArch)}
    found = {name: (arch.context_length, arch.pool, arch.pad_id, arch.norm_eps) for name, arch in encoders.items()}
    assert found == {"bert": (12, "mean", 0, 1e-12), "roberta": (10, "first", 1, 1e-5), "hf_text_clip": (10, "end", -1, 1e-5)}
    assert read["icc"].head == "classification" and read["icc"].backbone.dims == (8, 12, 16, 24)


@pytest.mark.parametrize("name", ["hf_gelu", "open_clip_gelu"])
def test_the_two_text_poolings_differ_on_these_captions(name, tmp_path):
    """Otherwise the wrong pooling would pass."""
    model = golden_model(name, tmp_path)
    other = replace(model.arch.text, pool="end" if model.arch.text.pool == "argmax" else "argmax")
    found = jax.jit(Clip.graph(replace(model.arch, text=other)).encode_text)(model.params, model.case.inputs["tokens"])
    assert np.abs(found - model.case.outputs["text_embeds"]).max() > 0.1


@pytest.mark.parametrize("wrong", ["gelu_tanh", "quick_gelu"])
def test_a_wrong_activation_would_show(wrong, tmp_path):
    model = golden_model("hf_gelu", tmp_path)
    vision, text = (replace(tower, activation=wrong) for tower in (model.arch.vision, model.arch.text))
    for path, found in run_layers(replace(model, arch=replace(model.arch, vision=vision, text=text))).items():
        assert np.abs(found - model.case.layers[path][1]).max() > 1e-4, path


def test_added_exit_starts_from_the_final_head(tmp_path):
    model = golden_model("hf_quick_gelu", tmp_path)
    head, vision = model.params["vision"]["exits"]["1"], model.params["vision"]
    np.testing.assert_array_equal(head["ln"]["scale"], vision["ln_post"]["scale"])
    np.testing.assert_array_equal(head["ln"]["bias"], vision["ln_post"]["bias"])
    np.testing.assert_array_equal(head["proj"]["kernel"], vision["proj"]["kernel"])


# --- the same weights in other wrappings -----------------------------------------------------------------------------------


def same_params(a, b):
    a, b = pytree.flatten(a.params), pytree.flatten(b.params)
    assert list(a) == list(b)
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def renamed(case, prefix):
    return replace(case, weights={prefix + name: array for name, array in case.weights.items()})


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "module.model."])
def test_icc_prefixes(prefix, tmp_path):
    same_params(converted(renamed(cases.load("icc"), prefix), tmp_path / "a"), golden_model("icc", tmp_path / "b"))


def test_icar_saved_by_several_processes_and_bare(tmp_path):
    case, plain = cases.load("icar"), golden_model("icar", tmp_path / "plain")
    same_params(converted(renamed(case, "module."), tmp_path / "module"), plain)
    bare = replace(case, state_key="", extra={})
    bare = converted(bare, tmp_path / "bare", exits=(13,), activation="gelu", preprocess="icar")
    same_params(bare, plain)
    assert bare.arch == plain.arch


def test_open_clip_without_its_configuration_needs_the_user(tmp_path):
    case, plain = cases.load("open_clip_custom_text"), golden_model("open_clip_custom_text", tmp_path / "plain")
    bare = replace(case, files={})
    with pytest.raises(ConvertError, match=r"(?s)--activation.*quick_gelu"):
        converted(bare, tmp_path / "a", heads=(2, 3), preprocess="half")
    with pytest.raises(ConvertError, match=r"(?s)--preprocess.*half"):
        converted(bare, tmp_path / "b", heads=(2, 3), activation="quick_gelu")
    with pytest.raises(ConvertError, match="--heads"):
        converted(bare, tmp_path / "c", preprocess="half", activation="quick_gelu")
    assert not any((tmp_path / folder / "model").exists() for folder in "abc")
    full = converted(bare, tmp_path / "d", heads=(2, 3), preprocess="half", activation="quick_gelu")
    same_params(full, plain)
    assert full.arch == plain.arch


# --- what is refused -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module", params=["hf_gelu", "open_clip_custom_text", "convnext_v2_linear"])
def refuse(request, tmp_path_factory, monkeypatch_module):
    """(a case, and a function that gives other weights to its files, sees them refused and returns the message)."""
    # The same architecture is asked for hundreds of times: traced once, these tests take a tenth of the time.
    for kind in (Clip, ConvNeXt):
        monkeypatch_module.setattr(kind, "graph", cache(kind.graph))
    case, folder = cases.load(request.param), tmp_path_factory.mktemp(request.param)
    source, dest, absent = cases.write_source(case, folder / "source"), folder / "model", folder / "absent"
    convert(source, dest, Options())
    content = {file.name: file.read_bytes() for file in dest.iterdir()}

    def refused(weights=None, raw=None):
        if raw is None:
            cases.write_source(replace(case, weights=weights), source)
        else:
            (source / case.weights_file).write_bytes(raw)
        messages = []
        for target in (dest, absent):
            with pytest.raises(ConvertError) as error:
                convert(source, target, Options())
            messages.append(str(error.value))
        assert messages[0] == messages[1].replace(str(absent), str(dest))
        assert {file.name: file.read_bytes() for file in dest.iterdir()} == content
        assert {file.name for file in folder.iterdir()} == {"source", "model"}  # no half-written folder either
        return messages[0]

    return case, refused


def test_any_missing_weight_is_named(refuse):
    case, refused = refuse
    for name in case.weights:
        assert name in refused({key: array for key, array in case.weights.items() if key != name})


def test_any_misshapen_weight_is_named(refuse):
    case, refused = refuse
    for name, array in case.weights.items():
        message = refused(case.weights | {name: np.stack([array, array])})
        assert name in message and str((2, *array.shape)) in message


def test_unknown_and_renamed_weights_are_named(refuse):
    case, refused = refuse
    name = next(name for name in case.weights if name.endswith((".1.mlp.fc2.weight", ".1.mlp.c_proj.weight", ".1.norm.weight")))
    array = case.weights[name]
    others = {key: value for key, value in case.weights.items() if key != name}
    for unknown in ("something.else", name.replace("weight", "weight_scale"), name + ".weight", "extra." + name):
        message = refused(case.weights | {unknown: array})
        assert unknown in message and str(array.shape) in message
        message = refused(others | {unknown: array})
        assert unknown in message and name in message


def test_a_block_too_many_is_refused(refuse):
    case, refused = refuse
    name = next(name for name in case.weights if ".1." in name and name.endswith("bias"))
    head, _, tail = name.rpartition(".1.")
    message = refused(case.weights | {f"{head}.9.{tail}": case.weights[name]})
    assert f"{head}.9.{tail}" in message or "layers" in message  # a config beside the weights already counts the blocks


def test_weights_that_are_no_numbers_are_named(refuse):
    case, refused = refuse
    for name in list(case.weights)[::7]:
        for value in (np.nan, np.inf, -np.inf):
            broken = np.array(case.weights[name])
            broken.reshape(-1)[-1] = value
            assert name in refused(case.weights | {name: broken})


def test_wrong_dtypes_are_named(refuse):
    case, refused = refuse
    for name in list(case.weights)[::7]:
        for dtype in (np.int64, np.uint8, np.bool_):
            message = refused(case.weights | {name: case.weights[name].astype(dtype)})
            assert name in message and np.dtype(dtype).name in message


def test_truncated_files_are_refused(refuse, tmp_path):
    case, refused = refuse
    raw = (cases.write_source(case, tmp_path) / case.weights_file).read_bytes()
    for length in (0, 4, 100, len(raw) // 2, len(raw) - 1):
        assert case.weights_file in refused(raw=raw[:length])

"""References of an original model: what a file must hold, and that any change of the converted model is noticed and named."""

import dataclasses
import json
import struct
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from icar_jax import pytree
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.parity import verify
from icar_jax.convert.parity.verify import (
    Difference,
    compare,
    format_table,
    read_reference,
    require_equal,
    weights_sha256,
)
from icar_jax.models import convnext
from icar_jax.models.clip import Clip, ClipArch
from icar_jax.models.complexity import ComplexityArch, ComplexityModel
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.text import TextArch, TextTower
from icar_jax.models.vision import VisionArch
from tests.support import reference as ref

CLIP = ClipArch(
    VisionArch(16, 8, 16, 3, 2, 32, 12, "quick_gelu", (2,), "first_patch"),
    TextArch(8, 40, 16, 2, 2, 32, 12, "quick_gelu", end_id=39),
)
COMPLEXITY = ComplexityArch(ConvNeXtArch((1, 1, 1, 1), (4, 6, 8, 10)), "classification", 32)
BACKBONE = ConvNeXtArch((1, 1, 1, 1), (4, 6, 8, 10), version=1)


def random_params(shapes, seed):
    """Every term away from its start, and large enough for another activation to show."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        centre = 1.0 if path.endswith("scale") else 0.0
        return (centre + 0.35 * rng.standard_normal(leaf.shape)).astype(np.float32)

    return pytree.map_with_path(draw, shapes)


def normalised_images(count, size):
    return np.random.default_rng(1).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


def write(path, layout, **arrays):
    np.savez(path, **arrays, meta=np.array(json.dumps({"layout": layout, "file": "original.pt", "sha256": "ab12"})))
    return path


@pytest.fixture(scope="module")
def clip():
    """(parameters, arrays of their reference), the outputs from float64 numpy towers."""
    params = random_params(Clip.graph(CLIP).shapes, 0)
    p, images = ref.f64(params), normalised_images(2, 16)
    tokens = np.array([[38, 5, 9, 39, 39, 39, 39, 39], [38, 3, 30, 2, 7, 7, 1, 39]], np.int64)
    embeds = {e: np.stack([ref.vision(x, p["vision"], CLIP.vision, e, ref.quick_gelu) for x in images]) for e in (2, 3)}
    arrays = {
        "images": images, "tokens": tokens, "image_embeds": embeds[3], "exit_2": embeds[2],
        "text_embeds": np.stack([ref.text(t, p["text"], CLIP.text, ref.quick_gelu) for t in tokens]),
        "logit_scale": p["logit_scale"], "exit_2_logit_scale": p["exit_logit_scale"]["2"],
    }  # fmt: skip
    return params, arrays


@pytest.fixture(scope="module")
def complexity():
    params = random_params(ComplexityModel.graph(COMPLEXITY).shapes, 2)
    p, images = ref.f64(params), normalised_images(2, 32)
    head = p["head"]
    features = np.stack([ref.convnext(x, p["backbone"]) for x in images])
    logits = ref.linear(ref.layer_norm(features, head["norm"], 1e-5), head["fc"])
    return params, {"images": images, "logits": logits}


def ramp(leaf):
    """Neither a shift nor a scale, which the next norm would take out again."""
    return np.linspace(0.1, 0.3, leaf.size, dtype=np.float32).reshape(leaf.shape)


def changed(params, path, change=lambda leaf: 1.5 * leaf + ramp(leaf)):
    flat = pytree.flatten(params)
    return pytree.unflatten({**flat, path: change(flat[path])})


def failing(differences):
    return {d.part for d in differences if not d.ok}


# --- comparing -------------------------------------------------------------------------------------------------------------


def test_the_same_model_passes_and_every_output_is_listed(clip, tmp_path):
    params, arrays = clip
    found = compare("clip", CLIP, params, read_reference(write(tmp_path / "r.npz", "icar", **arrays)))
    assert [d.part for d in found] == ["image", "exit 2", "text", "logit_scale", "exit_logit_scale/2"]
    assert all(d.ok and d.largest < 1e-5 and d.mean <= d.largest and d.cosine_min > 1 - 1e-9 for d in found)
    require_equal(found)
    lines = format_table(found).splitlines()
    assert len(lines) == 7 and "1e-04" in lines[-1]
    assert all(line.startswith(d.part) and line.endswith("ok") for line, d in zip(lines[1:], found, strict=False))


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("vision/blocks/2/mlp/fc1/bias", {"image"}),
        ("vision/blocks/0/attn/qkv/kernel", {"image", "exit 2"}),
        ("vision/exits/2/ln/bias", {"exit 2"}),
        ("text/ln_final/scale", {"text"}),
        ("logit_scale", {"logit_scale"}),
        ("exit_logit_scale/2", {"exit_logit_scale/2"}),
    ],
)
def test_a_changed_parameter_fails_the_outputs_that_use_it(clip, tmp_path, path, parts):
    params, arrays = clip
    reference = read_reference(write(tmp_path / "r.npz", "icar", **arrays))
    found = compare("clip", CLIP, changed(params, path), reference)
    assert failing(found) == parts
    with pytest.raises(ConvertError, match=r"more than 1e-04: " + sorted(parts, key=[d.part for d in found].index)[0]):
        require_equal(found)
    assert sum(line.endswith("DIFFERS") for line in format_table(found).splitlines()) == len(parts)


@pytest.mark.parametrize(
    ("vision", "text", "parts"),
    [
        ({"activation": "gelu"}, {}, {"image", "exit 2"}),
        ({"activation": "gelu_tanh"}, {"activation": "gelu"}, {"image", "exit 2", "text"}),
        ({"heads": 4}, {"heads": 4}, {"image", "exit 2", "text"}),
        ({"pool": "cls"}, {"end_id": 38}, {"exit 2", "text"}),
    ],
)
def test_a_wrong_setting_fails(clip, tmp_path, vision, text, parts):
    params, arrays = clip
    arch = dataclasses.replace(
        CLIP, vision=dataclasses.replace(CLIP.vision, **vision), text=dataclasses.replace(CLIP.text, **text)
    )
    found = compare("clip", arch, params, read_reference(write(tmp_path / "r.npz", "icar", **arrays)))
    assert failing(found) == parts
    with pytest.raises(ConvertError, match="--activation" if "text" in parts else "pooled"):
        require_equal(found)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_outputs_that_are_not_finite_never_pass(clip, tmp_path, value):
    params, arrays = clip
    broken = changed(params, "text/proj/kernel", lambda leaf: np.where(leaf == leaf.max(), np.float32(value), leaf))
    found = compare("clip", CLIP, broken, read_reference(write(tmp_path / "r.npz", "icar", **arrays)))
    assert failing(found) == {"text"}
    with pytest.raises(ConvertError, match="NaN"):
        require_equal(found)


def test_complexity_logits(complexity, tmp_path):
    params, arrays = complexity
    reference = read_reference(write(tmp_path / "r.npz", "icc", **arrays))
    (right,) = compare("complexity", COMPLEXITY, params, reference)
    assert right.part == "logits" and right.ok and right.largest < 1e-4
    for path in ("backbone/stages/3/blocks/0/mlp/grn/beta", "backbone/head/norm/bias", "head/norm/scale", "head/fc/bias"):
        (wrong,) = compare("complexity", COMPLEXITY, changed(params, path), reference)
        assert not wrong.ok, path
        with pytest.raises(ConvertError, match="logits"):
            require_equal([wrong])


def test_backbone_features(tmp_path):
    model = convnext.ConvNeXt.graph(BACKBONE)
    params, images = random_params(model.shapes, 3), normalised_images(2, 32)
    features = np.stack([ref.convnext(x, ref.f64(params)) for x in images])
    reference = read_reference(write(tmp_path / "r.npz", "timm", images=images, features=features))
    (right,) = compare("convnext", BACKBONE, params, reference)
    assert right.part == "features" and right.ok
    (wrong,) = compare("convnext", BACKBONE, changed(params, "stages/0/blocks/0/gamma"), reference)
    assert not wrong.ok
    with pytest.raises(ConvertError, match="lacks logits"):
        compare("convnext", dataclasses.replace(BACKBONE, num_classes=3), params, reference)


def test_exits_added_by_the_conversion_are_not_compared(clip, tmp_path):
    params, arrays = clip
    plain = {name: array for name, array in arrays.items() if not name.startswith("exit")}
    found = compare("clip", CLIP, params, read_reference(write(tmp_path / "r.npz", "hf_clip", **plain)))
    assert [d.part for d in found] == ["image", "text", "logit_scale"]
    require_equal(found)


def test_nothing_compared_is_a_failure():
    with pytest.raises(ConvertError, match="nothing was compared"):
        require_equal([])
    assert not Difference("image", float("nan"), 0.0, 1.0).ok
    assert Difference("image", 1e-4, 1e-5, 1.0).ok and not Difference("image", 1.1e-4, 1e-5, 1.0).ok


# --- references that do not fit ---------------------------------------------------------------------------------------------


def test_a_reference_of_another_file(clip, tmp_path):
    params, arrays = clip
    reference = read_reference(write(tmp_path / "r.npz", "icar", **arrays))
    require_equal(compare("clip", CLIP, params, reference, source_sha256="ab12"))
    with pytest.raises(ConvertError, match=r"another file.*'original.pt'.*ab12.*cd34"):
        compare("clip", CLIP, params, reference, source_sha256="cd34")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 24, 24, 3), np.float32)}, "image size: expected 16, found 24"),
        ({"tokens": np.full((2, 7), 39)}, "context length: expected 8, found 7"),
        ({"tokens": np.full((2, 8), 40)}, "token ids: expected 0 to 39, found 40 to 40"),
        ({"tokens": np.full((2, 8), -1)}, "token ids: expected 0 to 39, found -1 to -1"),
        ({"exit_1": np.ones((2, 12))}, r"exits after blocks: expected some of \(2, 3\), found \(1, 2\)"),
        ({"text_embeds": np.ones((2, 13))}, r"shape of text_embeds: expected \(2, 12\), found \(2, 13\)"),
        ({"logit_bias": np.float32(-10)}, "logit_bias, which the converted model lacks"),
    ],
)
def test_inputs_of_another_model(clip, tmp_path, change, message):
    params, arrays = clip
    reference = read_reference(write(tmp_path / "r.npz", "icar", **{**arrays, **change}))
    with pytest.raises(ConvertError, match=message):
        compare("clip", CLIP, params, reference)


def test_a_text_encoder_is_compared_by_its_features(tmp_path):
    arch = TextArch(6, 40, 16, 2, 2, 32, 16, end_id=0, pool="mean", causal=False, post_norm=True, pad_id=0, projection="none")
    tower = TextTower.graph(arch)
    params = {"text": random_params(tower.shapes, 3)}
    tokens = np.array([[4, 9, 3, 0, 0, 0], [5, 7, 30, 2, 8, 1]], np.int32)
    arrays = {"tokens": tokens, "features": np.asarray(tower(params["text"], tokens))}
    reference = read_reference(write(tmp_path / "r.npz", "bert", **arrays))
    found = compare("text", arch, params, reference)
    assert [(d.part, d.ok) for d in found] == [("text", True)]
    wrong = compare("text", dataclasses.replace(arch, pool="first"), params, reference)
    with pytest.raises(ConvertError, match="pooled token"):
        require_equal(wrong)
    with pytest.raises(ConvertError, match="context length: expected 7, found 6"):
        compare("text", dataclasses.replace(arch, context_length=7), params, reference)
    with pytest.raises(ConvertError, match="token ids: expected 0 to 29, found 0 to 30"):
        compare("text", dataclasses.replace(arch, vocabulary=30), params, reference)
    with pytest.raises(ConvertError, match="features: expected 2 rows, one for each of tokens, found 1"):
        read_reference(write(tmp_path / "r.npz", "bert", **{**arrays, "features": arrays["features"][:1]}))
    with pytest.raises(ConvertError, match="images: missing"):
        read_reference(write(tmp_path / "r.npz", "bert", tokens=tokens))


@pytest.mark.parametrize("missing", ["tokens", "image_embeds", "text_embeds", "exit_2"])
def test_missing_outputs(clip, tmp_path, missing):
    params, arrays = clip
    rest = {name: array for name, array in arrays.items() if not name.startswith(missing)}
    with pytest.raises(ConvertError, match="exit_<blocks>" if missing == "exit_2" else missing):
        compare("clip", CLIP, params, read_reference(write(tmp_path / "r.npz", "icar", **rest)))


def test_references_of_another_kind(clip, complexity, tmp_path):
    of_clip = read_reference(write(tmp_path / "clip.npz", "icar", **clip[1]))
    of_icc = read_reference(write(tmp_path / "icc.npz", "icc", **complexity[1]))
    with pytest.raises(ConvertError, match="lacks tokens, image_embeds, text_embeds and holds images, logits"):
        compare("clip", CLIP, clip[0], of_icc)
    with pytest.raises(ConvertError, match="lacks logits"):
        compare("complexity", COMPLEXITY, complexity[0], of_clip)
    larger = dataclasses.replace(COMPLEXITY, image_size=64)
    with pytest.raises(ConvertError, match="image size: expected 64, found 32"):
        compare("complexity", larger, complexity[0], of_icc)
    with pytest.raises(ConvertError, match="kind 'bundle'"):
        compare("bundle", CLIP, clip[0], of_clip)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((2, 16, 16, 3), np.uint8)}, "images: expected floats, found uint8"),
        ({"images": np.zeros((2, 3, 16, 16), np.float32)}, r"images: expected \[N, S, S, 3\]"),
        ({"images": np.zeros((16, 16, 3), np.float32)}, "images: expected 4 dimensions"),
        ({"tokens": np.zeros((2, 8), np.float32)}, "tokens: expected integers, found float32"),
        ({"image_embeds": np.full((2, 12), np.nan)}, "image_embeds: 24 of 24 values are NaN"),
        ({"text_embeds": np.ones((3, 12))}, "text_embeds: expected 2 rows, one for each of tokens, found 3"),
        ({"exit_2": np.ones((1, 12))}, "exit_2: expected 2 rows, one for each of images, found 1"),
        ({"image_embeds": np.ones((2, 0))}, "image_embeds: .*none of them empty"),
        ({"weights": np.ones(3)}, "weights: no output of this name is known"),
    ],
)
def test_arrays_of_the_wrong_kind(clip, tmp_path, change, message):
    with pytest.raises(ConvertError, match=message):
        read_reference(write(tmp_path / "r.npz", "icar", **{**clip[1], **change}))


def test_files_that_are_no_reference(clip, tmp_path, monkeypatch):
    with pytest.raises(ConvertError, match="does not exist"):
        read_reference(tmp_path / "none.npz")
    whole = write(tmp_path / "whole.npz", "icar", **clip[1]).read_bytes()
    for name, content in (("cut.npz", whole[: len(whole) // 2]), ("text.npz", b"no archive"), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConvertError, match="expected an .npz of plain arrays"):
            read_reference(tmp_path / name)
    np.save(tmp_path / "one.npy", np.ones(3))
    np.savez(tmp_path / "object.npz", images=np.array([{"a": 1}], object))
    for name in ("one.npy", "object.npz"):
        with pytest.raises(ConvertError, match="expected an .npz of plain arrays"):
            read_reference(tmp_path / name)
    claim = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    with zipfile.ZipFile(tmp_path / "claim.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(claim)) + claim)
    monkeypatch.setattr(verify, "_LARGEST", 1000)
    np.savez_compressed(tmp_path / "large.npz", images=np.zeros(1000))
    for name in ("claim.npz", "large.npz"):
        with pytest.raises(ConvertError, match="expected an .npz of plain arrays"):
            read_reference(tmp_path / name)
    monkeypatch.undo()
    np.savez(tmp_path / "bare.npz", **clip[1])
    np.savez(tmp_path / "meta.npz", **clip[1], meta=np.array("[1]"))
    for name in ("bare.npz", "meta.npz"):
        with pytest.raises(ConvertError, match="'meta'"):
            read_reference(tmp_path / name)
    with pytest.raises(ConvertError, match="images: missing"):
        read_reference(write(tmp_path / "no_images.npz", "icc", logits=np.ones((2, 2))))


def test_the_hash_of_sharded_weights_covers_every_shard(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    for name in ("1", "2"):
        save_file({name: np.ones(2)}, tmp_path / f"{name}.safetensors")
    before = weights_sha256(index)
    assert before == weights_sha256(index) != weights_sha256(tmp_path / "1.safetensors")
    save_file({"2": np.zeros(2)}, tmp_path / "2.safetensors")
    assert weights_sha256(index) != before

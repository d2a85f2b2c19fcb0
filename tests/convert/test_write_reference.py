"""References written by the source's own library, and conversions proved by them; what needs no torch is tested without it."""

import dataclasses
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.parity.reference import LIBRARIES, write_reference
from icar_jax.convert.parity.verify import read_reference
from tests.support import parity_cases


@pytest.fixture
def backbone_file(tmp_path):
    save_file({"stages.0.blocks.0.conv_dw.weight": np.ones((4, 1, 7, 7), np.float32)}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_without_torch_the_message_says_what_to_install(backbone_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConvertError, match=r"needs torch and timm.*pip install 'icar_jax\[parity\]'"):
        write_reference(backbone_file, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("out.safetensors", {}, r"ends in \.npz"),
        ("out.npz", {"images": 0}, "at least one image"),
        ("out.npz", {"heads": (2,)}, "two numbers of heads"),
        ("out.npz", {"activation": "relu"}, "gelu, gelu_tanh, quick_gelu"),
        ("out.npz", {"library": "transformers"}, "timm runs, not 'transformers'"),
        ("out.npz", {"text_pool": "max"}, "text_pool 'max' must be one of first, mean"),
        ("out.npz", {"text_pool": "mean"}, "text_pool cannot be given for this source: it is no text encoder"),
        ("out.npz", {"context_length": 8}, "context_length cannot be given"),
    ],
)
def test_impossible_requests_are_refused(backbone_file, tmp_path, out, options, message):
    with pytest.raises(ConvertError, match=message):
        write_reference(backbone_file, tmp_path / out, **options)


# --- live: the source's library against the converter -----------------------------------------------------------------------

CASES = (
    "hf_quick_gelu", "hf_gelu", "siglip", "open_clip_gelu", "open_clip_custom_text", "openai", "open_clip_resized",
    "convnext_v1_linear", "convnext_v2_conv_mlp", "icc", "icar", "hf_dinov2_swiglu", "hf_dinov2_registers", "timm_vit",
    "timm_dinov2", "timm_registers", "timm_mean", "timm_clip", "bert", "roberta",
    "open_clip_xlm_roberta", "open_clip_bert", "hf_vision_clip", "hf_vision_siglip", "hf_text_clip", "ic9600",
)  # fmt: skip
ASKED = ("heads", "activation", "image_size", "context_length", "text_pool")  # options that the library needs too


def live_source(name, folder):
    pytest.importorskip("torch")
    case = parity_cases.build(name, 77)
    return case, parity_cases.write_source(case, folder / "source")


def options_of(case, reference):
    """What a user has to say to convert this source."""
    options = {key: tuple(value) if isinstance(value, list) else value for key, value in case.options.items()}
    if case.kind == "complexity":
        options["image_size"] = reference.arrays["images"].shape[1]
    return Options(**({"preprocess": "openai"} if case.layout == "icar" else {}) | options)


@pytest.mark.parity
@pytest.mark.parametrize("name", CASES)
def test_a_conversion_is_proved_by_the_library_it_comes_from(name, tmp_path):
    case, source = live_source(name, tmp_path)
    asked = {key: value for key, value in case.options.items() if key in ASKED}
    path = write_reference(source, tmp_path / "reference.npz", images=3, seed=5, **asked)
    reference = read_reference(path)
    assert reference.meta["layout"] == case.layout
    assert set(reference.meta["libraries"]) == {"torch", LIBRARIES[case.layout]}
    report = convert(source, tmp_path / "converted", options_of(case, reference), reference=path)
    found = {d.part for d in report.differences}
    parts = {"clip": {"image", "text", "logit_scale"}, "complexity": {"logits"}, "convnext": {"logits"},
             "vision": {"image"}, "text": {"text"}}[case.kind]  # fmt: skip
    parts |= {"icar": {"exit 13", "exit_logit_scale/13"}, "siglip": {"logit_bias"}}.get(case.layout, set())
    assert found == parts
    assert all(d.ok and d.largest < 1e-4 for d in report.differences)


@pytest.mark.parity
def test_a_difference_or_another_file_stops_the_conversion(tmp_path):
    case, source = live_source("icar", tmp_path)
    path = write_reference(source, tmp_path / "reference.npz", heads=(2, 2))
    reference = read_reference(path)
    with pytest.raises(ConvertError, match="differs from the original.*: image .*, exit 13 .*, text .*\n.*number of heads"):
        convert(source, tmp_path / "out", dataclasses.replace(options_of(case, reference), heads=(4, 4)), reference=path)
    weights = dict(case.weights)
    weights["early_proj.weight"] = weights["early_proj.weight"] * np.float32(1.001)
    other = parity_cases.write_source(dataclasses.replace(case, weights=weights), tmp_path / "other")
    with pytest.raises(ConvertError, match="made from another file"):
        convert(other, tmp_path / "out", options_of(case, reference), reference=path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parity
def test_another_seed_gives_other_inputs_and_the_same_seed_the_same_file(tmp_path):
    _, source = live_source("hf_gelu", tmp_path)
    read = [read_reference(write_reference(source, tmp_path / f"{i}.npz", seed=seed)) for i, seed in enumerate((1, 1, 2))]
    for name, array in read[0].arrays.items():
        np.testing.assert_array_equal(array, read[1].arrays[name])
    for name in ("images", "tokens", "image_embeds", "text_embeds"):
        assert not np.array_equal(read[0].arrays[name], read[2].arrays[name])


@pytest.mark.parity
def test_a_torchscript_archive_runs_with_quick_gelu(tmp_path):
    torch = pytest.importorskip("torch")
    case = parity_cases.build("openai", 3)
    bare = parity_cases.write_source(case, tmp_path / "bare")

    class Archive(torch.nn.Module):
        def forward(self, x):
            return x

    archive = Archive()
    for name, array in case.weights.items():
        *parents, leaf = name.split(".")
        node = archive
        for part in parents:
            if not hasattr(node, part):
                node.add_module(part, torch.nn.Module())
            node = getattr(node, part)
        node.register_buffer(leaf, torch.from_numpy(np.array(array)))
    torch.jit.trace(archive, torch.ones(1)).save(tmp_path / "archive.pt")
    traced = read_reference(write_reference(tmp_path / "archive.pt", tmp_path / "a.npz"))
    plain = read_reference(write_reference(bare, tmp_path / "b.npz"))
    assert traced.meta["model"]["config"]["quick_gelu"] is True
    for name, array in plain.arrays.items():
        np.testing.assert_array_equal(array, traced.arrays[name])


@pytest.mark.parity
def test_open_questions_and_contradictions_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    case, source = live_source("icar", tmp_path)
    with pytest.raises(ConvertError, match="number of attention heads cannot be told"):
        write_reference(source, tmp_path / "r.npz")
    with pytest.raises(ConvertError, match="exit after 13 blocks"):
        write_reference(source, tmp_path / "r.npz", heads=(2, 2), exits=(12,))
    bare = dataclasses.replace(case, name="bare", state_key="", extra={})
    source = parity_cases.write_source(bare, tmp_path / "bare")
    with pytest.raises(ConvertError, match="which activation it uses; give one of gelu, gelu_tanh, quick_gelu"):
        write_reference(source, tmp_path / "r.npz", heads=(2, 2))
    with pytest.raises(ConvertError, match="after which block"):
        write_reference(source, tmp_path / "r.npz", heads=(2, 2), activation="gelu")
    given = write_reference(source, tmp_path / "r.npz", heads=(2, 2), activation="gelu", exits=(13,))
    assert read_reference(given).exits == (13,)
    _, source = live_source("open_clip_custom_text", tmp_path / "custom")
    with pytest.raises(ConvertError, match="activation is quick_gelu, not gelu"):
        write_reference(source, tmp_path / "r.npz", activation="gelu")
    state = {"visual.conv1.weight": torch.zeros(4, 3, 2, 2)}
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ConvertError, match="not a vision transformer"):
        write_reference(tmp_path / "part.pt", tmp_path / "q.npz", activation="gelu", heads=(2, 2))
    assert not (tmp_path / "q.npz").exists()


@pytest.mark.parity
def test_weights_that_the_library_would_fill_at_random_are_refused(tmp_path):
    case, _ = live_source("hf_gelu", tmp_path)
    weights = {name: array for name, array in case.weights.items() if name != "visual_projection.weight"}
    source = parity_cases.write_source(dataclasses.replace(case, weights=weights), tmp_path / "part")
    with pytest.raises(ConvertError, match="visual_projection.weight"):
        write_reference(source, tmp_path / "r.npz")


@pytest.mark.parity
def test_other_poolings_and_fewer_tokens_of_a_text_encoder(tmp_path):
    _, source = live_source("bert", tmp_path)
    for name, asked in (("stated", {}), ("first", {"text_pool": "first"}), ("short", {"context_length": 6})):
        path = write_reference(source, tmp_path / f"{name}.npz", **asked)
        report = convert(source, tmp_path / name, Options(**asked), reference=path)
        assert all(d.ok and d.largest < 1e-4 for d in report.differences)
        wrong = Options(context_length=6, text_pool="first") if name == "short" else Options(context_length=6)
        with pytest.raises(ConvertError, match="text .*pooled token" if name == "short" else "context length: expected 6"):
            convert(source, tmp_path / "no", wrong, reference=path)
    assert not (tmp_path / "no").exists()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "change", "asked", "message"),
    [
        ("roberta", {}, {}, "how its tokens become one embedding.*first, mean as text_pool"),
        ("roberta", {}, {"text_pool": "mean", "heads": (3, 3)}, "heads cannot be given for this source"),
        ("roberta", {}, {"text_pool": "mean", "context_length": 11}, "11 tokens: this encoder has positions for 2 to 10"),
        ("roberta", {"model_type": "camembert"}, {"text_pool": "mean"}, "describes a 'camembert' model"),
        ("roberta", {"num_hidden_layers": 3}, {"text_pool": "mean"}, "missing .*layer.2"),
        ("bert", {"pooling_mode_mean_tokens": False}, {}, "no mode is not supported"),
        ("bert", {"pooling_mode_max_tokens": True}, {}, "pooling_mode_max_tokens, pooling_mode_mean_tokens is not supported"),
    ],
)
def test_text_encoders_that_cannot_be_run_are_refused(name, change, asked, message, tmp_path):
    pytest.importorskip("torch")
    case, file = parity_cases.load(name), "1_Pooling/config.json" if name == "bert" else "config.json"
    files = {**case.files, file: {**case.files[file], **change}}
    source = parity_cases.write_source(dataclasses.replace(case, files=files), tmp_path / "source")
    with pytest.raises(ConvertError, match=message):
        write_reference(source, tmp_path / "r.npz", **asked)
    assert not (tmp_path / "r.npz").exists()

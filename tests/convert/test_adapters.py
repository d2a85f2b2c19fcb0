"""LoRA adapters, wrappers before names, and files with several state dicts; what is merged, chosen, said and refused."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from icar_jax import checkpoint
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.torch_writer import write_torch
from icar_jax.convert.parity.reference import declare_torchvision_operators
from icar_jax.convert.source import open_source
from tests.support import parity_cases

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
BLOCK = "vision_model.encoder.layers.0"


def base(folder, name="hf_gelu"):
    return parity_cases.load(name), parity_cases.write_source(parity_cases.load(name), folder)


def adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    save_file({name: np.ascontiguousarray(t, np.float32) for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def factors(case, module, rank=2, seed=0):
    """({names of the adapter: tensors}, B A)."""
    rng = np.random.default_rng(seed)
    shape = case.weights[f"{module}.weight"].shape
    a, b = rng.standard_normal((rank, *shape[1:])), rng.standard_normal((shape[0], rank, *(1,) * (len(shape) - 2)))
    product = np.einsum("r...,or->o...", a, b.reshape(shape[0], rank))
    full = f"base_model.model.{module}"
    return {f"{full}.lora_A.weight": a, f"{full}.lora_B.weight": b}, product


def params(folder):
    return checkpoint.read(folder, checkpoint.describe(folder)["kind"]).params


@pytest.mark.parametrize("config, scaling", [
    ({}, 3), ({"use_rslora": True}, 6 / 2**0.5), ({"alpha_pattern": {"layers.0.mlp.fc1": 1}}, 0.5),
    ({"alpha_pattern": {"layers.1.mlp.fc1": 1}}, 3),
])  # fmt: skip
@pytest.mark.parametrize("alone", [False, True])
def test_the_product_is_added(config, scaling, alone, tmp_path):
    case, source = base(tmp_path / "source")
    tensors, product = factors(case, f"{BLOCK}.mlp.fc1")
    name = f"base_model.model.{BLOCK}.mlp.fc2.bias"
    tensors[name] = np.arange(len(case.weights[f"{BLOCK}.mlp.fc2.bias"]), dtype=np.float32)
    folder = adapter(tmp_path / "adapter" if alone else source, tensors, **config)
    report = convert(folder, tmp_path / "model", Options(base=str(source)) if alone else Options())
    expected = case.weights[f"{BLOCK}.mlp.fc1.weight"] + scaling * product
    found = params(tmp_path / "model")["vision"]["blocks"]["0"]["mlp"]
    np.testing.assert_allclose(found["fc1"]["kernel"], expected.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["fc2"]["bias"], tensors[name])
    assert "merged the LoRA adapter adapter_model.safetensors of rank 2 into 2 tensors" in report.notes
    assert report.description["source"]["adapter"]["rank"] == 2


def test_embeddings_and_convolutions(tmp_path):
    case, source = base(tmp_path / "source")
    conv, product = factors(case, "vision_model.embeddings.patch_embedding")
    name = "text_model.embeddings.token_embedding"
    rng, shape = np.random.default_rng(1), case.weights[f"{name}.weight"].shape
    a, b = rng.standard_normal((2, shape[0])), rng.standard_normal((shape[1], 2))
    words = {f"base_model.model.{name}.lora_embedding_A": a, f"base_model.model.{name}.lora_embedding_B": b}
    convert(adapter(source, conv | words), tmp_path / "model")
    found = params(tmp_path / "model")
    kernel = case.weights["vision_model.embeddings.patch_embedding.weight"] + 3 * product
    np.testing.assert_allclose(found["vision"]["patch"]["kernel"], kernel.transpose(2, 3, 1, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["text"]["embed"], case.weights[f"{name}.weight"] + 3 * (b @ a).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config, message", [
    ({"peft_type": "IA3"}, "adapters of the kind 'IA3' are not supported, only 'LORA'; merge it with peft"),
    ({"use_dora": True}, "use_dora=True is not supported"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out=True is not supported"),
    ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
])  # fmt: skip
def test_other_adapters_are_refused(config, message, tmp_path):
    case, source = base(tmp_path / "source")
    adapter(source, factors(case, f"{BLOCK}.mlp.fc1")[0], **config)
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "model")


def test_parts_that_do_not_belong_are_named(tmp_path):
    case, source = base(tmp_path / "source")
    good, _ = factors(case, f"{BLOCK}.mlp.fc1")
    full = f"base_model.model.{BLOCK}.mlp.fc1"
    for change, message in (
        ({"base_model.model.x.y.lora_A.weight": np.ones((2, 3))}, "x.y: lacks lora_B"),
        ({f"{full}.lora_magnitude_vector": np.ones(3)}, "lora_magnitude_vector: not a part of a LoRA adapter"),
        ({f"{full}.lora_A.weight": np.ones((2, 7))}, r"A \(2, 7\) and B .* do not make vision_model"),
        ({"base_model.model.score.weight": np.ones(3)}, r"score.weight \(3,\): the weights have no such tensor"),
    ):
        adapter(source, good | change)
        with pytest.raises(ConvertError, match=message):
            convert(source, tmp_path / "model")
    (source / "adapter_config.json").unlink()
    with pytest.raises(ConvertError, match="holds adapter_model.safetensors but no adapter_config.json"):
        convert(source, tmp_path / "model")


def test_an_adapter_alone_needs_its_base(tmp_path):
    case, source = base(tmp_path / "source")
    folder = adapter(tmp_path / "adapter", factors(case, f"{BLOCK}.mlp.fc1")[0])
    with pytest.raises(ConvertError, match="is a LoRA adapter alone; pass --base WEIGHTS"):
        convert(folder, tmp_path / "model")
    with pytest.raises(ConvertError, match="--base=.* is for a folder that holds a LoRA adapter alone"):
        convert(source, tmp_path / "model", Options(base=str(source)))


@pytest.mark.parity
@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc1": 2}}])
def test_an_adapter_equals_peft(config, tmp_path):
    torch = pytest.importorskip("torch")
    if "torchvision" not in sys.modules:
        declare_torchvision_operators(torch)  # before peft, which imports transformers
    peft = pytest.importorskip("peft")
    from transformers import CLIPModel

    case, source = base(tmp_path / "source")
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "fc1", "patch_embedding"]
    model = peft.get_peft_model(CLIPModel.from_pretrained(source), peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=targets, init_lora_weights=False, modules_to_save=["visual_projection"], **config
    ))  # fmt: skip
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value += 0.1
    model.save_pretrained(tmp_path / "adapter")
    images = torch.from_numpy(case.images.transpose(0, 3, 1, 2).copy())
    out = model.eval()(pixel_values=images, input_ids=torch.from_numpy(case.inputs["tokens"].astype(np.int64)))
    convert(tmp_path / "adapter", tmp_path / "model", Options(base=str(source)))
    from icar_jax import Clip

    clip = Clip.from_pretrained(tmp_path / "model")
    np.testing.assert_allclose(clip.encode_image(case.images), out.image_embeds.detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(clip.encode_text(case.inputs["tokens"]), out.text_embeds.detach().numpy(), atol=1e-4)
    plain = case.outputs["image_embeds"]
    assert np.abs(out.image_embeds.detach().numpy() - plain).max() > 0.01


# --- wrappers before names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_gelu", "open_clip_custom_text", "convnext_v2_linear", "bert", "timm_vit", "icc", "icar"])
@pytest.mark.parametrize("wrapper", ["module.", "model._orig_mod.", "_orig_mod.module.model.", "_fsdp_wrapped_module.clip.",
                                     "base_model.model.model.", "_forward_module.net.module."])  # fmt: skip
def test_wrappers_are_removed_in_any_order(name, wrapper, tmp_path):
    case = parity_cases.load(name)
    within = {key.replace(".0.", ".0._checkpoint_wrapped_module.", 1): array for key, array in case.weights.items()}
    wrapped = dataclasses.replace(case, weights={wrapper + key: array for key, array in within.items()})
    opened = open_source(parity_cases.write_source(wrapped, tmp_path / "source"))
    assert opened.layout == case.layout and set(opened.tensors) == set(case.weights)
    for key, array in list(case.weights.items())[:3]:
        np.testing.assert_array_equal(opened.tensors[key].load(), array)


def test_an_unknown_name_is_said_with_its_wrapper(tmp_path):
    case = parity_cases.load("hf_gelu")
    weights = {f"model._orig_mod.{key}": array for key, array in (case.weights | {"extra.thing": np.ones(3)}).items()}
    source = parity_cases.write_source(dataclasses.replace(case, weights=weights), tmp_path / "source")
    with pytest.raises(ConvertError, match=r"unknown in the source: model\._orig_mod\.extra\.thing"):
        convert(source, tmp_path / "model")


# --- several state dicts -----------------------------------------------------------------------------------------------------


def two_states(folder, ema="model_ema", plain="model"):
    case = parity_cases.load("icc")
    other = {name: array + np.float32(1) for name, array in case.weights.items()}
    write_torch(folder / "icc.pt", {**case.extra, plain: case.weights, ema: other})
    return case, folder / "icc.pt"


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema", "ema_state_dict"])
@pytest.mark.parametrize("weights, added, hint", [("", 0, "--weights ema"), ("plain", 0, "--weights ema"),
                                                  ("ema", 1, "--weights plain")])  # fmt: skip
def test_the_weights_that_are_taken_are_said(ema, weights, added, hint, tmp_path):
    case, file = two_states(tmp_path, ema)
    report = convert(file, tmp_path / "model", Options(weights=weights))
    found = params(tmp_path / "model")["head"]["fc"]["bias"]
    np.testing.assert_allclose(found, case.weights["classifier.1.bias"] + added, rtol=1e-6)
    taken, left = (ema, "model") if added else ("model", ema)
    assert f"holds several state dicts: {taken} was taken, not {left} ({hint} takes the others)" in " ".join(report.notes)


def test_weights_that_are_not_there_are_refused(tmp_path):
    source = parity_cases.write_source(parity_cases.load("icc"), tmp_path / "one")
    with pytest.raises(ConvertError, match="holds no ema weights: expected tensors under state_dict_ema"):
        convert(source, tmp_path / "model", Options(weights="ema"))
    _, folder = base(tmp_path / "source")
    with pytest.raises(ConvertError, match="a safetensors file, which holds one state dict; leave --weights ema out"):
        convert(folder, tmp_path / "model", Options(weights="ema"))


def test_deepspeeds_state_dict_is_found(tmp_path):
    case = parity_cases.load("icc")
    write_torch(tmp_path / "mp_rank_00.pt", {**case.extra, "module": case.weights, "dp_world_size": 2})
    assert convert(tmp_path / "mp_rank_00.pt", tmp_path / "model").layout == "icc"

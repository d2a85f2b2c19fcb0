"""What `icar export` writes is opened by the libraries it is meant for, and computes the same there."""

import json
import sys

import numpy as np
import pytest

from icar_jax import checkpoint
from icar_jax.config import from_dict
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.parity.reference import declare_torchvision_operators
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.models.clip import Clip, ClipArch
from tests.support import parity_cases

pytestmark = pytest.mark.parity

CAPTIONS = ["a dog on a beach", "Two dogs, running!", "it's a café", "beach " * 40]


def exported(name, layout, tmp_path, tokenizer=""):
    case = parity_cases.load(name)
    source = parity_cases.write_source(case, tmp_path / "source")
    options = {k: v for k, v in case.options.items() if k != "exits" or name == "icar"}
    convert(source, tmp_path / "model", Options(**options, tokenizer=tokenizer))
    return case, export(tmp_path / "model", tmp_path / "out", layout).path


def close(found, expected):
    found = found.detach().numpy()
    found = found / np.linalg.norm(found, axis=-1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def pictures(case):
    import torch

    return torch.from_numpy(case.images.transpose(0, 3, 1, 2).copy())


def library(name):
    import torch

    if "torchvision" not in sys.modules:
        declare_torchvision_operators(torch)
    return __import__(name)


@pytest.mark.parametrize("name", ["hf_gelu", "hf_quick_gelu", "siglip", "open_clip_gelu"])
def test_transformers(name, tmp_path):
    import torch

    library("torchvision")
    from transformers import AutoImageProcessor, AutoModel

    case, folder = exported(name, "hf", tmp_path)
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    out = model.eval()(pixel_values=pictures(case), input_ids=torch.from_numpy(case.inputs["tokens"].astype(np.int64)))
    close(out.image_embeds, case.outputs["image_embeds"])
    close(out.text_embeds, case.outputs["text_embeds"])
    processor = AutoImageProcessor.from_pretrained(folder)
    ours = checkpoint.describe(tmp_path / "model")["preprocess"]
    assert list(processor.image_mean) == pytest.approx(ours["mean"]) and processor.do_center_crop == (
        ours["resize_mode"] == "crop"
    )


@pytest.mark.parametrize("name", ["open_clip_gelu", "open_clip_custom_text", "hf_gelu"])
def test_open_clip(name, tmp_path):
    import torch

    open_clip = library("open_clip")
    case, folder = exported(name, "open_clip", tmp_path)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    close(model.encode_image(pictures(case)), case.outputs["image_embeds"])
    close(model.encode_text(torch.from_numpy(case.inputs["tokens"].astype(np.int64))), case.outputs["text_embeds"])
    ours = checkpoint.describe(tmp_path / "model")["preprocess"]
    assert list(preprocess.transforms[-1].mean) == pytest.approx(ours["mean"])


@pytest.mark.parametrize("name", ["open_clip_xlm_roberta", "open_clip_bert"])
def test_open_clip_with_an_encoder(name, tmp_path):
    """The encoder's config is read by the name that the export writes: here a folder."""
    import torch

    open_clip = library("open_clip")
    case, folder = exported(name, "open_clip", tmp_path)
    config = json.loads((folder / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == "tiny-encoder" and text["context_length"] == case.inputs["tokens"].shape[1]
    text["hf_model_name"] = str(tmp_path / "source")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    close(model.encode_image(pictures(case)), case.outputs["image_embeds"])
    close(model.encode_text(torch.from_numpy(case.inputs["tokens"].astype(np.int64))), case.outputs["text_embeds"])


def test_openai(tmp_path):
    """OpenAI's own loader reads sizes from the state dict; open_clip carries the same reading."""
    import torch

    open_clip = library("open_clip")
    source, params = parity_cases.openai_source(tmp_path)
    convert(source, tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "out", "openai").path
    state = torch.load(folder / "model.pt", weights_only=True)
    model = open_clip.model.build_model_from_openai_state_dict(dict(state)).float()  # the loader rounds to float16
    model.load_state_dict({name: tensor for name, tensor in state.items() if tensor.is_floating_point()})
    clip = Clip.graph(from_dict(checkpoint.describe(tmp_path / "model")["arch"], ClipArch, "arch"))
    images = np.random.default_rng(0).standard_normal((2, 12, 12, 3)).astype(np.float32)
    tokens = np.array([[62, 5, 6, 63, 0, 0, 0, 0, 0, 0], [62, *range(1, 9), 63]], np.int32)
    close(model.encode_image(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())), clip.encode_image(params, images))
    close(model.encode_text(torch.from_numpy(tokens.astype(np.int64))), clip.encode_text(params, tokens))


@pytest.mark.parametrize("name", ["convnext_v1_linear", "convnext_v2_conv_mlp", "convnext_v1_conv_mlp"])
def test_timm(name, tmp_path):
    import torch
    from safetensors.torch import load_file

    library("timm")
    from timm.models.convnext import ConvNeXt

    case, folder = exported(name, "timm", tmp_path)
    arch = checkpoint.describe(tmp_path / "model")["arch"]
    v2, conv_mlp = arch["version"] == 2, "conv_mlp" in name
    model = ConvNeXt(depths=tuple(arch["depths"]), dims=tuple(arch["dims"]), num_classes=arch["num_classes"], conv_mlp=conv_mlp,
                     use_grn=v2, ls_init_value=None if v2 else 1e-6)  # fmt: skip
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        found = model.eval()(pictures(case)).numpy()
    np.testing.assert_allclose(found, case.outputs["logits" if arch["num_classes"] else "features"], atol=1e-4)


def test_icar_and_icc_files_hold_what_the_official_code_reads(tmp_path):
    import torch

    case, folder = exported("icar", "icar", tmp_path)
    content = torch.load(folder / "ICAR.pt", weights_only=True)
    assert content["config"] == {"model_name": "ViT-L-14", "pretrained": "laion2b_s32b_b82k", "early_exit_layer": 12}
    assert set(content["model_state_dict"]) == set(case.weights)
    case, folder = exported("icc", "icar", tmp_path / "icc")
    content = torch.load(folder / "ICC.pt", weights_only=True)
    assert set(content["state_dict"]) == set(case.weights)
    assert content["hparams"]["threshold"] == 0.43 and content["hparams"]["num_classes"] == 2


def clip_merges():
    library("open_clip")
    from icar_jax.convert.vocabulary import _installed_merges

    return _installed_merges()


def test_the_installed_merges_encode_as_open_clip_does():
    open_clip = library("open_clip")
    ours = Tokenizer.from_file(clip_merges())
    theirs = open_clip.get_tokenizer("ViT-B-32")
    np.testing.assert_array_equal(ours(CAPTIONS, 77), theirs(CAPTIONS).numpy())


def test_exported_tokenizer_files_encode_alike_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    from icar_jax.convert.tokenizers.hf_json import tokenizer_config, tokenizer_json
    from icar_jax.models.variants import CLIP

    for tokenizer in (Tokenizer.from_file(clip_merges()), Tokenizer.train(CAPTIONS, 300)):
        (tmp_path / "tokenizer.json").write_text(tokenizer_json(tokenizer))
        config = tokenizer_config(tokenizer, CLIP["vit_b32"].text)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        rows = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=77)["input_ids"]
        for ours, row in zip(tokenizer(CAPTIONS, 77).tolist(), rows, strict=True):
            length = ours.index(tokenizer.end_id) + 1  # behind the first end token nothing counts
            assert row[:length] == ours[:length] and row.index(tokenizer.end_id) == length - 1


@pytest.mark.parametrize("name", ["hf_vision_clip", "hf_vision_siglip", "hf_text_clip"])
def test_a_tower_alone(name, tmp_path):
    import torch

    library("torchvision")
    import transformers

    case, folder = exported(name, "hf", tmp_path)
    cls = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, loading = cls.from_pretrained(folder, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = (
        {"pixel_values": pictures(case)} if "vision" in name else {"input_ids": torch.from_numpy(case.inputs["tokens"]).long()}
    )
    out = model.eval()(**given)
    found = next(getattr(out, key) for key in ("image_embeds", "text_embeds", "pooler_output") if hasattr(out, key))
    np.testing.assert_allclose(found.detach().numpy(), case.outputs["features"], atol=1e-4)

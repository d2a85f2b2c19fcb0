"""Vision towers against transformers and timm: random weights at several sizes and, where at hand, a pretrained DINOv2."""

import json
import os
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from icar_jax import checkpoint
from icar_jax.config import from_dict
from icar_jax.convert.convert import Options, convert
from icar_jax.convert.export import export
from icar_jax.convert.layouts.timm_vit import _KNOWN
from icar_jax.convert.settings import choose_heads, choose_preprocess
from icar_jax.data.images import Preprocess
from icar_jax.models.vision import VisionArch, VisionTower
from tests.support import parity_cases

pytestmark = pytest.mark.parity

TOWERS = Path(os.environ.get("ICAR_JAX_TOWERS", ""))
DINOV2 = TOWERS / "dinov2_small"
needs_dinov2 = pytest.mark.skipif(
    "ICAR_JAX_TOWERS" not in os.environ or not DINOV2.is_dir(),
    reason="ICAR_JAX_TOWERS names no folder with dinov2_small/ (Dinov2Model of Hugging Face)",
)
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    from icar_jax.convert.parity.reference import declare_torchvision_operators

    declare_torchvision_operators(torch)
    return torch


def tower_of(folder):
    """(architecture, parameters) of a converted tower."""
    read = checkpoint.read(folder, "vision")
    return from_dict(read.description["arch"], VisionArch, "arch"), read.params["vision"]


def outputs(arch, params, images):
    """(embedding at full depth, all tokens after the last norm)."""
    graph = VisionTower.graph(arch)

    def run(params, images):
        made, tokens = graph(params, images, (arch.depth,), intermediates=True)
        return made[arch.depth], graph.merge(params).ln_post(tokens[f"blocks/{arch.depth - 1}"])

    return jax.jit(run)(params, images)


def require_same(found, expected, what):
    largest = np.abs(np.asarray(found) - expected.detach().numpy()).max()
    assert largest < 1e-4, (what, largest)


def pixels(torch, side, n=2):
    images = np.random.default_rng(side).standard_normal((n, side, side, 3)).astype(np.float32)
    return images, torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


# --- transformers ----------------------------------------------------------------------------------------------------------


def hf_model(name):
    import transformers

    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 14, "image_size": 126}
    dinov2 = {
        "dinov2": (transformers.Dinov2Model, transformers.Dinov2Config(**sizes)),
        "dinov2_swiglu": (transformers.Dinov2Model, transformers.Dinov2Config(**sizes, use_swiglu_ffn=True)),
        "dinov2_registers": (transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig(**sizes)),
        "vit": (transformers.ViTModel, transformers.ViTConfig(**sizes, intermediate_size=96)),
    }
    cls, config = dinov2[name]
    return cls(config)


@pytest.mark.parametrize("name", ["dinov2", "dinov2_swiglu", "dinov2_registers", "vit"])
def test_transformers_at_two_sizes(name, tmp_path, torch):
    from tests.fixtures.reference_tools import randomise

    model = randomise(hf_model(name), torch.Generator().manual_seed(3), compact=False)
    model.save_pretrained(tmp_path / "source")
    for side in (126, 70, 168):
        convert(tmp_path / "source", tmp_path / "out", Options(image_size=side, preprocess="imagenet"))
        ours, theirs = pixels(torch, side)
        with torch.no_grad():
            tokens = model(
                pixel_values=theirs, **({"interpolate_pos_encoding": True} if name == "vit" else {})
            ).last_hidden_state
        found, all_tokens = outputs(*tower_of(tmp_path / "out"), ours)
        require_same(found, tokens[:, 0], f"{name} {side} class token")
        require_same(all_tokens, tokens, f"{name} {side} tokens")


@pytest.mark.parametrize("name", ["hf_dinov2", "hf_dinov2_swiglu", "hf_dinov2_registers", "hf_vit"])
def test_transformers_opens_what_is_exported(name, tmp_path, torch):
    from transformers import AutoImageProcessor, AutoModel

    case = parity_cases.load(name)
    convert(parity_cases.write_source(case, tmp_path / "source"), tmp_path / "model", Options(**case.options))
    folder = export(tmp_path / "model", tmp_path / "out", "hf").path
    more = {"add_pooling_layer": False} if name == "hf_vit" else {}
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True, **more)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        tokens = model.eval()(pixel_values=torch.from_numpy(case.images.transpose(0, 3, 1, 2).copy())).last_hidden_state
    require_same(case.outputs["features_tokens"], tokens, name)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert list(processor.image_mean) == pytest.approx(checkpoint.describe(tmp_path / "model")["preprocess"]["mean"])


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (301, 224), (200, 200), (640, 428), (500, 375)])
def test_pixels_are_those_of_the_image_processor(size, tmp_path, torch):
    """Exactly those of its PIL version. torchvision's own resizing differs by a level in some values and by two in very few.

    Where an odd number of pixels is left over, transformers crops a pixel off torchvision's centre, which ours is; these sizes
    avoid that.
    """
    from transformers import BitImageProcessor
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    config = {"do_resize": True, "size": {"shortest_edge": 256}, "resample": 3, "do_center_crop": True, **IMAGENET}
    config |= {"crop_size": {"height": 224, "width": 224}, "do_rescale": True, "do_normalize": True}
    (tmp_path / "p.json").write_text(json.dumps(config))
    ours = choose_preprocess(str(tmp_path / "p.json"), None, 224, "here")
    assert ours == Preprocess(224, "crop", "bicubic", tuple(IMAGENET["image_mean"]), tuple(IMAGENET["image_std"]), 256)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    found = ours.resize(picture).astype(np.float64)

    def levels(processor):
        theirs = processor(**config)(images=picture, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        return 255 * (theirs * np.array(ours.std) + np.array(ours.mean))

    np.testing.assert_allclose(found, levels(BitImageProcessorPil), atol=1e-3)
    apart = np.abs(found - levels(BitImageProcessor))
    assert apart.max() < 2.01 and (apart > 1.01).mean() < 1e-4 and (apart > 0.01).mean() < 0.01


# --- timm ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm(torch):
    import timm

    return timm


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_small_patch14_dinov2", (126, 168)),
        ("vit_small_patch14_reg4_dinov2", (126, 84)),
        ("vit_tiny_patch16_224", (224, 160)),
        ("deit3_small_patch16_224", (224, 96)),
        ("vit_base_patch32_clip_quickgelu_224", (224, 128)),
    ],
)
def test_timm_at_two_sizes(name, sizes, tmp_path, torch, timm):
    """Models of the published sizes, saved as timm saves them: without the arguments that the name implies."""
    from safetensors.torch import save_file

    from tests.fixtures.reference_tools import randomise

    model = timm.create_model(name, pretrained=False, num_classes=5, img_size=sizes[0])
    randomise(model, torch.Generator().manual_seed(3), compact=False)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    pretrained = {**model.pretrained_cfg, "input_size": [3, sizes[0], sizes[0]]}
    config = {"architecture": name, "num_classes": 5, "num_features": model.num_features, "global_pool": model.global_pool}
    (tmp_path / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}, default=str))
    for side in sizes:
        convert(tmp_path, tmp_path / "out", Options(image_size=side))
        model.set_input_size(img_size=(side, side))
        ours, theirs = pixels(torch, side)
        with torch.no_grad():
            tokens = model.forward_features(theirs)
            pooled = model.forward_head(tokens, pre_logits=True)
        found, all_tokens = outputs(*tower_of(tmp_path / "out"), ours)
        require_same(found, pooled, f"{name} {side} pooled")
        require_same(all_tokens, tokens, f"{name} {side} tokens")


@pytest.mark.parametrize("name", ["timm_vit", "timm_dinov2", "timm_registers", "timm_mean", "timm_clip", "hf_dinov2_registers"])
def test_timm_opens_what_is_exported(name, tmp_path, torch, timm):
    case = parity_cases.load(name)
    convert(parity_cases.write_source(case, tmp_path / "source"), tmp_path / "model", Options(**case.options))
    folder = export(tmp_path / "model", tmp_path / "out", "timm").path
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        pooled = model(torch.from_numpy(case.images.transpose(0, 3, 1, 2).copy()))
    require_same(case.outputs["features"], pooled, name)
    data = timm.data.resolve_model_data_config(model)
    described = checkpoint.describe(tmp_path / "model")["preprocess"]
    assert list(data["mean"]) == described["mean"] and data["input_size"][1] == described["image_size"]


def test_architectures_that_are_taken_for_plain_are_plain(torch, timm):
    """What a name implies here is what timm builds: activation, epsilon, heads, and blocks of the usual kind."""
    from timm.models.vision_transformer import Block

    act = {"gelu": "GELU", "quick_gelu": "QuickGELU"}
    found = 0
    for name in timm.list_models():
        known = next(((a, eps) for pattern, a, eps in _KNOWN if re.fullmatch(pattern, name)), None)
        if known is None:
            continue
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, weight_init="skip")
        block = model.blocks[0]
        assert type(block) is Block and type(block.norm1).__name__ == "LayerNorm", name
        gated = block.mlp.fc1.out_features == 2 * block.mlp.fc2.in_features
        assert (type(block.mlp.act).__name__, block.norm1.eps) == ("SiLU" if gated else act[known[0]], known[1]), name
        assert not gated or (type(block.mlp).__name__ == "GluMlp" and not block.mlp.gate_last and "dinov2" in name), name
        heads = choose_heads(0, None, model.embed_dim, len(model.blocks), "vision", name)
        assert heads == block.attn.num_heads and block.attn.qkv.bias is not None, name
        found += 1
    assert found > 50


# --- a pretrained tower ----------------------------------------------------------------------------------------------------


@needs_dinov2
@pytest.mark.parametrize("side", [168, 224])
def test_a_pretrained_dinov2(side, tmp_path, torch):
    from transformers import AutoImageProcessor, Dinov2Model

    model = Dinov2Model.from_pretrained(DINOV2, dtype=torch.float32).eval()
    report = convert(DINOV2, tmp_path / "out", Options(image_size=side, exits=(6, 9)))
    assert report.description["preprocess"]["resize_to"] == round(side * 256 / 224)
    arch, params = tower_of(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(
        DINOV2, size={"shortest_edge": report.description["preprocess"]["resize_to"]}, crop_size={"height": side, "width": side}
    )
    x, y = np.meshgrid(np.linspace(0, 6, 320), np.linspace(0, 4, 240))
    waves = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(3 * y)], axis=-1)
    pictures = [Image.fromarray((127 + 120 * waves * s).astype(np.uint8)) for s in (1, 0.5)]
    theirs = processor(images=pictures, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        states = model(pixel_values=theirs, output_hidden_states=True)
    tokens = states.last_hidden_state
    same = theirs.numpy().transpose(0, 2, 3, 1)
    found, all_tokens = outputs(arch, params, same)
    require_same(found, tokens[:, 0], f"{side} class token")
    require_same(all_tokens, tokens, f"{side} tokens")
    after = jax.jit(lambda p, x: VisionTower.graph(arch)(p, x, (6,)))(params, same)[6]
    with torch.no_grad():
        require_same(after, model.layernorm(states.hidden_states[6][:, 0]), f"{side} after 6 blocks")
    # Our own pixels differ from the processor's by one level at most; the embedding's direction hardly moves.
    preprocess = Preprocess.from_dict(report.description["preprocess"])
    own = np.stack([preprocess.resize(p) for p in pictures]).astype(np.float32) / 255
    own = (own - np.array(preprocess.mean, np.float32)) / np.array(preprocess.std, np.float32)
    near, _ = outputs(arch, params, own.astype(np.float32))
    cosine = (near * found).sum(1) / np.linalg.norm(near, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.999

"""Vision towers that are refused: contradictory configurations, parts that no tower here has, damaged files."""

import json

import numpy as np
import pytest

from icar_jax.convert.convert import convert
from icar_jax.convert.fields import ConvertError
from tests.support import parity_cases
from tests.support.vision_sources import refusal, source_of


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hf_dinov2", {"model_type": "dinov3_vit"}, "describes a 'dinov3_vit' model"),
        ("hf_dinov2", {"model_type": "dinov2_with_registers"}, "describes a 'dinov2_with_registers' model"),
        ("hf_vit", {"model_type": "deit"}, "describes a 'deit' model, whose tower may compute otherwise"),
        ("hf_dinov2", {"hidden_size": 48}, "hidden_size: config.json says 48, the weights say 24"),
        ("hf_dinov2", {"num_hidden_layers": 3}, "num_hidden_layers: config.json says 3, the weights say 2"),
        ("hf_dinov2", {"image_size": 224}, "image_size // patch_size: config.json says 37, the weights say 2"),
        ("hf_dinov2", {"image_size": [12, 12]}, "image_size must be an integer"),
        ("hf_dinov2", {"mlp_ratio": 4}, "mlp_ratio, in channels: config.json says 96, the weights say 48"),
        ("hf_dinov2", {"use_swiglu_ffn": True}, "use_swiglu_ffn: config.json says True, the weights say False"),
        ("hf_dinov2_swiglu", {"mlp_ratio": 3}, "mlp_ratio, in channels: config.json says 32, the weights say 24"),
        ("hf_dinov2_registers", {"num_register_tokens": 4}, "num_register_tokens: config.json says 4, the weights say 3"),
        ("hf_dinov2", {"num_attention_heads": 5}, "5 heads do not divide the vision tower's width of 24"),
        ("hf_dinov2", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("hf_dinov2", {"qkv_bias": False}, "qkv_bias=false is not supported"),
        ("hf_dinov2", {"layer_norm_eps": -1}, "layer_norm_eps must be positive"),
        ("hf_vit", {"intermediate_size": 40}, "intermediate_size: config.json says 40, the weights say 36"),
        ("timm_vit", {"architecture": "vit_base_patch16_rpn_224"}, "which is not known to be a plain vision transformer"),
        ("timm_vit", {"architecture": "eva02_base_patch14_224"}, "which is not known to be a plain vision transformer"),
        ("timm_vit", {"architecture": ["x"]}, "architecture must be a text"),
        ("timm_vit", {"global_pool": "map"}, "global_pool 'map' is not supported"),
        ("timm_vit", {"global_pool": "avg"}, "global_pool 'avg' with the norm before pooling is not supported"),
        ("timm_vit", {"model_args": {"num_heads": 2, "block_fn": "ParallelScalingBlock"}}, "block_fn='ParallelScalingBlock'"),
        ("timm_vit", {"model_args": {"num_heads": 2, "qkv_bias": False}}, "qkv_bias=False"),
        ("timm_vit", {"model_args": {"num_heads": 2, "norm_layer": "rmsnorm"}}, "norm_layer='rmsnorm'"),
        ("timm_vit", {"model_args": {"num_heads": 2, "act_layer": "silu"}}, "act_layer 'silu' is not supported"),
        ("timm_vit", {"model_args": {"num_heads": 2, "depth": 3}}, "model_args.depth: config.json says 3, the weights say 2"),
        ("timm_vit", {"model_args": {"num_heads": 5}}, "5 heads do not divide"),
        ("timm_registers", {"architecture": "vit_base_patch16_224"}, "a gate of unknown kind"),
        ("timm_mean", {"global_pool": "token", "model_args": {"num_heads": 2}}, "'token', but there is no class token"),
        ("timm_vit", {"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode='border'"),
        ("timm_vit", {"pretrained_cfg": {"crop_pct": 1.1}}, "crop_pct=1.1"),
        ("timm_vit", {"pretrained_cfg": {"input_size": [3, 16, 24]}}, "input_size="),
        ("timm_vit", {"pretrained_cfg": {"interpolation": "nearest"}}, "interpolation='nearest'"),
        ("timm_vit", {"pretrained_cfg": {"crop_pct": 0.9}}, "preprocess.mean must be three numbers"),
    ],
)  # fmt: skip
def test_contradictory_and_hostile_configs_are_refused_by_name(name, change, message, tmp_path):
    assert message in refusal(name, tmp_path, config=change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"shortest_edge": 10}}, "crop_size="),
        ({"size": {"height": 14, "width": 14}}, "crop_size="),
        ({"resample": 0}, "resample=0"),
        ({"do_normalize": False}, "do_normalize=False"),
        ({"crop_size": {"height": 12, "width": 10}}, "crop_size must be one side or a square"),
    ],
)
def test_preprocessing_that_is_refused_by_name(change, message, tmp_path):
    assert message in refusal("hf_dinov2", tmp_path, preprocessor_config=change)


@pytest.mark.parametrize(
    ("name", "key", "shape", "message"),
    [
        ("timm_vit", "blocks.0.attn.q_norm.weight", (12,), "norms of queries and keys (qk_norm)"),
        ("timm_vit", "attn_pool.latent", (1, 1, 24), "an attention pool"),
        ("timm_vit", "dist_token", (1, 1, 24), "a distillation token"),
        ("timm_vit", "patch_embed.backbone.conv.weight", (8, 3, 7, 7), "a convolutional stem"),
        ("timm_vit", "blocks.0.attn.norm.weight", (24,), "a norm inside attention"),
        ("timm_vit", "mask_token", (1, 24), "the original DINOv2's names; get the weights from timm or Hugging Face"),
        ("timm_vit", "fc_norm.weight", (24,), "global_pool 'token' with the norm after pooling"),
        ("timm_vit", "rope.freqs", (24,), "unknown in the source: rope.freqs (24,)"),
        ("timm_vit", "blocks.0.ls2.gamma", (24,), "missing in the source: blocks.1.ls2.gamma"),
        ("timm_dinov2", "blocks.7.ls1.gamma", (24,), "model_args.depth: config.json says 2, the weights say 3"),
        ("hf_dinov2", "dinov2.encoder.layer.0.layer_scale3.lambda1", (24,), "unknown in the source: dinov2.encoder.layer.0."),
        ("hf_vit", "decoder.weight", (3, 24), "unknown in the source: decoder.weight (3, 24)"),
    ],
)  # fmt: skip
def test_parts_that_no_tower_here_has_are_named(name, key, shape, message, tmp_path):
    case = parity_cases.load(name)
    assert message in refusal(name, tmp_path, case.weights | {key: np.ones(shape, np.float32)})


@pytest.mark.parametrize("name", ["hf_dinov2", "timm_registers"])
def test_any_missing_weight_is_named(name, tmp_path):
    case = parity_cases.load(name)
    may_lack = ("mask_token", "classifier", "head.", "reg_token")  # without its registers it is another tower
    for key in case.weights:
        if any(part in key for part in may_lack):
            continue
        weights = {other: array for other, array in case.weights.items() if other != key}
        assert key in refusal(name, tmp_path, weights), key
    _, source = source_of("hf_dinov2", tmp_path / "bare")
    (source / "config.json").unlink()
    with pytest.raises(ConvertError, match="there is no config.json, so heads and activation are unknown"):
        convert(source, tmp_path / "no")


def test_positions_that_registers_have_too_are_refused(tmp_path):
    case = parity_cases.load("timm_registers")
    positions = np.ones((1, 4 + 5, 24), np.float32)  # 2 x 2 patches, the class token and four registers
    message = refusal("timm_registers", tmp_path, case.weights | {"pos_embed": positions})
    assert "model_args.img_size" in message or "positions for registers" in message
    uneven = refusal("timm_registers", tmp_path, case.weights | {"pos_embed": np.ones((1, 7 + 5, 24), np.float32)})
    assert "not a square grid" in uneven


def test_files_that_are_damaged_are_refused(tmp_path):
    case, source = source_of("hf_dinov2", tmp_path)
    (source / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConvertError, match="expected a JSON object"):
        convert(source, tmp_path / "no")
    broken = {**case.weights, "dinov2.encoder.layer.1.layer_scale2.lambda1": np.full(24, np.nan, np.float16)}
    assert "layer_scale2.lambda1" in refusal("hf_dinov2", tmp_path / "n", broken)
    huge = {**case.weights, "dinov2.encoder.layer.1.layer_scale2.lambda1": np.full(24, 1e38, np.float32),
            "dinov2.encoder.layer.1.mlp.fc2.bias": np.full(24, 1e38, np.float32)}  # fmt: skip
    assert "beyond float32" in refusal("hf_dinov2", tmp_path / "h", huge)

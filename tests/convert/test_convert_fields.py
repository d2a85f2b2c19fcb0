"""Every field of a configuration file counts: it is followed, or compared with the weights, or refused by name."""

import json

import pytest

from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError
from tests.support import parity_cases

HF, OPEN_CLIP = "config.json", "open_clip_config.json"


def source_with(name, file, tmp_path, change):
    source = parity_cases.write_source(parity_cases.load(name), tmp_path / "source")
    content = json.loads((source / file).read_text())
    change(content)
    (source / file).write_text(json.dumps(content))
    return source


def hf(name, tmp_path, section, **fields):
    """An HF source whose section says otherwise; None takes a field out."""

    def change(config):
        for field, value in fields.items():
            config[section].pop(field, None) if value is None else config[section].update({field: value})

    return source_with(name, HF, tmp_path, change)


def open_clip(tmp_path, section, **fields):
    def change(config):
        (config["model_cfg"][section] if section else config["model_cfg"]).update(fields)

    return source_with("open_clip_gelu", OPEN_CLIP, tmp_path, change)


def arch_of(source, tmp_path):
    return convert(source, tmp_path / "out", Options()).description["arch"]


@pytest.mark.parametrize("name", ["hf_gelu", "siglip"])
@pytest.mark.parametrize("section, field", [
    ("vision_config", "image_size"), ("vision_config", "patch_size"), ("vision_config", "hidden_size"),
    ("vision_config", "num_hidden_layers"), ("vision_config", "intermediate_size"), ("text_config", "hidden_size"),
    ("text_config", "num_hidden_layers"), ("text_config", "intermediate_size"), ("text_config", "vocab_size"),
    ("text_config", "max_position_embeddings"),
])  # fmt: skip
def test_a_size_of_hugging_face_that_the_weights_contradict_is_named(name, section, field, tmp_path):
    with pytest.raises(ConvertError, match=rf"{section}\.{field}"):
        arch_of(hf(name, tmp_path, section, **{field: 1001}), tmp_path)


@pytest.mark.parametrize("name, defaults", [
    ("hf_gelu", {"vision": (12, "quick_gelu", 1e-5), "text": (8, "quick_gelu", 1e-5)}),
    ("siglip", {"vision": (12, "gelu_tanh", 1e-6), "text": (12, "gelu_tanh", 1e-6)}),
])  # fmt: skip
@pytest.mark.parametrize("tower", ["vision", "text"])
def test_heads_activation_and_epsilon_are_followed_and_have_the_librarys_defaults(name, defaults, tower, tmp_path):
    section = f"{tower}_config"
    said = {"hidden_act": "gelu", "layer_norm_eps": 3e-4, "num_attention_heads": 1}
    arch = arch_of(hf(name, tmp_path / "said", section, **said), tmp_path / "said")[tower]
    assert (arch["activation"], arch["norm_eps"], arch["heads"]) == ("gelu", 3e-4, 1)
    heads, activation, eps = defaults[tower]
    left_out = {"hidden_act": None, "layer_norm_eps": None}
    arch = arch_of(hf(name, tmp_path / "default", section, **left_out), tmp_path / "default")[tower]
    assert (arch["activation"], arch["norm_eps"]) == (activation, eps)
    source = hf(name, tmp_path / "heads", section, num_attention_heads=None)
    if arch["width"] % heads:
        with pytest.raises(ConvertError, match=rf"\b{heads}\b"):
            arch_of(source, tmp_path / "heads")
    else:
        assert arch_of(source, tmp_path / "heads")[tower]["heads"] == heads


@pytest.mark.parametrize("section, field", [
    ("", "embed_dim"), ("vision_cfg", "width"), ("vision_cfg", "layers"), ("vision_cfg", "patch_size"),
    ("vision_cfg", "image_size"), ("text_cfg", "width"), ("text_cfg", "layers"), ("text_cfg", "context_length"),
    ("text_cfg", "vocab_size"),
])  # fmt: skip
def test_a_size_of_open_clip_that_the_weights_contradict_is_named(section, field, tmp_path):
    with pytest.raises(ConvertError, match=f"{section}.{field}" if section else field):
        arch_of(open_clip(tmp_path, section, **{field: 1001}), tmp_path)


BOTH = {
    "final_ln_after_pool": True, "qk_norm": True, "scaled_cosine_attn": True, "scale_heads": True, "scale_attn_inner": True,
    "scale_attn": True, "scale_fc": True, "ls_init_value": 0.1, "block_type": "custom",
}  # fmt: skip
VISION = BOTH | {
    "timm_model_name": "vit", "attentional_pool": True, "pool_type": "avg", "input_patchnorm": True, "no_ln_pre": True,
    "pos_embed_type": "sin_cos_2d",
}  # fmt: skip
TEXT = BOTH | {"hf_model_name": "bert", "pool_type": "first", "embed_cls": True, "proj_type": "mlp", "proj_bias": True}


@pytest.mark.parametrize("section, field, value", [
    *[("vision_cfg", *item) for item in VISION.items()], *[("text_cfg", *item) for item in TEXT.items()],
])  # fmt: skip
def test_a_tower_of_open_clip_that_computes_otherwise_is_refused(section, field, value, tmp_path):
    with pytest.raises(ConvertError, match=rf"{section} describes a tower that is not supported: {field}={value!r}"):
        arch_of(open_clip(tmp_path, section, **{field: value}), tmp_path)


@pytest.mark.parametrize("section, field, value", [
    *[(s, field, False) for s in ("vision_cfg", "text_cfg") for field, off in BOTH.items() if off is True],
    ("vision_cfg", "attentional_pool", False), ("vision_cfg", "input_patchnorm", False), ("vision_cfg", "no_ln_pre", False),
    ("vision_cfg", "pool_type", "tok"), ("vision_cfg", "pos_embed_type", "learnable"), ("vision_cfg", "timm_model_name", ""),
    ("text_cfg", "hf_model_name", ""), ("text_cfg", "embed_cls", False), ("text_cfg", "proj_type", "linear"),
    ("text_cfg", "proj_bias", False), ("text_cfg", "pool_type", "argmax"),
])  # fmt: skip
def test_what_open_clip_says_of_its_usual_tower_is_taken(section, field, value, tmp_path):
    plain = arch_of(open_clip(tmp_path / "plain", section), tmp_path / "plain")
    assert arch_of(open_clip(tmp_path / "said", section, **{field: value}), tmp_path / "said") == plain


def test_open_clips_heads_activation_and_epsilon_are_followed(tmp_path):
    def arch(name, section, **fields):
        return arch_of(open_clip(tmp_path / name, section, **fields), tmp_path / name)

    plain = arch("plain", "vision_cfg")
    width = plain["vision"]["width"]
    assert arch("head_width", "vision_cfg", head_width=width)["vision"]["heads"] == 1
    assert arch("heads", "text_cfg", heads=1)["text"]["heads"] == 1
    assert arch("eps", "vision_cfg", norm_kwargs={"eps": 2e-4})["vision"]["norm_eps"] == 2e-4 != plain["vision"]["norm_eps"]
    assert arch("text_eps", "text_cfg", norm_kwargs={"eps": 2e-4})["text"]["norm_eps"] == 2e-4
    assert arch("tanh", "vision_cfg", act_kwargs={"approximate": "tanh"})["vision"]["activation"] == "gelu_tanh"
    assert arch("none", "vision_cfg", act_kwargs={"approximate": "none"})["vision"]["activation"] == "gelu"
    quick = arch("quick", "", quick_gelu=True)
    assert quick["vision"]["activation"] == quick["text"]["activation"] == "quick_gelu"
    assert plain["text"]["causal"] and not arch("mask", "text_cfg", no_causal_mask=True)["text"]["causal"]
    assert arch("last", "text_cfg", pool_type="last")["text"]["pool"] == "last"

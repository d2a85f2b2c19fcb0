"""Configuration files that say otherwise than usual, or nonsense: followed where the library would, refused by name else."""

import dataclasses
import json

import pytest

from icar_jax.convert.convert import Options, convert
from icar_jax.convert.fields import ConvertError
from icar_jax.data.images import Preprocess
from tests.support import parity_cases


def source_of(name, folder):
    case = parity_cases.load(name)
    return case, parity_cases.write_source(case, folder / "source")


def edited(name, file, tmp_path, change):
    """The source of a case with one of its JSON files changed."""
    _, source = source_of(name, tmp_path)
    content = json.loads((source / file).read_text())
    change(content)
    (source / file).write_text(json.dumps(content))
    return source


def arch_of(source, dest, **options):
    return convert(source, dest, Options(**options)).description["arch"]


def test_another_model_under_the_same_names_is_refused(tmp_path):
    source = edited("hf_gelu", "config.json", tmp_path, lambda c: c.update(model_type="metaclip_2"))
    with pytest.raises(ConvertError, match="describes a 'metaclip_2' model"):
        convert(source, tmp_path / "out")
    siglip = edited("siglip", "config.json", tmp_path / "s", lambda c: c.update(model_type="siglip2"))
    with pytest.raises(ConvertError, match="NaFlex"):
        convert(siglip, tmp_path / "out")


def test_longclips_own_state_dict_is_refused_with_what_to_do(tmp_path):
    case = parity_cases.load("openai")
    rows = case.weights["positional_embedding"]
    longer = dataclasses.replace(case, weights={**case.weights, "positional_embedding_res": rows})
    with pytest.raises(ConvertError, match="LongCLIP's own state dict.*Hugging Face's layout, or write rows 20 and later"):
        convert(parity_cases.write_source(longer, tmp_path / "s"), tmp_path / "out")


def test_the_older_config_dicts_replace_the_newer_sections(tmp_path):
    """Fields they leave out fall back to the defaults, as the library has it."""

    def change(config):
        kept = {k: v for k, v in config["text_config"].items() if k != "hidden_act"}
        config["text_config_dict"] = kept

    source = edited("hf_gelu", "config.json", tmp_path, change)
    assert arch_of(source, tmp_path / "out")["text"]["activation"] == "quick_gelu"
    assert arch_of(source, tmp_path / "out")["vision"]["activation"] == "gelu"


@pytest.mark.parametrize(
    "value, outcome",
    [(None, "49407 lies outside"), ([65], 65), (2, "argmax"), ([1, 2], "must be an integer"), (65, 65), (9999, "lies outside")],
)
def test_end_tokens_of_hugging_face_configs(value, outcome, tmp_path):
    source = edited("hf_gelu", "config.json", tmp_path, lambda c: c["text_config"].update(eos_token_id=value))
    if isinstance(outcome, int) or outcome == "argmax":
        text = arch_of(source, tmp_path / "out")["text"]
        assert outcome in (text["end_id"], text["pool"])
    else:
        with pytest.raises(ConvertError, match=outcome):
            convert(source, tmp_path / "out")


def test_open_clips_own_end_token(tmp_path):
    change = lambda c: c["model_cfg"]["text_cfg"].update(pool_type="eos")
    text = arch_of(edited("open_clip_gelu", "open_clip_config.json", tmp_path, change), tmp_path / "out")["text"]
    assert (text["pool"], text["end_id"]) == ("end", 2)


@pytest.mark.parametrize("section", ["text_config", "vision_config"])
@pytest.mark.parametrize("field", ["layer_norm_eps", "num_attention_heads", "hidden_act", "hidden_size", ""])
@pytest.mark.parametrize("value", ["x", -1, 0, True, [], {}])
def test_values_of_a_wrong_type_are_named(section, field, value, tmp_path):
    def change(config):
        if field:
            config[section][field] = value
        else:
            config[section] = value

    if not field and value == {}:
        return  # an empty section is one of defaults
    source = edited("hf_gelu", "config.json", tmp_path, change)
    with pytest.raises(ConvertError, match=field or section):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("value", ["1", 1.0, True, -1, [12]])
def test_an_exit_that_is_no_block_number_is_refused(value, tmp_path):
    case = parity_cases.load("icar")
    extra = {**case.extra, "config": {**case.extra["config"], "early_exit_layer": value}}
    source = parity_cases.write_source(dataclasses.replace(case, extra=extra), tmp_path)
    with pytest.raises(ConvertError, match="early_exit_layer must be a block number"):
        convert(source, tmp_path / "out", Options(**case.options))


@pytest.mark.parametrize(
    "threshold, message", [(1.7, r"threshold must lie in \[0, 1\], found 1.7"), ("high", "must be a number")]
)
def test_a_classifiers_threshold_must_be_one(threshold, message, tmp_path):
    case = parity_cases.load("icc")
    extra = {**case.extra, "hparams": {**case.extra["hparams"], "threshold": threshold}}
    source = parity_cases.write_source(dataclasses.replace(case, extra=extra), tmp_path)
    with pytest.raises(ConvertError, match=message):
        convert(source, tmp_path / "out")
    bare = dataclasses.replace(case, extra={**case.extra, "hparams": {}})
    report = convert(parity_cases.write_source(bare, tmp_path), tmp_path / "out")
    assert "the classifier has no threshold" in report.notes[0] and "threshold" not in report.description


def test_flags_without_meaning_are_refused(tmp_path):
    _, timm = source_of("convnext_v2_linear", tmp_path / "t")
    with pytest.raises(ConvertError, match="has no use for --activation, --exits, --heads"):
        convert(timm, tmp_path / "out", Options(activation="gelu", exits=(1,), heads=(2, 2)))
    _, clip = source_of("hf_gelu", tmp_path / "c")
    with pytest.raises(ConvertError, match="pass --exits with it"):
        convert(clip, tmp_path / "out", Options(pool="banana"))
    with pytest.raises(ConvertError, match="--heads says 7 for the vision tower"):
        convert(clip, tmp_path / "out", Options(heads=(7, 7)))
    (tmp_path / "p.json").write_text(json.dumps({**Preprocess(224).to_dict()}))
    with pytest.raises(ConvertError, match="says 224 pixels, the model takes"):
        convert(clip, tmp_path / "out", Options(preprocess=str(tmp_path / "p.json")))


def test_a_crop_that_a_checkpoint_cannot_hold_is_noted(tmp_path):
    source = edited("convnext_v2_linear", "config.json", tmp_path, lambda c: c["pretrained_cfg"].update(crop_pct=0.875))
    assert "crop_pct" in convert(source, tmp_path / "out").notes[0]
    source = edited("convnext_v2_linear", "config.json", tmp_path, lambda c: c.update(model_args={"norm_eps": 1e-5}))
    with pytest.raises(ConvertError, match="a ConvNeXt that is not supported: norm_eps=1e-05"):
        convert(source, tmp_path / "out")

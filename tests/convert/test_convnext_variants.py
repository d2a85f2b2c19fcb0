"""ConvNeXts whose name or arguments change the network are refused by name, and the regressor of ratings goes in and out."""

import dataclasses
import json

import numpy as np
import pytest

from icar_jax import checkpoint
from icar_jax.convert.convert import convert
from icar_jax.convert.export import export
from icar_jax.convert.fields import ConvertError
from tests.support import parity_cases


def edited(folder, name="convnext_v2_linear", top=None, args=None):
    case = parity_cases.load(name)
    files = json.loads(json.dumps(case.files))
    files["config.json"] |= {**(top or {}), "model_args": args or {}}
    return parity_cases.write_source(dataclasses.replace(case, files=files), folder)


@pytest.mark.parametrize("name", ["convnext_xxlarge", "convnext_tiny_hnf", "convnext_nano_ols", "convnext_atto_rms",
                                  "convnext_large_mlp", "test_convnext3", "convnext_zepto_rms"])  # fmt: skip
def test_a_name_of_another_network_is_refused(name, tmp_path):
    with pytest.raises(ConvertError, match=f"names the architecture '{name}', whose activation, epsilon, stem or head"):
        convert(edited(tmp_path / "source", top={"architecture": name}), tmp_path / "out")


@pytest.mark.parametrize("args, said", [
    ({"act_layer": "gelu_tanh"}, "act_layer='gelu_tanh'"), ({"global_pool": "max"}, "global_pool='max'"),
    ({"output_stride": 16}, "output_stride=16"), ({"head_norm_first": True}, "head_norm_first=True"),
    ({"norm_eps": 1e-5}, "norm_eps=1e-05"), ({"norm_layer": "rmsnorm2d"}, "norm_layer='rmsnorm2d'"),
    ({"kernel_sizes": [7, 5, 5, 3]}, r"kernel_sizes=\[7, 5, 5, 3\]"), ({"stem_type": "overlap"}, "stem_type='overlap'"),
    ({"unheard_of": 1}, "unheard_of=1"),
])  # fmt: skip
def test_arguments_of_another_network_are_refused(args, said, tmp_path):
    with pytest.raises(ConvertError, match=f"describes a ConvNeXt that is not supported: {said}"):
        convert(edited(tmp_path / "source", args=args), tmp_path / "out")


def test_pooling_is_also_read_beside_the_arguments(tmp_path):
    with pytest.raises(ConvertError, match="global_pool='avgmax'"):
        convert(edited(tmp_path / "source", top={"global_pool": "avgmax"}), tmp_path / "out")


def test_usual_names_and_arguments_are_taken(tmp_path):
    args = {"norm_eps": 1e-6, "act_layer": "gelu", "drop_path_rate": 0.1, "conv_mlp": False, "depths": [1, 1, 2, 1]}
    for n, name in enumerate(("convnextv2_tiny", "convnextv2_tiny.fcmae_ft_in22k_in1k", "convnextv2_custom", "")):
        convert(edited(tmp_path / f"source{n}", top={"architecture": name, "global_pool": "avg"}, args=args), tmp_path / str(n))


def test_a_scorer_on_another_network_is_refused(tmp_path):
    case = parity_cases.load("icc")
    extra = {"hparams": case.extra["hparams"] | {"model_name": "convnext_xxlarge.clip_laion2b"}}
    with pytest.raises(ConvertError, match="hparams names the architecture 'convnext_xxlarge.clip_laion2b'"):
        convert(parity_cases.write_source(dataclasses.replace(case, extra=extra), tmp_path / "source"), tmp_path / "out")


def test_the_regressor_of_ratings(tmp_path):
    case = parity_cases.load("ic9600")
    report = convert(parity_cases.write_source(case, tmp_path / "source"), tmp_path / "model")
    assert (report.layout, report.description["arch"]["head"], report.description["arch"]["image_size"]) == (
        "ic9600", "regression", 512
    )  # fmt: skip
    assert report.description["preprocess"]["resize_mode"] == "squash" and not report.notes
    head = checkpoint.read(tmp_path / "model", "complexity").params["head"]
    for part, place in (("fc1", 1), ("fc2", 4), ("fc3", 7)):
        np.testing.assert_array_equal(head[part]["kernel"], case.weights[f"model.regressor.{place}.weight"].T)
    assert export(tmp_path / "model", tmp_path / "back", "icar").files == ["IC9600.pt", "README.md"]
    wrong = dataclasses.replace(case, weights=case.weights | {"model.regressor.7.weight": np.ones((2, 256), np.float32)})
    with pytest.raises(ConvertError, match="the regressor gives 2 values, expected 1"):
        convert(parity_cases.write_source(wrong, tmp_path / "wrong"), tmp_path / "out")

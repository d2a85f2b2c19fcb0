"""icar.json of a checkpoint and of a bundle: whatever is wrong ends in one line that names file and field, before shapes."""

import dataclasses
import json
import shutil
import time

import pytest

from icar_jax import checkpoint
from icar_jax.config import from_dict
from icar_jax.errors import ConfigError, IcarError
from icar_jax.inference.loading import load
from icar_jax.models.clip import ClipArch
from icar_jax.models.convnext import ConvNeXtArch
from icar_jax.models.vision import VisionArch
from tests.support import runs
from tests.support.small_clip import ARCH


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    vision = dataclasses.replace(ARCH.vision, embed_dim=24, depth=2, exits=(1,))
    return runs.random_clip(tmp_path_factory.mktemp("clip") / "model", vision)


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "model")


def edit(folder, *keys, value):
    """Sets the entry at `keys`; `...` as the value removes it."""
    file = folder / checkpoint.DESCRIPTION
    content = json.loads(file.read_text())
    *path, last = keys
    node = content
    for key in path:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    file.write_text(json.dumps(content))


def refusal(folder):
    began = time.perf_counter()
    with pytest.raises(IcarError) as error:
        load(folder)
    assert time.perf_counter() - began < 20 and len(str(error.value)) < 3000
    return str(error.value)


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 200_000, "", '{"format": 1', '{"format": [1], "kind": {}}'])
def test_what_is_no_description_is_refused(folder, text):
    (folder / checkpoint.DESCRIPTION).write_text(text)
    message = refusal(folder)
    assert "icar.json" in message and "\n" not in message


@pytest.mark.parametrize(
    "keys, value, fault",
    [
        (("arch",), [], "icar.json: arch must be an object"), (("arch",), ..., "icar.json: arch is missing"),
        (("arch",), None, "icar.json: arch is missing"), (("preprocess",), ..., "icar.json: preprocess is missing"),
        (("preprocess", "mean"), ["a", 0, 1], "preprocess.mean must be three numbers"),
        (("preprocess", "image_size"), 0, "preprocess.image_size must be a positive integer"),
        (("preprocess", "image_size"), 10**9, "preprocess.image_size must be a positive integer of at most"),
        (("arch", "vision"), 3, "arch.vision: expected an object, found 3"),
        (("arch", "vision", "depth"), 10**9, "arch.vision: depth=1000000000 must lie in 1 to 1,000"),
        (("arch", "vision", "depth"), 900, "the description says 900 blocks, the weights hold 2"),
        (("arch", "text", "depth"), 2, "text tower: the description says 2 blocks, the weights hold 1"),
        (("arch", "vision", "depth"), "2", "arch.vision.depth='2' must be of type int"),
        (("arch", "vision", "depth"), True, "arch.vision.depth=True must be of type int"),
        (("arch", "vision", "depth"), ..., "arch.vision: missing depth"),
        (("arch", "vision", "patch_size"), 0, "patch_size=0 must lie in 1 to"),
        (("arch", "vision", "width"), -24, "width=-24 must lie in 1 to"),
        (("arch", "vision", "heads"), 0, "heads=0 must lie in 1 to"), (("arch", "vision", "heads"), 5, "5 heads do not divide"),
        (("arch", "vision", "norm_eps"), float("nan"), "arch.vision.norm_eps=nan must be a finite number"),
        (("arch", "vision", "norm_eps"), 10**400, "arch.vision.norm_eps"), (("arch", "vision", "exits"), 1, "must be a tuple"),
        (("arch", "text", "vocabulary"), 10**24, "arch.text.vocabulary"),
        (("arch", "vision", "x"), 1, "arch.vision.x is no field"),
        (("hashes",), [], "icar.json: hashes must be an object"),
        (("hashes", "params.safetensors"), 3, "params.safetensors must be a text"),
        (("hashes", "../secret"), "x", "icar.json: hashes has an entry '../secret'"),
    ],
)  # fmt: skip
def test_the_field_is_named(folder, keys, value, fault):
    edit(folder, *keys, value=value)
    message = refusal(folder)
    assert fault in message and str(folder) in message


def test_a_bundle_names_its_routing(folder, tmp_path):
    bundle = checkpoint.write_bundle(tmp_path / "bundle", {"routing": {"exits": [1, 2], "thresholds": [0.5]}}, folder, folder)
    for value, fault in (
        (..., "routing is missing"), (None, "routing is missing"), ({}, "routing is missing"),
        ({"thresholds": []}, "routing: exits is missing"),
        ([], "routing must be an object"),
        ({"exits": [1, "a"], "thresholds": [0.5]}, "routing: exits[1] must be an integer, found 'a'"),
        ({"exits": [1, 2], "thresholds": [0.5, 0.6]}, "2 thresholds and 2 exits"),
        ({"exits": [1, 2], "thresholds": [None]}, "thresholds[0] is missing"),
    ):  # fmt: skip
        edit(bundle, "routing", value=value)
        with pytest.raises(IcarError, match="icar.json") as error:
            checkpoint.describe(bundle)["routing"]
        assert fault in str(error.value)
        edit(bundle, "routing", value={})


@pytest.mark.parametrize("values", [None, [], 3, "x"])
def test_an_architecture_is_an_object(values):
    with pytest.raises(ConfigError, match="^here: expected an object"):
        from_dict(values, VisionArch, "here")


def test_architectures_survive_json():
    for arch in (ARCH, ARCH.vision, ConvNeXtArch((1, 2, 3, 4), (8, 8, 8, 8))):
        assert from_dict(json.loads(json.dumps(dataclasses.asdict(arch))), type(arch), "arch") == arch
    assert isinstance(ARCH, ClipArch)

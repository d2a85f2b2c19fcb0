"""Weight files of every format read as what they hold; other files are refused with the reason."""

import json
import shutil
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import read_weights
from icar_jax.convert.files.torch_writer import write_torch
from tests.support.weightfiles import (
    EXPECTED,
    FILES,
    PLAIN,
    SCRIPTED,
    TORCH_FILES,
    assert_same,
    load_all,
    needs_torch,
    refusal,
    rewrite_zip,
    write_safetensors,
)

# Every format


@pytest.mark.parametrize("file", ["zip.pt", "legacy.bin"])
def test_torch_files_hold_what_torch_saved(file):
    weights = read_weights(FILES / file, "own")
    assert weights.kind == "torch" and weights.extra == {} and set(weights.tensors) == set(PLAIN)
    for name in PLAIN:
        assert_same(weights.tensors[name], EXPECTED[name])
    assert weights.tensors["bfloat16"].load().dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("file", ["script.pt", "trace.pt"])
def test_torchscript_parameters_are_found_by_attribute_path(file):
    weights = read_weights(FILES / file)
    assert weights.kind == "torchscript" and set(weights.tensors) == set(SCRIPTED)
    assert {"visual.conv1.weight", "visual.ids", "blocks.1.bias", "tied.bias", "logit_scale"} <= set(SCRIPTED)
    for name, tensor in weights.tensors.items():
        assert_same(tensor, EXPECTED[SCRIPTED[name]])
    assert weights.tensors["visual.conv1.weight"].dtype == "float16"


@pytest.mark.parametrize("file", ["nested.pt", "nested_legacy.bin"])
def test_state_dict_is_found_under_its_key_and_the_rest_is_plain(file):
    weights = read_weights(FILES / file, "own")
    assert list(weights.tensors) == ["float32", "float16", "int64"]
    for name, tensor in weights.tensors.items():
        assert tensor.name == name
        assert_same(tensor, EXPECTED[name])
    assert weights.extra == {
        "epoch": 3,
        "metrics": {"loss": 0.25, "history": [1, 2.5, None, "x", True]},
        "config": {"model_name": "ViT-tiny", "sizes": [16, 32], "nested": {"deep": [{"a": 1}]}},
    }


def test_untyped_storage_and_dtypes():
    assert_same(read_weights(FILES / "untyped.pt", "own").tensors["uint16"], EXPECTED["uint16"])


def test_safetensors_equals_the_library(tmp_path):
    arrays = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.int64),
        "flags": np.array([True, False]),
        "double": np.linspace(0, 1, 5),
    }
    save_file(arrays, tmp_path / "model.bin", {"format": "pt"})
    weights = read_weights(tmp_path / "model.bin")
    assert weights.kind == "safetensors" and set(weights.tensors) == set(arrays)
    for name, array in arrays.items():
        loaded = weights.tensors[name].load()
        assert (loaded.shape, loaded.dtype) == (array.shape, array.dtype) and loaded.tobytes() == array.tobytes()


def test_compressed_archives_and_any_file_name(tmp_path):
    rewrite_zip(FILES / "zip.pt", tmp_path / "weights.safetensors", compression=zipfile.ZIP_DEFLATED)
    for name, tensor in read_weights(tmp_path / "weights.safetensors", "own").tensors.items():
        assert_same(tensor, EXPECTED[name])


def test_loaded_arrays_stand_alone():
    tensor = read_weights(FILES / "zip.pt", "own").tensors["base"]
    tensor.load()[:] = 0
    assert_same(tensor, EXPECTED["base"])


@pytest.mark.parametrize("key", ["model_state_dict", "state_dict", "model", None])
def test_places_of_the_state_dict(tmp_path, key):
    state = {"a.weight": np.ones(2, np.float32)}
    write_torch(tmp_path / "x.pt", {"epoch": 2, "ema": {"b": np.zeros(1)}, **({key: state} if key else state)})
    weights = read_weights(tmp_path / "x.pt", "own")
    assert list(weights.tensors) == ["a.weight"] and weights.extra == {"epoch": 2, "ema": {}}


def test_first_of_several_state_dicts_wins(tmp_path):
    parts = {key: {f"{key}.w": np.ones(1)} for key in ("model", "state_dict", "model_state_dict")}
    write_torch(tmp_path / "x.pt", parts)
    assert list(read_weights(tmp_path / "x.pt", "own").tensors) == ["model_state_dict.w"]


def test_module_prefix_stays_where_not_every_name_has_it(tmp_path):
    write_torch(tmp_path / "x.pt", {"module.a": np.ones(1), "b": np.ones(1)})
    assert list(read_weights(tmp_path / "x.pt", "own").tensors) == ["module.a", "b"]


# Shards


@pytest.fixture
def shards(tmp_path):
    save_file({"module.a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    save_file({"module.b": np.zeros(3, np.float32)}, tmp_path / "two.safetensors")

    def write(weight_map):
        path = tmp_path / "model.safetensors.index.json"
        path.write_text(json.dumps({"metadata": {"total_size": 20}, "weight_map": weight_map}))
        return path

    return write


def test_shards_are_joined(shards, tmp_path):
    weights = read_weights(shards({"module.a": "one.safetensors", "module.b": "two.safetensors"}))
    assert weights.kind == "safetensors" and set(weights.tensors) == {"a", "b"}
    assert weights.tensors["b"].load().tolist() == [0, 0, 0]
    write_torch(tmp_path / "one.bin", {"a": np.ones(2)})
    assert read_weights(shards({"a": "one.bin"}), "own").kind == "torch"


def test_shards_that_disagree_with_the_index(shards, tmp_path):
    both = {"module.a": "one.safetensors", "module.b": "two.safetensors"}
    assert "shard 'three.safetensors' is not in" in refusal(shards({**both, "c": "three.safetensors"}))
    assert "two.safetensors lacks c" in refusal(shards({**both, "c": "two.safetensors"}))
    assert "two.safetensors holds module.b" in refusal(shards({"module.a": "one.safetensors", "c": "two.safetensors"}))
    assert "is not in" in refusal(shards({**both, "c": "../one.safetensors"}))
    write_torch(tmp_path / "three.bin", {"c": np.ones(2)})
    assert "different kinds: safetensors, torch" in refusal(shards({**both, "c": "three.bin"}))


# Other files


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b'{"error": "not found"}', "found error"),
        (b"[1, 2]", "found a list"),
        (b'{"error"', "cannot be parsed"),
        (b"\x1f\x8b\x08 and more bytes", "gzip"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "a tar archive"),
        (b"just text, no weights", "starts with b'just text"),
        (b"\x80\x02}q\x00.", "a pickle but not a torch file"),
    ],
)
def test_other_files_are_named(tmp_path, content, expected):
    (tmp_path / "model.bin").write_bytes(content)
    assert expected in refusal(tmp_path / "model.bin")


def test_missing_files_folders_and_readers(tmp_path):
    assert "does not exist" in refusal(tmp_path / "none.pt")
    assert "is a folder" in refusal(tmp_path)
    assert "unknown reader 'pickle'" in refusal(FILES / "zip.pt", "pickle")
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("a.npy", b"1")
    assert "found a.npy" in refusal(tmp_path / "x.npz")


def test_files_without_a_state_dict_list_their_keys(tmp_path):
    write_torch(tmp_path / "x.pt", {"epoch": 1, "towers": {"a": {"w": np.ones(1)}}})
    assert "found the keys epoch, towers" in refusal(tmp_path / "x.pt")
    write_torch(tmp_path / "x.pt", [np.ones(1)])
    assert "holds a list" in refusal(tmp_path / "x.pt")
    write_torch(tmp_path / "x.pt", {"state_dict": {"w": np.ones(1), "step": 3}})
    assert "more than named tensors: step" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "header, expected",
    [
        ({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, "needs 12 bytes, its offsets give 8"),
        ({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, "tensor 'w' ends at byte 16 of 8"),
        ({"w": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}, "tensor 'w' has dtype F4"),
        ({"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, "damaged header entry"),
        ({"w": {"dtype": "F32", "shape": [0, 1 << 61], "data_offsets": [0, 0]}}, "impossible shape"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, "leaves a gap"),
        ({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, "overlaps"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "4 bytes that belong to no tensor"),
        ({"w": 3}, "damaged header entry"),
        (b'{"w": 1, "w": 2}', "occurs twice"),
        (b'{"w": ' + b"[" * 100_000, "damaged or truncated"),
    ],
)
def test_safetensors_headers_are_checked(tmp_path, header, expected):
    assert expected in refusal(write_safetensors(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize("length", [31_520, 23_328])
def test_headers_whose_length_reads_like_json(tmp_path, length):
    """The files begin with ' {' and ' ['."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).ljust(length).encode()
    file = write_safetensors(tmp_path / "x.safetensors", header, np.ones(3, np.float32).tobytes())
    assert file.read_bytes().lstrip()[:1] in b"{[" and load_all(file)["a"].tolist() == [1, 1, 1]


def test_empty_safetensors(tmp_path):
    assert "holds no tensors" in refusal(write_safetensors(tmp_path / "x.safetensors", {"__metadata__": {"format": "pt"}}))


def test_a_file_that_shrinks_after_opening(tmp_path):
    shutil.copy(FILES / "expected.safetensors", tmp_path / "x.safetensors")
    tensors = read_weights(tmp_path / "x.safetensors").tensors
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ConvertError, match="truncated"):
        tensors["float32"].load()
    (tmp_path / "x.safetensors").unlink()
    with pytest.raises(ConvertError, match="float32.*cannot be read"):
        tensors["float32"].load()


# With torch


@pytest.mark.parity
@needs_torch
@pytest.mark.parametrize("file", TORCH_FILES)
def test_torch_and_own_reader_agree(file, monkeypatch):
    monkeypatch.setattr("icar_jax.convert.files.tensors._REMAP_AFTER", 10)
    theirs, ours = (read_weights(FILES / file, reader) for reader in ("torch", "own"))
    assert (theirs.kind, theirs.extra, list(theirs.tensors)) == (ours.kind, ours.extra, list(ours.tensors))
    for name in ours.tensors:
        assert_same(ours.tensors[name], theirs.tensors[name])
        assert_same(theirs.tensors[name], ours.tensors[name])


@pytest.mark.parity
@needs_torch
@pytest.mark.parametrize("file", ["script.pt", "trace.pt"])
def test_torchscript_names_are_those_of_torch(file):
    import torch

    state = torch.jit.load(FILES / file).state_dict()
    found = load_all(FILES / file)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].tobytes() == tensor.numpy().tobytes()

"""Files written in PyTorch's format without PyTorch, read back here and, where it is installed, by torch."""

import io
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files import torch_writer
from icar_jax.convert.files.tensors import read_weights
from icar_jax.convert.files.torch_writer import write_torch
from tests.support.weightfiles import EXPECTED, load_all, needs_torch


def values():
    rng = np.random.default_rng(0)
    return {
        "float32": rng.normal(size=(3, 4)).astype(np.float32),
        "float16": rng.normal(size=5).astype(np.float16),
        "bfloat16": rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16),
        "float64": rng.normal(size=2),
        "int64": np.arange(-3, 3),
        "int32": np.arange(4, dtype=np.int32),
        "uint8": np.arange(4, dtype=np.uint8),
        "bool": np.array([[True, False]]),
        "scalar": np.float32(4.6052),
        "empty": np.zeros((0, 7), np.float32),
        "transposed": rng.normal(size=(3, 4)).astype(np.float32).T,
        "tensor": EXPECTED["bfloat16"],
    }


SIZES = [1, -1, 255, 256, 65536, -(1 << 31), 1 << 40, -(1 << 40)]
NESTED = {"sizes": SIZES, "text": "é\n", "none": None, "pair": (True, 0.1), "d": {1: {}}}


@pytest.mark.parametrize("zip64", [False, True])
def test_written_files_come_back_bit_for_bit(tmp_path, monkeypatch, zip64):
    if zip64:
        # What files over 4 GiB need, in a small one: 64-bit sizes and offsets in both headers.
        monkeypatch.setattr(torch_writer, "_ZIP64_FROM", 0)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    write_torch(tmp_path / "x.pt", {"model_state_dict": values(), **NESTED})
    weights = read_weights(tmp_path / "x.pt", "own")
    assert weights.extra == {**NESTED, "pair": [True, 0.1]} and set(weights.tensors) == set(values())
    for name, array in values().items():
        loaded, array = weights.tensors[name].load(), np.asarray(array)
        assert (loaded.shape, loaded.dtype) == (array.shape, array.dtype) and loaded.tobytes() == array.tobytes()


def test_written_storages_are_aligned_shared_and_repeatable(tmp_path):
    array = np.arange(5, dtype=np.float32)
    for name in ("a.pt", "b.pt"):
        write_torch(tmp_path / name, OrderedDict(a=array, flag=np.array([True]), tied=array))
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
    content = (tmp_path / "a.pt").read_bytes()
    assert content.count(array.tobytes()) == 1 and content.index(array.tobytes()) % 64 == 0


def test_tensors_are_made_one_at_a_time(tmp_path):
    made = []

    class Lazy:
        shape, dtype = (2,), "bfloat16"

        def __array__(self, dtype=None, copy=None):
            made.append(self)
            return np.ones(2, ml_dtypes.bfloat16)

    wrong = Lazy()
    wrong.shape = (3,)
    write_torch(tmp_path / "x.pt", {"a": Lazy(), "b": Lazy()})
    assert len(made) == 2 and load_all(tmp_path / "x.pt")["b"].tolist() == [1, 1]
    with pytest.raises(ConvertError, match="announced as bfloat16"):
        write_torch(tmp_path / "y.pt", {"a": wrong})


@pytest.mark.parametrize(
    "value, expected",
    [({"a": [{1}]}, r"\['a'\]\[0\] is a set"), ({2.5: 1}, "key 2.5"), ({"w": np.array("x")}, "has dtype <U1")],
)
def test_values_that_cannot_be_written_are_named(tmp_path, value, expected):
    with pytest.raises(ConvertError, match=expected):
        write_torch(tmp_path / "x.pt", value)
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parity
@needs_torch
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("zip64", [False, True])
def test_torch_reads_what_is_written_here(tmp_path, monkeypatch, mmap, zip64):
    import torch

    if zip64:
        monkeypatch.setattr(torch_writer, "_ZIP64_FROM", 0)
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    write_torch(tmp_path / "x.pt", {"state": values(), **NESTED})
    loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
    state = loaded.pop("state")
    assert loaded == NESTED
    for name, array in values().items():
        array, found = np.asarray(array), state[name]
        assert (tuple(found.shape), str(found.dtype)) == (array.shape, f"torch.{array.dtype.name}") and found.is_contiguous()
        bits = found.reshape(-1).view(torch.uint8) if found.numel() else found
        assert bits.numpy().tobytes() == array.tobytes()
    again = io.BytesIO()
    torch.save(state, again)
    (tmp_path / "again.pt").write_bytes(again.getvalue())
    assert load_all(tmp_path / "again.pt")["bool"].tolist() == [[True, False]]

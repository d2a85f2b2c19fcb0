"""Weight files that state more than they hold: refused within bounds of time and memory, and what is valid is read."""

import gzip
import json
import os
import struct
import time
import tracemalloc
import zipfile
from contextlib import contextmanager

import numpy as np
import pytest
from safetensors.numpy import save

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.tensors import read_weights
from icar_jax.convert.parity.verify import read_reference
from icar_jax.data.tokenizer import Tokenizer
from icar_jax.errors import DataError
from icar_jax.files import limits
from icar_jax.files.arrays import read_npz
from tests.support.weightfiles import FILES, load_all, pickled_tensor, refusal, rewrite_zip, with_pickle


@contextmanager
def within(seconds: float, megabytes: float):
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        yield
        spent, peak = time.perf_counter() - begin, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert spent < seconds and peak < megabytes * 1e6, f"{spent:.1f} s, {peak / 1e6:.0f} MB"


# The bytes of these lengths spell ' {', ' [', 'PK' 3 4, a pickle of protocol 2, gzip, and a web page.
@pytest.mark.parametrize("length", [31520, 23328, 0x280, 0x480, 35615, 0x3C20])
def test_safetensors_headers_have_any_length(tmp_path, length):
    data = save({"a": np.arange(3, dtype=np.float32)})
    short = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + short] + b" " * (length - short)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", length) + header + data[8 + short :])
    assert load_all(tmp_path / "x.safetensors")["a"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "pickle",
    [
        b"\x80\2](" + b"N" * 100_000 + b"eq\x010(" + b"cbuiltins\nset\nh\1\x85R" * 200 + b"t.",  # copies of one list
        b"\x80\2)q\0" + b"h\0h\0\x86q\0" * 200 + b"}h\0K\1s.",  # a key of tuples of tuples, 2^200 of them
        b"\x80\2]q\0" + b"(h\0h\0h\0lq\0" * 300 + b".",
    ],
)
def test_a_pickle_of_shared_parts_ends(tmp_path, pickle):
    with_pickle(tmp_path / "x.pt", pickle)
    with within(5, 60):
        assert "x.pt" in refusal(tmp_path / "x.pt")


def test_a_member_that_unpacks_to_far_more_than_the_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "UNPACKED_BYTES", 1 << 20)
    swollen = lambda name, data: data + bytes(20 << 20) if name.endswith("data/0") else data
    rewrite_zip(FILES / "zip.pt", tmp_path / "x.pt", swollen, zipfile.ZIP_DEFLATED)
    with within(5, 10):
        assert "more than the limit of" in refusal(tmp_path / "x.pt")


def test_a_part_of_a_compressed_storage_is_unpacked_alone(tmp_path):
    pickle = b"\x80\2}(X\1\0\0\0w" + pickled_tensor(0, (2, 3), (3, 1)) + b"u."
    content = {"a/data.pkl": pickle, "a/data/0": np.arange(6, dtype=np.float32).tobytes()}
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    assert load_all(tmp_path / "x.pt")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_names_of_a_script_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "NAME_CHARACTERS", 10)
    assert "names of more than 10 characters" in refusal(FILES / "script.pt")


def _npz(path, shape, data=b"", compression=zipfile.ZIP_STORED):
    header = (repr({"descr": "<f4", "fortran_order": False, "shape": shape}) + "\n").encode()
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data)
    return path


@pytest.mark.parametrize("shape", [(10**12,), (2, 10**5, 10**5), (-1,), (5,), (True,), tuple([1] * 40), (1 << 70,), ("a",)])
def test_an_npz_that_claims_more_than_it_holds_takes_no_memory(tmp_path, shape):
    with within(2, 5), pytest.raises(ConvertError, match=r"x\.npz: expected an \.npz of plain arrays"):
        read_reference(_npz(tmp_path / "x.npz", shape, bytes(4)))


def test_an_npz_is_read_as_numpy_reads_it(tmp_path):
    arrays = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.arange(6).reshape(2, 3)), "s": np.array("text"),
              "e": np.zeros((0, 3), np.float32), "b": np.array([True, False])}  # fmt: skip
    for save_npz in (np.savez, np.savez_compressed):
        save_npz(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz", DataError, 1 << 20)
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    with pytest.raises(DataError, match="more than 10 bytes"):
        read_npz(tmp_path / "x.npz", DataError, 10)


def test_gzipped_merges_unpack_to_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TOKENIZER_BYTES", 1 << 20)
    (tmp_path / "merges.txt.gz").write_bytes(gzip.compress(bytes(50 << 20)))
    with within(5, 10), pytest.raises(DataError, match=r"merges\.txt\.gz: unpacks to more than the limit of 1,048,576 bytes"):
        Tokenizer.from_file(tmp_path / "merges.txt.gz")
    packed = gzip.compress(b"#version: 0.2\na b\n")
    for damaged in (packed[:-9], packed[:12] + b"\xff\xff" + packed[14:], packed[:3]):
        (tmp_path / "merges.txt.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"merges\.txt\.gz: not readable"):
            Tokenizer.from_file(tmp_path / "merges.txt.gz")


def test_weights_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ConvertError, match="expected a regular file, found a pipe"):
        read_weights(tmp_path / "model.safetensors")


def test_an_index_is_json_of_an_object(tmp_path):
    file = tmp_path / "model.safetensors.index.json"
    for text, fault in (("[" * 200_000, "nested deeper"), ("[]", "found a list"), ('{"weight_map": {"a": 3}}', "weight_map")):
        file.write_text(text)
        assert fault in refusal(file)
    file.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    assert "is not in" in refusal(file)

"""The own reader of PyTorch files: hostile, damaged and truncated files are refused, and nothing in a file is ever run."""

import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icar_jax.convert.files import torch_reader
from icar_jax.convert.files.tensors import read_weights
from tests.support.weightfiles import (
    EXPECTED,
    FILES,
    READABLE,
    assert_same,
    load_all,
    needs_torch,
    pickled_tensor,
    read_or_refuse,
    refusal,
    rewrite_zip,
    with_pickle,
)


@pytest.mark.parametrize("file", ["malicious.pt", "malicious_legacy.bin", "malicious.pkl"])
def test_code_is_refused_by_name_and_not_run(tmp_path, monkeypatch, file):
    monkeypatch.chdir(tmp_path)
    message = refusal(FILES / file)
    assert "mkdir" in message and "refused" in message and file in message
    assert not list(tmp_path.iterdir())


class Call:
    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("function, name", [(eval, "builtins.eval"), (Path, "pathlib"), (np.ones, "numpy")])
def test_any_other_name_is_refused(tmp_path, function, name):
    content = pickle.dumps({"a": Call(function, "1")}, protocol=2, fix_imports=False)
    with_pickle(tmp_path / "x.pt", content)
    assert f"its pickle names {name}" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "body",
    [
        b"(ios\nsystem\nX\x01\x00\x00\x00xo.",  # INST
        b"\x80\x02ctorch\nfloat32\n)R.",  # an allowed name that is no function
        b"\x80\x02ctorch\nSize\n)\x81.",  # an object of a name outside TorchScript
        b"\x80\x02c__torch__\nModel\n)\x81.",  # TorchScript in a plain file
        b"\x80\x02K\x01}b.",  # attributes set on a number
        b"\x80\x02r\xff\xff\xff\x7f.",  # memo of two thousand million entries
        b"\x80\x02X\xff\xff\xff\xffabc.",  # text longer than the file
        b"\x80\x02\x82\x01.",  # extension registry
        b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x02]" + b"q\x00(h\x00h\x00e" * 3 + b".",  # a list within itself
        b"\x80\x02)" + b"q\x00h\x00\x86" * 200 + b"}q\x01h\x00K\x01s.",  # hashing would never end
        b"\x80\x02}X\x01\x00\x00\x00aX\x07\x00\x00\x00storageQs.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",  # a memo entry of that number, which pickle.Unpickler makes room for
        b"\x80\x05\x96\x00\x00\x00\x80\x01\x00\x00\x00abc.",  # bytes longer than the file
        b"\x80\x04)" + b"q\x00h\x00\x86" * 200 + b"(h\x00\x91.",  # the same as an element of a set
        b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x7f" * 0x100000 + b".",  # an integer of a million bytes
        b"\x80\x02}\x8a\x08" + b"\x7f" * 8 + b"Ns.",  # keys that can be chosen to collide
        b"\x80\x02}(" + b"N" * 65 + b"tNs.",  # a key that takes long to hash
    ],
)
def test_hostile_pickles_are_refused(tmp_path, body):
    with_pickle(tmp_path / "x.pt", body)
    assert "x.pt" in refusal(tmp_path / "x.pt")


def test_shared_values_beside_the_state_dict_cannot_explode(tmp_path, monkeypatch):
    monkeypatch.setattr("icar_jax.convert.files.tensors._MOST_VALUES", 10_000)
    nested = [1]
    for _ in range(40):
        nested = [nested, nested]
    # write_torch would write every one of them out; pickle refers back.
    rest = b"X\x01\x00\x00\x00x" + pickle.dumps(nested, protocol=2)[2:-1]
    body = b"\x80\x02}(X\x01\x00\x00\x00w" + pickled_tensor(0, (6,), (1,)) + rest + b"u."
    with_pickle(tmp_path / "x.pt", body)
    assert "too many values" in refusal(tmp_path / "x.pt")


COPIES = {
    "set": b"cbuiltins\nset\nh\x01\x85R",
    "size": b"ctorch\nSize\nh\x01\x85R",
    "dict": b"ccollections\nOrderedDict\nh\x02\x85R",
    "encode": b"c_codecs\nencode\nh\x03X\x06\x00\x00\x00latin1\x86R",
}


@pytest.mark.parametrize("kind", COPIES)
def test_calls_cannot_copy_shared_values_again_and_again(tmp_path, kind):
    """A megabyte of pickle that would take 16 GB."""
    entries = b"".join(b"M" + number.to_bytes(2, "little") + b"N" for number in range(50_000))
    shared = b"](" + b"N" * 500_000 + b"eq\x010}(" + entries + b"uq\x020X\x20\xa1\x07\x00" + b"a" * 500_000 + b"q\x030"
    state = b"}(X\x01\x00\x00\x00w" + pickled_tensor(0, (6,), (1,)) + b"u."
    with_pickle(tmp_path / "x.pt", b"\x80\x02" + shared + b"(" + COPIES[kind] + b"t0" + state)
    assert list(load_all(tmp_path / "x.pt")) == ["w"]
    with_pickle(tmp_path / "x.pt", b"\x80\x02" + shared + b"(" + COPIES[kind] * 4000 + b"t0" + state)
    assert "copy the same values again and again" in refusal(tmp_path / "x.pt")


def test_pickles_have_a_length(tmp_path, monkeypatch):
    monkeypatch.setattr("icar_jax.convert.files.torch_pickle._MOST_OPCODES", 1000)
    with_pickle(tmp_path / "x.pt", b"\x80\x02(" + b"]" * 1000 + b"l.")
    assert "more than 1000 instructions" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("member", ["byteorder", "data.pkl"])
@pytest.mark.parametrize("reader", ["own", pytest.param("torch", marks=needs_torch)])
def test_structure_that_unpacks_to_more_than_a_bound_is_not_unpacked(tmp_path, monkeypatch, member, reader):
    monkeypatch.setitem(torch_reader._LARGEST_STRUCTURE, member, 4000)
    zeros = lambda name, data: bytes(4001) if name.endswith(member) else data
    rewrite_zip(FILES / "zip.pt", tmp_path / "x.pt", zeros, zipfile.ZIP_DEFLATED)
    assert f"{member} has 4001 bytes; expected at most 4000" in refusal(tmp_path / "x.pt", reader)


def test_frozen_torchscript_has_no_names():
    assert "no named tensors" in refusal(FILES / "frozen.pt")


def test_storages_must_be_there_and_whole(tmp_path):
    target = tmp_path / "x.pt"
    rewrite_zip(FILES / "zip.pt", target, lambda name, data: None if name.endswith("data/0") else data)
    assert "tensor 'float32' lies in storage '0', which the file lacks" in refusal(target)
    rewrite_zip(FILES / "zip.pt", target, lambda name, data: data[:-1] if name.endswith("data/0") else data)
    assert "tensor 'float32' expects a storage of 24 bytes, the file holds 23" in refusal(target)
    rewrite_zip(FILES / "zip.pt", target, lambda name, data: b"big" if name.endswith("byteorder") else data)
    assert "byte order b'big'" in refusal(target)
    for cut in (1, 9, 40):
        target.write_bytes((FILES / "legacy.bin").read_bytes()[:-cut])
        assert "x.pt: tensor '" in refusal(target)


@pytest.mark.parametrize(
    "offset, shape, stride, reason",
    [
        (0, (7,), (1,), "outside its storage"),
        (1, (6,), (1,), "outside its storage"),
        (0, (2, 2), (5, 1), "outside its storage"),
        (1, (2,), (-1,), "outside its storage"),
        (-1, (2,), (1,), "outside its storage"),
        (0, (-1,), (1,), "impossible shape"),
        (0, (1 << 40,), (0,), "impossible shape"),
        (0, (1,) * 65, (1,) * 65, "impossible shape"),
        (0, (1 << 70,), (0,), "no sensible number"),
        (0, (2,), (1, 1), "more strides than dimensions"),
    ],
)
def test_tensors_must_lie_within_their_storage(tmp_path, offset, shape, stride, reason):
    with_pickle(tmp_path / "x.pt", b"\x80\x02}X\x06\x00\x00\x00weight" + pickled_tensor(offset, shape, stride) + b"s.")
    assert reason in refusal(tmp_path / "x.pt")
    with_pickle(tmp_path / "x.pt", b"\x80\x02}X\x06\x00\x00\x00weight" + pickled_tensor(1, (2, 2), (3, 1)) + b"s.")
    flat = EXPECTED["float32"].load().reshape(-1)
    assert load_all(tmp_path / "x.pt")["weight"].tolist() == [[flat[1], flat[2]], [flat[4], flat[5]]]


@pytest.mark.parametrize("file", READABLE)
def test_truncated_files_are_refused(tmp_path, file):
    content, target = (FILES / file).read_bytes(), tmp_path / "cut"
    whole = {name: array.tobytes() for name, array in load_all(FILES / file).items()}
    rng = random.Random(file)
    for length in sorted({*rng.sample(range(len(content)), 60), len(content) - 1, 0, 1, 8, 9}):
        target.write_bytes(content[:length])
        found = read_or_refuse(target)
        # Only a cut within the archive comment, or what follows the last tensor, may go unnoticed.
        assert found is None or {name: array.tobytes() for name, array in found.items()} == whole


@pytest.mark.parametrize("file", READABLE)
def test_damaged_files_never_crash(tmp_path, file):
    content, target = (FILES / file).read_bytes(), tmp_path / "damaged"
    rng = random.Random(file)
    for _ in range(150):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(content))] = rng.randrange(256)
        target.write_bytes(damaged)
        read_or_refuse(target)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_pickle_is_read_or_refused(tmp_path_factory, body):
    target = tmp_path_factory.getbasetemp() / "any.pt"
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02" + body + b".")
    assert read_or_refuse(target) is None


@pytest.mark.parity
@needs_torch
def test_torch_refuses_what_is_no_tensor(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("malicious.pt", "malicious_legacy.bin"):
        message = refusal(FILES / file, "torch")
        assert "mkdir" in message and "refused" in message
    assert "refused" in refusal(FILES / "malicious.pkl", "torch")
    assert "TorchScript" in refusal(FILES / "script.pt", "torch")
    content = (FILES / "zip.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[:2000])
    assert "truncated" in refusal(tmp_path / "cut.pt", "torch")
    (tmp_path / "cut.bin").write_bytes((FILES / "legacy.bin").read_bytes()[:900])
    assert "cut.bin" in refusal(tmp_path / "cut.bin", "torch")
    rewrite_zip(FILES / "zip.pt", tmp_path / "small.pt", compression=zipfile.ZIP_DEFLATED)
    for name, tensor in read_weights(tmp_path / "small.pt", "torch").tensors.items():
        assert_same(tensor, EXPECTED[name])

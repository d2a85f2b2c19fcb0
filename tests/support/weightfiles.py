"""The PyTorch files of fixtures/torch, what they hold, and ways to damage them."""

import importlib.util
import json
import struct
import zipfile

import pytest

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files import torch_writer
from icar_jax.convert.files.tensors import read_weights
from tests.support.places import FIXTURES

FILES = FIXTURES / "torch"
EXPECTED = read_weights(FILES / "expected.safetensors").tensors
PLAIN = [name for name in EXPECTED if not name.startswith("script.") and name != "uint16"]
SCRIPTED = {name.removeprefix("script."): name for name in EXPECTED if name.startswith("script.")}
TORCH_FILES = ("zip.pt", "legacy.bin", "nested.pt", "nested_legacy.bin", "untyped.pt")
READABLE = (*TORCH_FILES, "script.pt", "trace.pt", "expected.safetensors")
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs the [parity] extra")


def assert_same(tensor, expected):
    array = tensor.load()
    assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
    assert (array.shape, array.dtype.name) == (tensor.shape, tensor.dtype)
    assert array.tobytes() == expected.load().tobytes()


def load_all(path, reader="own"):
    return {name: tensor.load() for name, tensor in read_weights(path, reader).tensors.items()}


def refusal(path, reader="own"):
    with pytest.raises(ConvertError) as error:
        load_all(path, reader)
    return str(error.value)


def write_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def rewrite_zip(source, dest, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Copies a zip; `change` gives each member's new bytes, None leaves it out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, "w", compression) as new:
        for name in old.namelist():
            if (data := change(name, old.read(name))) is not None:
                new.writestr(name, data)
    return dest


def with_pickle(dest, content):
    """zip.pt with another pickle in it; its storage 0 has six floats."""
    rewrite_zip(FILES / "zip.pt", dest, lambda name, data: content if name.endswith("data.pkl") else data)


def pickled_tensor(offset, shape, stride):
    """The opcodes of a tensor over storage 0, whatever its numbers."""
    numbers = [b"".join(map(torch_writer._integer, values)) for values in ((offset,), shape, stride)]
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(%b%b(%bt(%bt\x89ccollections\nOrderedDict\n)RtR" % (storage, *numbers)


def read_or_refuse(path):
    """Reads all there is; only ConvertError may stand in the way."""
    try:
        return load_all(path)
    except ConvertError:
        return None

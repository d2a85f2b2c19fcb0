"""Reads tensors and plain values of a PyTorch file without PyTorch, and nothing else.

Three containers are supported: the zip archive of torch >= 1.6, the older stream of pickles, and TorchScript archives. Their
pickles are interpreted opcode by opcode in torch_pickle.py: no name in a file is imported and nothing in a file is called.
Names outside a short list are refused. Values stay in the file until a tensor is read.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from icar_jax.convert.fields import ConvertError
from icar_jax.convert.files.torch_pickle import Script, StoredTensor, unpickle
from icar_jax.files import limits
from icar_jax.files.opening import open_regular

DTYPES = {
    name: np.dtype(getattr(np, name, None) or getattr(ml_dtypes, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
    )
}
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_LARGEST_STRUCTURE = {"data.pkl": 1 << 28, "byteorder": 64}  # bytes, unpacked
_SMALL_TENSOR = 1 << 26
_PIECE = 1 << 20
_LARGEST_DEPTH, _MOST_OBJECTS = 64, 1_000_000


@dataclass(frozen=True)
class Region:
    """The place of bytes: `nbytes` at `offset` of `path`, or, where `member` is set, a compressed member of that archive."""

    path: Path
    offset: int
    nbytes: int
    member: str = ""


@dataclass(frozen=True)
class Archive:
    """The members of a torch zip by name, without the folder that holds them all; `script` marks TorchScript."""

    path: Path
    members: dict[str, Region]
    script: bool


@dataclass(frozen=True)
class TorchFile:
    """`tree` is the saved object, with a StoredTensor for every tensor; for TorchScript its tensors by dotted path."""

    path: Path
    tree: Any
    storages: dict[str, Region]


def open_archive(path: str | os.PathLike) -> Archive:
    """The members of a torch zip. Raises ConvertError where it is truncated, damaged or not a torch file."""
    path = Path(path)
    return _guarded(path, lambda: _list_members(path))


def read_archive(archive: Archive) -> TorchFile:
    """The structure of a zip or TorchScript file. Raises ConvertError for content other than tensors and plain values."""
    path, members = archive.path, archive.members

    def read() -> TorchFile:
        order = _whole(members["byteorder"]).strip() if "byteorder" in members else b"little"
        if order != b"little":
            raise ConvertError(f"{path} has byte order {order[:16]!r}; save it again on a little-endian machine")
        tree = unpickle(BytesIO(_whole(members["data.pkl"])), path, script=archive.script)
        storages = {name.removeprefix("data/"): region for name, region in members.items() if name.startswith("data/")}
        return TorchFile(path, _script_tensors(tree, path) if archive.script else tree, storages)

    return _guarded(path, read)


def read_legacy(path: str | os.PathLike) -> TorchFile:
    """The structure of a file of torch < 1.6 (or its old format by request). Raises ConvertError as `read_archive` does."""
    path = Path(path)
    return _guarded(path, lambda: _read_legacy(path))


def loader(file: TorchFile, name: str, tensor: StoredTensor) -> Callable[[], np.ndarray]:
    """A function that reads the tensor, C-contiguous. Raises ConvertError unless it lies within its storage."""
    where = f"{file.path}: tensor {name!r}"
    storage, shape = tensor.storage, tensor.shape
    dtype, region = DTYPES[tensor.dtype], file.storages.get(storage.key)
    stored = storage.numel * DTYPES[storage.dtype].itemsize
    elements = size_of(shape, where, dtype, stored)
    if region is None:
        raise ConvertError(f"{where} lies in storage {storage.key!r}, which the file lacks; get the file again")
    if stored != region.nbytes:
        raise ConvertError(f"{where} expects a storage of {stored} bytes, the file holds {region.nbytes}; get the file again")
    strides = tuple(step if length > 1 else 0 for step, length in zip(tensor.stride, shape, strict=True))
    start = storage.base * DTYPES[storage.dtype].itemsize + tensor.offset * dtype.itemsize
    span = 1 + sum(step * (length - 1) for step, length in zip(strides, shape, strict=True)) if elements else 0
    if min(start, *strides, 0) < 0 or (elements and start + span * dtype.itemsize > stored):
        raise ConvertError(
            f"{where} of shape {shape}, strides {tensor.stride} and offset {tensor.offset} reaches outside its storage "
            f"of {stored} bytes; the file is damaged"
        )

    def load() -> np.ndarray:
        if region.member:
            raw = _part(region, start, span * dtype.itemsize, where)
        else:
            raw = read_bytes(region.path, region.offset + start, span * dtype.itemsize, where)
        flat = typed(raw, dtype)
        if elements == span and strides == _contiguous(shape):
            return flat.reshape(shape)
        steps = tuple(step * dtype.itemsize for step in strides)
        return np.lib.stride_tricks.as_strided(flat, shape, steps).copy()

    return load


def size_of(shape: tuple[int, ...], where: str, dtype: np.dtype, stored: int) -> int:
    """The number of elements of a shape that a file states for `stored` bytes. Raises ConvertError for an impossible one."""
    room = 1
    for length in shape:
        room *= max(length, 1)
    # An expanded tensor may be larger than its storage, but a tiny file must not take all of the memory.
    if len(shape) > 64 or min(shape, default=0) < 0 or room * dtype.itemsize > max(stored, _SMALL_TENSOR):
        raise ConvertError(f"{where} has the impossible shape {shape} over {stored} bytes; the file is damaged")
    return 0 if 0 in shape else room


def read_bytes(path: Path, offset: int, nbytes: int, where: str) -> np.ndarray:
    """`nbytes` of a file from `offset` as a new uint8 array. Raises ConvertError where the file is shorter."""
    out, done = np.empty(nbytes, np.uint8), 0
    # Read instead of mapped: pages of a mapped file stay counted as this process's memory until it is closed.
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(offset)
            while done < nbytes and (count := stream.readinto(memoryview(out)[done:])):
                done += count
    except OSError as error:
        raise ConvertError(f"{where} cannot be read: {error}") from error
    if done != nbytes:
        raise ConvertError(f"{where} needs {nbytes} bytes at {offset}, only {done} are there; the file is truncated")
    return out


def typed(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bytes as a flat array of `dtype`; for bool any byte but 0 is True."""
    return raw != 0 if dtype == np.bool_ else raw.view(dtype)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step if length > 1 else 0)
        step *= length
    return tuple(reversed(strides))


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    """The result of `read`. Raises ConvertError for every error that a damaged file can cause, MemoryError included."""
    try:
        return read()
    except ConvertError:
        raise
    except zipfile.BadZipFile as error:
        raise ConvertError(f"{path} is a truncated or damaged zip archive ({error}); get the file again") from error
    except EOFError as error:
        raise ConvertError(f"{path} ends too early; get the file again") from error
    except FileNotFoundError as error:
        raise ConvertError(f"{path} does not exist") from error
    # Broad on purpose: zipfile and the decoders of the standard library do not document what they raise.
    except Exception as error:
        text = f"{type(error).__name__}: {str(error)[:200]}"
        raise ConvertError(f"{path} is damaged or not a torch file ({text}); get the file again") from error


def _list_members(path: Path) -> Archive:
    with open_regular(path) as stream, zipfile.ZipFile(stream) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
    if len(infos) > limits.MEMBERS:
        raise ConvertError(f"{path} has {len(infos):,} members, more than the limit of {limits.MEMBERS:,}")
    roots = [info.filename.removesuffix("data.pkl") for info in infos if info.filename.endswith("/data.pkl")]
    roots = [root for root in roots if root.count("/") == 1]
    if len(roots) != 1:
        found = ", ".join(info.filename for info in infos[:5])
        raise ConvertError(f"{path} is a zip but not a torch file: expected one NAME/data.pkl, found {found or 'nothing'}")
    members, size = {}, path.stat().st_size
    with open(path, "rb") as stream:
        for info in infos:
            name = info.filename.removeprefix(roots[0])
            if name in members:
                raise ConvertError(f"{path} holds {info.filename} twice; get the file again")
            stream.seek(info.header_offset)
            header = stream.read(30)
            start = info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            if header[:4] != b"PK\x03\x04" or info.flag_bits & 1 or start + info.compress_size > size:
                raise ConvertError(f"{path}: {info.filename} is damaged or encrypted; get the file again")
            if info.compress_type == zipfile.ZIP_STORED and info.compress_size != info.file_size:
                raise ConvertError(f"{path}: {info.filename} has two sizes; get the file again")
            stored = info.compress_type == zipfile.ZIP_STORED
            members[name] = Region(path, start, info.file_size, "" if stored else info.filename)
    _require_bounded(path, infos, size)
    for name, most in _LARGEST_STRUCTURE.items():
        if name in members and members[name].nbytes > most:
            raise ConvertError(f"{path}: {name} has {members[name].nbytes} bytes; expected at most {most}")
    return Archive(path, members, script="constants.pkl" in members)


def _require_bounded(path: Path, infos: list[zipfile.ZipInfo], size: int) -> None:
    """Raises ConvertError where members share bytes of the file, or unpack to more than weights do."""
    packed = [info for info in infos if info.compress_type != zipfile.ZIP_STORED]
    if any(info.compress_type != zipfile.ZIP_DEFLATED for info in packed):
        raise ConvertError(f"{path} is compressed with another method than deflate; save it again uncompressed")
    if sum(info.compress_size for info in infos) > size:
        raise ConvertError(f"{path}: its members share the same bytes; get the file again")
    unpacked, most = sum(info.file_size for info in packed), max(limits.UNPACKED_SHARE * size, limits.UNPACKED_BYTES)
    if unpacked > most or any(info.file_size > limits.EXPANSION * info.compress_size for info in packed):
        raise ConvertError(
            f"{path}: its compressed members claim {unpacked:,} bytes, more than the limit of {most:,} for a file of {size:,} "
            "bytes; save it again uncompressed"
        )


def _whole(region: Region) -> bytes:
    """All bytes of a member. Checksums of stored members are not compared: torch can leave them out."""
    if not region.member:
        return read_bytes(region.path, region.offset, region.nbytes, str(region.path)).tobytes()

    def read() -> bytes:
        with zipfile.ZipFile(region.path) as archive:
            return archive.read(region.member)

    return _guarded(region.path, read)


def _part(region: Region, start: int, nbytes: int, where: str) -> np.ndarray:
    """`nbytes` of a compressed member from `start`; what lies before is unpacked piece by piece and dropped."""
    out, done = np.empty(nbytes, np.uint8), 0

    def read() -> None:
        nonlocal done
        with zipfile.ZipFile(region.path) as archive, archive.open(region.member) as stream:
            left = start
            while left and (piece := stream.read(min(left, _PIECE))):
                left -= len(piece)
            while done < nbytes and (piece := stream.read(min(nbytes - done, _PIECE))):
                out[done : done + len(piece)] = np.frombuffer(piece, np.uint8)
                done += len(piece)

    _guarded(region.path, read)
    if done != nbytes:
        raise ConvertError(f"{where} needs {nbytes} bytes of {region.member}, only {done} are there; get the file again")
    return out


def _read_legacy(path: Path) -> TorchFile:
    with open_regular(path) as stream:
        if unpickle(stream, path) != _MAGIC:
            raise ConvertError(f"{path} is a pickle but not a torch file; expected a file of torch.save")
        if (version := unpickle(stream, path)) != _PROTOCOL:
            raise ConvertError(f"{path} has torch protocol {version!r}; expected {_PROTOCOL}")
        system = unpickle(stream, path)
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise ConvertError(f"{path} was not saved on a little-endian machine; save it again on one")
        seen: dict[str, Any] = {}
        tree = unpickle(stream, path, storages=seen)
        keys, storages = unpickle(stream, path), {}
        size = path.stat().st_size
        for key in keys if isinstance(keys, list) else ():
            if len(head := stream.read(8)) < 8:
                break
            count, start = int.from_bytes(head, "little", signed=True), stream.tell()
            storage = seen.get(str(key))
            # A truncated storage keeps the length that exists, so that the error can name the tensor that needs more.
            nbytes = min(count * DTYPES[storage.dtype].itemsize, size - start) if storage else -1
            if nbytes < 0:
                raise ConvertError(f"{path}: storage {str(key)[:40]!r} is damaged; get the file again")
            storages[str(key)] = Region(path, start, nbytes)
            stream.seek(start + nbytes)
    return TorchFile(path, tree, storages)


def _script_tensors(root: Any, path: Path) -> dict[str, StoredTensor]:
    """Parameters and buffers of a TorchScript module, by the names of its state_dict."""
    found: dict[str, StoredTensor] = {}
    budget, letters = [_MOST_OBJECTS], [limits.NAME_CHARACTERS]

    def walk(node: Any, prefix: str, depth: int) -> None:
        budget[0] -= 1
        if depth > _LARGEST_DEPTH or budget[0] < 0:
            raise ConvertError(f"{path}: modules nested too deep or in a circle at {prefix[:80]!r}; the file is damaged")
        if isinstance(node, Script):
            children = node.attributes.items()
        elif isinstance(node, dict):
            children = node.items()
        else:
            children = enumerate(node)
        for key, value in children:
            # Lists and dicts of tensors are attributes, not parameters: torch leaves them out of a state_dict too.
            letters[0] -= len(prefix) + len(str(key))  # names grow with the depth, and parts may be shared
            if letters[0] < 0:
                raise ConvertError(f"{path}: names of more than {limits.NAME_CHARACTERS:,} characters; the file is damaged")
            if isinstance(value, StoredTensor) and isinstance(node, Script):
                found[f"{prefix}{key}"] = value
            elif isinstance(value, Script | dict | list | tuple):
                walk(value, f"{prefix}{key}.", depth + 1)

    if not isinstance(root, Script):
        raise ConvertError(f"{path} is a TorchScript archive that holds no module; expected a scripted or traced model")
    walk(root, "", 0)
    if not found:
        raise ConvertError(f"{path}: this TorchScript module has no named tensors (frozen?); save it again without freezing")
    return found

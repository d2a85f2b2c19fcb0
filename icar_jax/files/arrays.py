"""Reads .npy and .npz files of plain arrays; headers are compared with the bytes that are there before memory is taken."""

from __future__ import annotations

import math
import os
import tokenize
import zipfile
import zlib
from typing import IO, Literal

import numpy as np

from icar_jax.errors import IcarError
from icar_jax.files import limits
from icar_jax.files.opening import open_regular

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: str | os.PathLike, error: type[IcarError], most: int) -> dict[str, np.ndarray]:
    """{name: array} of an .npz without pickled objects, of at most `most` bytes unpacked.

    Raises `error`, naming the file and the member, for anything else; a member that claims more numbers than it holds takes no
    memory.
    """
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
            if len(infos) > limits.MEMBERS or sum(info.file_size for info in infos) > most:
                raise ValueError(f"more than {most:,} bytes, or {limits.MEMBERS:,} arrays")
            return {info.filename.removesuffix(".npy"): _member(archive, info) for info in infos}
    # NotImplementedError is an unknown compression, RuntimeError a password.
    except (
        OSError,
        ValueError,
        EOFError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as fault:
        raise error(f"{os.fspath(path)}: expected an .npz of plain arrays ({str(fault)[:200]})") from fault


def map_npy(path: str | os.PathLike, error: type[IcarError]) -> np.memmap | np.ndarray:
    """The array of an .npy file, mapped read-only. Raises `error`, naming the file, for anything else and other lengths."""
    try:
        with open_regular(path) as file:
            shape, fortran, dtype = _header(file, "the file")
            start, there = file.tell(), os.fstat(file.fileno()).st_size - file.tell()
            if (needed := math.prod(shape) * dtype.itemsize) != there:
                raise ValueError(f"shape {str(shape)[:100]} and {dtype} need {needed:,} bytes, it holds {there:,}")
            order: Literal["F", "C"] = "F" if fortran else "C"
            # A mapping cannot be empty.
            return np.memmap(file, dtype, "r", start, shape, order) if needed else np.empty(shape, dtype, order)
    except (OSError, ValueError, OverflowError) as fault:
        raise error(f"{os.fspath(path)}: expected an .npy of a plain array ({str(fault)[:200]})") from fault


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    if info.file_size > limits.EXPANSION * max(info.compress_size, 1):
        raise ValueError(f"{info.filename} claims {info.file_size:,} bytes of {info.compress_size:,} compressed ones")
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream, info.filename)
        needed = math.prod(shape) * dtype.itemsize
        there = info.file_size - stream.tell()
        if needed != there:
            raise ValueError(
                f"{info.filename} of shape {str(shape)[:100]} and {dtype} needs {needed:,} bytes, it holds {there:,}"
            )
        data = stream.read(needed)
        if len(data) != needed:
            raise EOFError(f"{info.filename} ends too early")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C").copy()


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise ValueError(f"{name} has format version {version}; expected 1.0 or 2.0")
    try:
        shape, fortran, dtype = _HEADERS[version](stream)
    # numpy parses the header as Python's literals, and does not catch everything that the parser raises.
    except (SyntaxError, tokenize.TokenError, TypeError, RecursionError, MemoryError) as fault:
        raise ValueError(f"{name} has a damaged header: {str(fault)[:100]}") from fault
    plain = not dtype.hasobject and len(shape) <= 32 and all(type(length) is int and length >= 0 for length in shape)
    if not plain:
        raise ValueError(f"{name} is no plain array: shape {str(shape)[:100]}, {dtype}")
    return shape, fortran, dtype

"""An interpreter for the pickles inside PyTorch files that knows tensors and plain values, and cannot call anything.

Not pickle.Unpickler with find_class: a dict key of shared tuples keeps it hashing forever, a memo index of 3e8 takes 5 GB.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from icar_jax.convert.fields import ConvertError

_NAMED = {
    **{"Float": "float32", "Double": "float64", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32"},
    **{"Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"},
    **{"ComplexFloat": "complex64", "ComplexDouble": "complex128"},
}
_STORAGES = {f"torch.{place}{name}Storage": dtype for place in ("", "cuda.") for name, dtype in _NAMED.items()} | {
    "torch.storage.UntypedStorage": "uint8",
    "torch.UntypedStorage": "uint8",
}
_DTYPES = {f"torch.{name}": name for name in (*_NAMED.values(), "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")}
_TENSOR, _TENSOR_V2, _TENSOR_V3 = (f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3"))
_PARAMETERS = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
_DICTS = {"collections.OrderedDict", "collections.Counter"}
_SEQUENCES = {"torch.Size", "builtins.set", "__builtin__.set"}
_SCRIPT_LISTS = {
    f"torch.jit._pickle.{name}"
    for name in ("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist", "restore_type_tag")
}
_CALLS = {_TENSOR, _TENSOR_V2, _TENSOR_V3, "torch.device", "_codecs.encode"} | _PARAMETERS | _DICTS | _SEQUENCES
_PUSHED = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PLAIN = (str, int, float, bytes, type(None))
# Bounds on time and memory. Calls may copy as many elements as the pickle has pushed, and as many shared ones besides.
_MOST_OPCODES, _SPARE_ELEMENTS = 1 << 23, 1 << 20
_LONGEST_KEY, _INTEGER_BITS, _KEY_BITS = 64, 1024, 60


@dataclass(frozen=True)
class Name:
    """The name of a global in a pickle, as text; nothing of that name is looked up in this process."""

    name: str


@dataclass(frozen=True)
class Storage:
    """`numel` elements of `dtype` under `key` in the file; `base` elements are skipped before a tensor's own offset."""

    key: str
    dtype: str
    numel: int
    base: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor before it is read; offset and strides are in elements and not yet checked."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str


@dataclass
class Script:
    """An object of a TorchScript archive: its class name and attributes; its code is never read."""

    name: str
    attributes: dict[str, Any] = field(default_factory=dict)


class _Malformed(ValueError):
    """The pickle does something that no torch file does."""


def unpickle(stream: BinaryIO, path: Path, script: bool = False, storages: dict[str, Storage] | None = None) -> Any:
    """The object in the next pickle of `stream`, which stops right behind it. OrderedDicts become dicts, tensors StoredTensor.

    `storages`, if given, receives every storage that the pickle refers to, by key. With `script`, classes of TorchScript code
    become Script objects. Time and memory are bounded by the length of the pickle. Raises ConvertError for a name that is not
    allowed; ValueError, IndexError, KeyError or TypeError for a malformed pickle.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    room = _SPARE_ELEMENTS  # elements and characters that calls may still copy

    def to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if count == _MOST_OPCODES:
            raise _Malformed(f"more than {_MOST_OPCODES} instructions")
        name = opcode.name
        room += 1
        if name in _PUSHED:
            if isinstance(argument, int) and argument.bit_length() > _INTEGER_BITS:
                raise _Malformed(f"an integer of more than {_INTEGER_BITS} bits")
            room += len(argument) if isinstance(argument, str | bytes | bytearray) else 0
            stack.append(argument)
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name in ("EMPTY_LIST", "EMPTY_SET"):
            stack.append([])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(to_mark())
        elif name == "DICT":
            stack.append(_fill({}, to_mark()))
        elif name == "APPEND":
            item = stack.pop()
            _expect(stack[-1], list).append(item)
        elif name in ("APPENDS", "ADDITEMS"):
            items = to_mark()
            _expect(stack[-1], list).extend(items)
        elif name == "SETITEM":
            items = [stack.pop(-2), stack.pop()]
            _fill(stack[-1], items)
        elif name == "SETITEMS":
            items = to_mark()
            _fill(stack[-1], items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            text = ".".join(argument.split(" ", 1) if name == "GLOBAL" else [stack.pop(-2), stack.pop()])
            _require_allowed(text, path, script)
            stack.append(Name(text))
        elif name == "REDUCE":
            arguments, called = _expect(stack.pop(), tuple), _expect(stack.pop(), Name).name
            if called not in _SCRIPT_LISTS:  # these return their argument itself
                room -= sum(len(part) for part in arguments if isinstance(part, str | tuple | list | dict))
                if room < 0:
                    raise _Malformed("calls that copy the same values again and again")
            stack.append(_rebuild(called, arguments))
        elif name == "NEWOBJ":
            _expect(stack.pop(), tuple)
            stack.append(_new(_expect(stack.pop(), Name).name))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Script):
                # A class with its own __setstate__ may have saved anything; only attributes by name can be weights.
                stack[-1].attributes.update(state if isinstance(state, dict) else {})
            else:
                # A state_dict's _metadata, or attributes set on a tensor: neither is weights.
                _expect(stack[-1], dict, StoredTensor)
        elif name == "BINPERSID":
            storage = _storage(_expect(stack.pop(), tuple))
            if storages is not None:
                storages.setdefault(storage.key, storage)
            stack.append(storage)
        elif name == "POP":
            stack.pop()
        elif name == "STOP":
            break
        elif name == "INST":
            _refuse(argument.replace(" ", ".", 1), path)
        elif name not in ("PROTO", "FRAME"):
            raise _Malformed(f"unexpected opcode {name}")
    return stack.pop()


def _expect(value: Any, *kinds: type) -> Any:
    if not isinstance(value, kinds):
        raise _Malformed(f"expected {kinds[0].__name__}, found {type(value).__name__}")
    return value


def _fill(target: Any, items: list[Any]) -> dict:
    _expect(target, dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Hashing a tuple of shared tuples would never end; large integers can be chosen to have equal hashes.
        parts = key if isinstance(key, tuple) else (key,)
        if len(parts) > _LONGEST_KEY or not all(isinstance(part, _PLAIN) for part in parts):
            raise _Malformed(f"expected a plain dict key, found {type(key).__name__}")
        if any(isinstance(part, int) and part.bit_length() > _KEY_BITS for part in parts):
            raise _Malformed(f"a dict key of more than {_KEY_BITS} bits")
        target[key] = value
    return target


def _require_allowed(name: str, path: Path, script: bool) -> None:
    known = name in _CALLS or name in _STORAGES or name in _DTYPES
    if not known and not (script and (name in _SCRIPT_LISTS or name.startswith("__torch__."))):
        _refuse(name, path)


def _refuse(name: str, path: Path) -> None:
    raise ConvertError(
        f"{path} was refused: its pickle names {name[:200]}, where only tensors and plain values are allowed, and loading it "
        "in full could run code; save the state dict alone (torch.save(model.state_dict(), ...)) or as .safetensors"
    )


def _new(name: str) -> Script:
    if not name.startswith("__torch__."):
        raise _Malformed(f"an object of {name}")
    return Script(name)


def _rebuild(name: str, arguments: tuple) -> Any:
    """The plain value that stands for a call of `name`."""
    if name in (_TENSOR, _TENSOR_V2, _TENSOR_V3):
        storage, offset, shape, stride, *rest = arguments
        dtype = _expect(storage, Storage).dtype
        if name == _TENSOR_V3:
            dtype = _DTYPES[_expect(rest[2], Name).name]
        flags = rest[3 if name == _TENSOR_V3 else 2 :]
        if any(flags[0].values() if flags and flags[0] else ()):
            raise _Malformed("a tensor saved as conjugated or negated")
        shape, stride = _integers(shape), _integers(stride)
        if len(shape) != len(stride):
            raise _Malformed("a tensor with more strides than dimensions, or fewer")
        return StoredTensor(storage, _integers((offset,))[0], shape, stride, dtype)
    if name in _PARAMETERS:
        return _expect(arguments[0], StoredTensor)
    if name in _DICTS:
        content = arguments[0] if arguments else []
        if isinstance(content, dict):
            return dict(content)
        return _fill({}, [part for pair in _expect(content, list, tuple) for part in _pair(pair)])
    if name in _SEQUENCES:
        content = _expect(arguments[0] if arguments else (), list, tuple)
        return tuple(content) if name == "torch.Size" else list(content)
    if name == "torch.device":
        return Name(name)
    if name == "_codecs.encode":
        # Protocol 2 writes bytes like this.
        return _expect(arguments[0], str).encode("latin1")
    if name in _SCRIPT_LISTS:
        return arguments[0]
    raise _Malformed(f"a call of {name}")


def _pair(pair: Any) -> tuple[Any, Any]:
    key, value = _expect(pair, list, tuple)
    return key, value


def _integers(values: Any) -> tuple[int, ...]:
    values = tuple(_expect(values, tuple, list))
    if any(type(value) is not int or abs(value) >= 1 << 62 for value in values):
        raise _Malformed("a tensor's shape, stride or offset is no sensible number")
    return values


def _storage(saved: tuple) -> Storage:
    kind, storage_type, key, _, numel, *view = saved
    dtype = _STORAGES.get(_expect(storage_type, Name).name)
    if kind not in ("storage", b"storage") or dtype is None:
        raise _Malformed("a reference to something other than a storage")
    # Files of torch before 0.4 refer to a part of a storage as (its key, offset, length).
    base = view[0][1] if view and view[0] is not None else 0
    numel, base = _integers((numel, base))
    if min(numel, base) < 0:
        raise _Malformed("a storage of negative size")
    return Storage(str(_expect(key, str, int)), dtype, numel, base)

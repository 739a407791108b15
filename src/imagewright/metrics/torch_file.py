"""Reading a state dict written by `torch.save` without executing the pickle inside it.

A pickle is a program. Here its opcodes are only listed (`pickletools.genops`) and a machine of our own
follows the few that plain dictionaries of tensors need; no import, no call and no attribute of the program's
choosing ever happens. Whatever else a file asks for is refused by name.

Source     the layouts written by torch.save: a zip archive with `data.pkl` and `data/<key>` (since torch
           1.6), and the older sequence of pickles followed by raw storages.
"""

from __future__ import annotations

import io
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagewright.types import UserError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_DICT = "collections OrderedDict"
_TENSOR = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"


@dataclass(frozen=True)
class _Global:
    name: str  # "module attribute", one of those above


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _View:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Refused(Exception):  # noqa: N818, a finding about a file, not an error of the program
    """The file asks for something that a dictionary of tensors does not need."""


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d state dict, by name, on the CPU.

    key: where it lies in a file of several, such as "ema", or "state.ema" for a dictionary in another.
    Raises UserError naming the file when it is missing, damaged, no flat dictionary of tensors, or asks for
    any global beyond OrderedDict, the plain storages and the tensor rebuild function.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        state, storage = _open_zip(content) if zipfile.is_zipfile(io.BytesIO(content)) else _open_legacy(content)
        for part in key.split(".") if key else ():
            if not isinstance(state, dict) or part not in state:
                raise _Refused(f"it has no {key!r}; {_keys(state)}")
            state = state[part]
        if not isinstance(state, dict):
            raise _Refused(f"its content is no dictionary of tensors but {_describe(state)}")
        nested = [name for name, value in state.items() if isinstance(value, dict) and value]
        if nested:
            raise _Refused(f"it holds several dictionaries; name one with --key: {', '.join(map(str, nested[:10]))}")
        return {_name(key): _tensor(key, value, storage) for key, value in state.items()}
    except _Refused as error:
        raise UserError(f"{path} was refused: {error}") from None
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        struct.error,
        zipfile.BadZipFile,
        RuntimeError,
    ) as error:
        raise UserError(f"{path} is no readable torch.save file: {error}") from None


def _keys(state: Any) -> str:
    if not isinstance(state, dict):
        return f"there is {_describe(state)}"
    return f"there are {', '.join(map(str, list(state)[:10])) or 'none'}"


# --- the two layouts ----------------------------------------------------------------------------------------


def _open_zip(content: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
    archive = zipfile.ZipFile(io.BytesIO(content))
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise _Refused(f"a torch archive holds one data.pkl, this one {len(names)}")
    prefix = names[0].removesuffix("data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise _Refused("its entries are compressed, which torch.save never does")
    if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
        raise _Refused("it was written with big-endian byte order")
    return _evaluate(io.BytesIO(archive.read(names[0]))), lambda s: archive.read(f"{prefix}data/{s.key}")


def _open_legacy(content: bytes) -> tuple[Any, Callable[[_Storage], bytes]]:
    file = io.BytesIO(content)
    if _evaluate(file) != _LEGACY_MAGIC or _evaluate(file) != _LEGACY_PROTOCOL:
        raise _Refused("it does not start like a torch.save file")
    system = _evaluate(file)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise _Refused("it was not written with little-endian byte order")
    found: dict[str, _Storage] = {}
    state = _evaluate(file, found)
    raw: dict[str, bytes] = {}
    for key in _evaluate(file):
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != found[key].numel:
            raise _Refused(f"storage {key} has {numel} elements where {found[key].numel} were announced")
        raw[key] = file.read(numel * found[key].dtype.itemsize)
    return state, lambda s: raw[s.key]


# --- from described to real ---------------------------------------------------------------------------------


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise _Refused(f"the key {key!r} is no name")
    return key


def _tensor(key: str, value: Any, read: Callable[[_Storage], bytes]) -> Tensor:
    if not isinstance(value, _View):
        raise _Refused(f"the entry {key} is no tensor but {_describe(value)}")
    storage = value.storage
    raw = read(storage)
    if len(raw) != storage.numel * storage.dtype.itemsize:
        raise _Refused(f"the data of {key} has {len(raw)} bytes, expected {storage.numel} x {storage.dtype}")
    if len(value.shape) != len(value.stride) or min((*value.shape, *value.stride, value.offset), default=0) < 0:
        raise _Refused(f"the entry {key} has shape {value.shape} with strides {value.stride}")
    last = value.offset + sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
    if 0 in value.shape:
        return torch.empty(value.shape, dtype=storage.dtype)
    if last >= storage.numel:
        raise _Refused(f"the entry {key} reaches beyond its storage of {storage.numel} elements")
    assert sys.byteorder == "little"
    flat = torch.frombuffer(bytearray(raw), dtype=storage.dtype)
    return flat.as_strided(value.shape, value.stride, value.offset).clone(memory_format=torch.contiguous_format)


def _describe(value: Any) -> str:
    return value.name.replace(" ", ".") if isinstance(value, _Global) else f"a {type(value).__name__}"


# --- the machine --------------------------------------------------------------------------------------------

_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _evaluate(file: io.BytesIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Follow one pickle from the file's position to its STOP; storages met are noted by key."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages

    def since_mark() -> list[Any]:
        at = max(i for i, entry in enumerate(stack) if entry is _MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for name, argument in _opcodes(file):
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            stack.append(argument)
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(since_mark()))
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(tuple(reversed(items)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("APPEND", "APPENDS"):
            items = since_mark() if name == "APPENDS" else [stack.pop()]
            _expect(stack[-1], list, name).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            _expect(stack[-1], dict, name).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_global(f"{module} {attribute}"))
        elif name == "BINPERSID":
            storage = _persistent(stack.pop())
            storages[storage.key] = storage
            stack.append(storage)
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_reduce(function, arguments))
        elif name == "BUILD":
            stack.pop()  # a state dict's attributes (_metadata); the tensors do not need them
            _expect(stack[-1], dict, name)
        else:
            raise _Refused(f"it uses the pickle operation {name}, which a dictionary of tensors does not need")
    raise _Refused("its pickle has no end")


def _opcodes(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(file):
        yield opcode.name, argument


def _expect(value: Any, kind: type, operation: str) -> Any:
    if not isinstance(value, kind):
        raise _Refused(f"it applies {operation} to {_describe(value)}")
    return value


def _global(name: str) -> _Global:
    if name not in _STORAGES and name not in (_DICT, _TENSOR, _PARAMETER):
        raise _Refused(f"it asks for {name.replace(' ', '.')}, which a dictionary of tensors does not need")
    return _Global(name)


def _persistent(identity: Any) -> _Storage:
    tag, kind, key, _, numel, *view = _expect(identity, tuple, "BINPERSID")
    if tag != "storage" or not isinstance(kind, _Global) or kind.name not in _STORAGES or any(view):
        raise _Refused(f"it holds a storage of an unknown kind: {identity!r}")
    if not isinstance(numel, int) or numel < 0:
        raise _Refused(f"storage {key!r} announces {numel!r} elements")
    return _Storage(_STORAGES[kind.name], _name(key), numel)


def _reduce(function: Any, arguments: Any) -> Any:
    arguments = _expect(arguments, tuple, "REDUCE")
    if function == _Global(_DICT) and arguments in ((), ([],)):
        return {}
    if function == _Global(_TENSOR):
        storage, offset, shape, stride, *_ = arguments  # then requires_grad and hooks, which reading does not need
        if isinstance(storage, _Storage) and all(isinstance(n, int) for n in (offset, *shape, *stride)):
            return _View(storage, offset, tuple(shape), tuple(stride))
    if function == _Global(_PARAMETER) and isinstance(arguments[0], _View):
        return arguments[0]
    raise _Refused(f"it calls {_describe(function)} with arguments that no tensor has")

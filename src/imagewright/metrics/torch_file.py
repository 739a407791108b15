"""Reading a state dict written by `torch.save` without executing the pickle inside it.

A pickle is a program. Here its opcodes are only listed (`pickletools.genops`) and a machine of our own
follows the few that plain dictionaries of tensors need; no import, no call and no attribute of the program's
choosing ever happens. Whatever else a file asks for is refused by name.

Source     the layouts written by torch.save: a zip archive with `data.pkl` and `data/<key>` (since torch
           1.6), and the older sequence of pickles followed by raw storages.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from imagewright import limits
from imagewright.arrays import require_finite
from imagewright.files import open_regular
from imagewright.shapes import brief
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

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, each element once."""
        return math.prod(self.shape) * self.storage.dtype.itemsize


class _Refused(Exception):  # noqa: N818, a finding about a file, not an error of the program
    """The file asks for something that a dictionary of tensors does not need."""


def read_state_dict(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """The tensors of a `torch.save`d state dict, by name, on the CPU.

    key: where it lies in a file of several, such as "ema", or "state.ema" for a dictionary in another.
    Raises UserError naming the file when it is missing, damaged, no flat dictionary of tensors, or asks for
    any global beyond OrderedDict, the plain storages and the tensor rebuild function.
    """
    with open_regular(path) as file:
        state = _read(path, file, key)
    require_finite(path, state)
    return state


def _read(path: Path, file: BinaryIO, key: str | None) -> dict[str, Tensor]:
    size = file.seek(0, 2)
    file.seek(0)
    try:
        state, storage = _open_zip(file) if zipfile.is_zipfile(file) else _open_legacy(file)
        for part in key.split(".") if key else ():
            if not isinstance(state, dict) or part not in state:
                raise _Refused(f"it has no {key!r}; {_keys(state)}")
            state = state[part]
        if not isinstance(state, dict):
            raise _Refused(f"its content is no dictionary of tensors but {_describe(state)}")
        nested = [name for name, value in state.items() if isinstance(value, dict) and value]
        if nested:
            raise _Refused(f"it holds several dictionaries; name one with --key: {', '.join(map(_word, nested[:10]))}")
        views = {_name(key): _view(key, value) for key, value in state.items()}
        if sum(view.nbytes for view in views.values()) > limits.EXPANSION * size:
            raise _Refused(f"its tensors would take over {limits.EXPANSION} times the file's {size} bytes")
        read = _Storages(storage)
        return {key: _tensor(key, view, read) for key, view in views.items()}
    except _Refused as error:
        raise UserError(f"{path} was refused: {error}") from None
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
        RuntimeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise UserError(f"{path} is no readable torch.save file: {error}") from None


def _keys(state: Any) -> str:
    if not isinstance(state, dict):
        return f"there is {_describe(state)}"
    return f"there are {', '.join(_word(name) for name in list(state)[:10]) or 'none'}"


# --- the two layouts ----------------------------------------------------------------------------------------


def _open_zip(file: BinaryIO) -> tuple[Any, Callable[[_Storage], bytes]]:
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise _Refused(f"a torch archive holds one data.pkl, this one {len(names)}")
    prefix = names[0].removesuffix("data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise _Refused("its entries are compressed, which torch.save never does")
    if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
        raise _Refused("it was written with big-endian byte order")
    if archive.getinfo(names[0]).file_size > limits.PICKLE_BYTES:
        raise _Refused(f"its data.pkl has over {limits.PICKLE_BYTES} bytes")
    return _evaluate(io.BytesIO(archive.read(names[0]))), lambda s: archive.read(f"{prefix}data/{s.key}")


def _open_legacy(file: BinaryIO) -> tuple[Any, Callable[[_Storage], bytes]]:
    file.seek(0)
    if _evaluate(file) != _LEGACY_MAGIC or _evaluate(file) != _LEGACY_PROTOCOL:
        raise _Refused("it does not start like a torch.save file")
    system = _evaluate(file)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise _Refused("it was not written with little-endian byte order")
    found: dict[str, _Storage] = {}
    state = _evaluate(file, found)
    raw: dict[str, bytes] = {}
    for key in _expect(_evaluate(file), list, "the list of storages"):
        if not isinstance(key, str) or key not in found or key in raw:
            raise _Refused(f"it lists a storage {brief(key)} that its tensors do not have, or lists it twice")
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != found[key].numel:
            raise _Refused(f"storage {brief(key)} has {numel} elements where {found[key].numel} were announced")
        raw[key] = file.read(numel * found[key].dtype.itemsize)
    return state, lambda s: raw[s.key]


# --- from described to real ---------------------------------------------------------------------------------


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise _Refused(f"the key {brief(key)} is no name")
    return key


def _view(key: str, value: Any) -> _View:
    """The entry as a tensor that lies within its storage."""
    if not isinstance(value, _View):
        raise _Refused(f"the entry {_word(key)} is no tensor but {_describe(value)}")
    if len(value.shape) != len(value.stride) or min((*value.shape, *value.stride, value.offset), default=0) < 0:
        raise _Refused(f"the entry {_word(key)} has shape {value.shape[:8]} with strides {value.stride[:8]}")
    last = value.offset + sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
    if 0 not in value.shape and last >= value.storage.numel:
        raise _Refused(f"the entry {_word(key)} reaches beyond its storage of {value.storage.numel} elements")
    return value


class _Storages:
    """Storages by key, each read once, as flat tensors."""

    def __init__(self, read: Callable[[_Storage], bytes]) -> None:
        self._read, self._known = read, dict[str, tuple[_Storage, Tensor]]()

    def __call__(self, storage: _Storage) -> Tensor:
        if storage.key not in self._known:
            raw = self._read(storage)
            if len(raw) != storage.numel * storage.dtype.itemsize:
                raise _Refused(
                    f"storage {brief(storage.key)} has {len(raw)} bytes, expected {storage.numel} x {storage.dtype}"
                )
            self._known[storage.key] = storage, torch.frombuffer(bytearray(raw), dtype=storage.dtype)
        known, flat = self._known[storage.key]
        if known != storage:
            raise _Refused(f"storage {brief(storage.key)} is announced as two kinds")
        return flat


def _tensor(key: str, value: _View, read: _Storages) -> Tensor:
    if 0 in value.shape:
        return torch.empty(value.shape, dtype=value.storage.dtype)
    assert sys.byteorder == "little"
    flat = read(value.storage)
    return flat.as_strided(value.shape, value.stride, value.offset).clone(memory_format=torch.contiguous_format)


def _word(key: Any) -> str:
    """A key in an enumeration."""
    return brief(key)[1:-1] if isinstance(key, str) else brief(key)


def _describe(value: Any) -> str:
    return value.name.replace(" ", ".") if isinstance(value, _Global) else f"a {type(value).__name__}"


# --- the machine --------------------------------------------------------------------------------------------

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _evaluate(file: BinaryIO, storages: dict[str, _Storage] | None = None) -> Any:
    """Follow one pickle from the file's position to its STOP; storages met are noted by key."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for steps, (name, argument) in enumerate(_opcodes(file)):
        if steps >= limits.PICKLE_STEPS:
            raise _Refused(f"its pickle has over {limits.PICKLE_STEPS} operations")
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
            marks.append(len(stack))
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
            if not all(isinstance(key, (str, int)) for key in items[::2]):  # a tuple of tuples may never be hashed
                raise _Refused("it has a dictionary with keys that are no names")
            _expect(stack[-1], dict, name).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = (_expect(stack.pop(), str, name) for _ in range(2))
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


def _opcodes(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(file):
        yield opcode.name, argument


def _expect(value: Any, kind: type, operation: str) -> Any:
    if not isinstance(value, kind):
        raise _Refused(f"it applies {operation} to {_describe(value)}")
    return value


def _global(name: str) -> _Global:
    if name not in _STORAGES and name not in (_DICT, _TENSOR, _PARAMETER):
        raise _Refused(
            f"it asks for {brief(name.replace(' ', '.'))[1:-1]}, which a dictionary of tensors does not need"
        )
    return _Global(name)


def _persistent(identity: Any) -> _Storage:
    tag, kind, key, _, numel, *view = _expect(identity, tuple, "BINPERSID")
    if tag != "storage" or not isinstance(kind, _Global) or kind.name not in _STORAGES or any(view):
        raise _Refused(f"it holds a storage of an unknown kind: {_describe(kind)}")
    if not isinstance(numel, int) or numel < 0:
        raise _Refused(f"storage {brief(key)} announces {brief(numel)} elements")
    return _Storage(_STORAGES[kind.name], _name(key), numel)


def _reduce(function: Any, arguments: Any) -> Any:
    arguments = _expect(arguments, tuple, "REDUCE")
    if function == _Global(_DICT) and arguments in ((), ([],)):
        return {}
    if function == _Global(_TENSOR):
        storage, offset, shape, stride, *_ = arguments  # then requires_grad and hooks, which reading does not need
        if not all(isinstance(each, tuple) and len(each) <= 64 for each in (shape, stride)):
            raise _Refused("it holds a tensor whose shape is none")
        if isinstance(storage, _Storage) and all(isinstance(n, int) for n in (offset, *shape, *stride)):
            return _View(storage, offset, tuple(shape), tuple(stride))
    if function == _Global(_PARAMETER) and isinstance(arguments[0], _View):
        return arguments[0]
    raise _Refused(f"it calls {_describe(function)} with arguments that no tensor has")

"""Following a pickle without executing it.

A pickle is a program. Here its opcodes are only listed (`pickletools.genops`) and a machine of our own follows those
that containers of tensors need; no import, no call and no attribute of the program's choosing ever happens. What names
a program may utter, and what becomes of them, is a `Vocabulary`; whatever else it asks for is refused by name.
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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from imagewright import limits
from imagewright.errors import an
from imagewright.shapes import brief
from imagewright.types import UserError

STORAGES = {
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
class Global:
    """A name that the program utters: "module attribute"."""

    name: str


@dataclass(frozen=True)
class Storage:
    """Numbers that lie elsewhere in the file, under a key."""

    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor: a part of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, each element once."""
        return math.prod(self.shape) * self.storage.dtype.itemsize


class Refused(Exception):  # noqa: N818, a finding about a file, not an error of the program
    """The file asks for something that its kind does not need."""


@contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Turn what is found wrong in the file into a UserError naming it; what: of what kind it should have been."""
    try:
        yield
    except Refused as error:
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
        raise UserError(f"{path} is no readable {what}: {error}") from None


# --- the words ----------------------------------------------------------------------------------------------


class Vocabulary:
    """What a dictionary of plain tensors needs: the base of all vocabularies.

    storages: those that were met, by key. steps: operations that are left, for this pickle and those within it.
    """

    purpose = "a dictionary of tensors"

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}
        self.steps = limits.PICKLE_STEPS

    def knows(self, name: str) -> bool:
        """Whether the program may utter "module attribute"."""
        return name in STORAGES or name in (_DICT, _TENSOR, _PARAMETER)

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What stands for the result of a call; raises Refused for one that is not known."""
        if function == Global(_DICT) and arguments in ((), ([],)):
            return {}
        if function == Global(_TENSOR):
            storage, offset, shape, stride, *_ = arguments  # then requires_grad and hooks, which reading does not need
            if not all(isinstance(each, tuple) and len(each) <= 64 for each in (shape, stride)):
                raise Refused("it holds a tensor whose shape is none")
            if isinstance(storage, Storage) and all(isinstance(n, int) for n in (offset, *shape, *stride)):
                return View(storage, offset, tuple(shape), tuple(stride))
        if function == Global(_PARAMETER) and isinstance(arguments[0], View):
            return arguments[0]
        raise Refused(f"it calls {describe(function)} with arguments that {self.purpose} does not have")

    def make(self, kind: Any, arguments: Any) -> Any:
        """What stands for a new object of a class."""
        raise Refused(f"it makes an object of {describe(kind)}, which {self.purpose} does not need")

    def build(self, made: Any, state: Any) -> None:
        """Give an object its attributes. A dictionary's (`_metadata`) are left out; its entries are all it is."""
        expect(made, dict, "BUILD")

    def persistent(self, identity: Any) -> Storage:
        """The storage of a persistent id."""
        tag, kind, key, _, numel, *view = expect(identity, tuple, "BINPERSID")
        if tag != "storage" or not isinstance(kind, Global) or kind.name not in STORAGES or any(view):
            raise Refused(f"it holds a storage of an unknown kind: {describe(kind)}")
        if not isinstance(numel, int) or numel < 0:
            raise Refused(f"storage {brief(key)} announces {brief(numel)} elements")
        storage = Storage(STORAGES[kind.name], require_name(key), numel)
        self.storages[storage.key] = storage
        return storage


def require_name(key: Any) -> str:
    """A key that is a string."""
    if not isinstance(key, str):
        raise Refused(f"the key {brief(key)} is no name")
    return key


def expect(value: Any, kind: type, operation: str) -> Any:
    """The value, which has to be of a kind for an operation."""
    if not isinstance(value, kind):
        raise Refused(f"it applies {operation} to {describe(value)}")
    return value


def describe(value: Any) -> str:
    """A value in a sentence."""
    return brief(value.name.replace(" ", "."))[1:-1] if isinstance(value, Global) else an(type(value).__name__)


def word(key: Any) -> str:
    """A key in an enumeration."""
    return brief(key)[1:-1] if isinstance(key, str) else brief(key)


# --- the machine --------------------------------------------------------------------------------------------

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "BINSTRING", "SHORT_BINSTRING"}  # last: Python 2
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def follow(file: BinaryIO, words: Vocabulary, *, raw: bool = False) -> Any:
    """Follow one pickle from the file's position to its STOP. raw: bytes may stand in it."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    for name, argument in _opcodes(_Whole(file)):
        words.steps -= 1
        if words.steps < 0:
            raise Refused(f"its pickle has over {limits.PICKLE_STEPS} operations")
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _LITERALS or (raw and name in _BYTES):
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
            expect(stack[-1], list, name).extend(items)
        elif name == "ADDITEMS":
            items = since_mark()
            _require_plain(items, "a set of what is no name")
            expect(stack[-1], set, name).update(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = since_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            _require_plain(items[::2], "a dictionary with keys that are no names")
            expect(stack[-1], dict, name).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_global(argument, words))
        elif name == "STACK_GLOBAL":
            attribute, module = (expect(stack.pop(), str, name) for _ in range(2))
            stack.append(_global(f"{module} {attribute}", words))
        elif name == "BINPERSID":
            stack.append(words.persistent(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(words.call(function, expect(arguments, tuple, name)))
        elif name == "NEWOBJ":
            arguments, kind = stack.pop(), stack.pop()
            stack.append(words.make(kind, arguments))
        elif name == "BUILD":
            state = stack.pop()
            words.build(stack[-1], state)
        else:
            raise Refused(f"it uses the pickle operation {name}, which {words.purpose} does not need")
    raise Refused("its pickle has no end")


def _opcodes(file: Any) -> Iterator[tuple[str, Any]]:
    for opcode, argument, _ in pickletools.genops(file):
        yield opcode.name, argument


class _Whole:
    """A file that is never asked for more than it still has: a length in a pickle is a claim."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        at = file.tell()
        self._size = file.seek(0, 2)
        file.seek(at)

    def read(self, n: int) -> bytes:
        return self._file.read(min(n, self._size - self._file.tell()))

    def readline(self) -> bytes:
        return self._file.readline(1 << 16)

    def tell(self) -> int:
        return self._file.tell()


def _require_plain(keys: list[Any], fault: str) -> None:
    if not all(isinstance(key, (str, int)) for key in keys):  # a tuple of tuples may never be hashed
        raise Refused(f"it has {fault}")


def _global(name: str, words: Vocabulary) -> Global:
    if not words.knows(name):
        raise Refused(f"it asks for {describe(Global(name))}, which {words.purpose} does not need")
    return Global(name)


# --- storages -----------------------------------------------------------------------------------------------

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
Read = Callable[[Storage], bytes]


def open_zip(file: BinaryIO, words: Vocabulary) -> tuple[Any, Read]:
    """The content of a zip archive as torch.save writes it since 1.6, and what reads its storages."""
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise Refused(f"a torch archive holds one data.pkl, this one {len(names)}")
    prefix = names[0].removesuffix("data.pkl")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise Refused("its entries are compressed, which torch.save never does")
    if f"{prefix}byteorder" in archive.namelist() and archive.read(f"{prefix}byteorder") != b"little":
        raise Refused("it was written with big-endian byte order")
    if archive.getinfo(names[0]).file_size > limits.PICKLE_BYTES:
        raise Refused(f"its data.pkl has over {limits.PICKLE_BYTES} bytes")
    return follow(io.BytesIO(archive.read(names[0])), words), lambda s: archive.read(f"{prefix}data/{s.key}")


def open_legacy(file: BinaryIO, words: Vocabulary) -> tuple[Any, Read]:
    """The content of the older layout, pickles followed by raw storages, and what reads these."""
    file.seek(0)
    if follow(file, words) != _LEGACY_MAGIC or follow(file, words) != _LEGACY_PROTOCOL:
        raise Refused("it does not start like a torch.save file")
    system = follow(file, words)
    if not (isinstance(system, dict) and system.get("little_endian") is True):
        raise Refused("it was not written with little-endian byte order")
    state = follow(file, words)
    raw: dict[str, bytes] = {}
    for key in expect(follow(file, words), list, "the list of storages"):
        if not isinstance(key, str) or key not in words.storages or key in raw:
            raise Refused(f"it lists a storage {brief(key)} that its tensors do not have, or lists it twice")
        storage = words.storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storage.numel:
            raise Refused(f"storage {brief(key)} has {numel} elements where {storage.numel} were announced")
        raw[key] = file.read(numel * storage.dtype.itemsize)
    return state, lambda s: raw[s.key]


class Storages:
    """Storages by key, each read once, as flat tensors."""

    def __init__(self, read: Read) -> None:
        self._read, self._known = read, dict[str, tuple[Storage, Tensor]]()

    def __call__(self, storage: Storage) -> Tensor:
        if storage.key not in self._known:
            raw = self._read(storage)
            if len(raw) != storage.numel * storage.dtype.itemsize:
                raise Refused(
                    f"storage {brief(storage.key)} has {len(raw)} bytes, expected {storage.numel} x {storage.dtype}"
                )
            self._known[storage.key] = storage, torch.frombuffer(bytearray(raw), dtype=storage.dtype)
        known, flat = self._known[storage.key]
        if known != storage:
            raise Refused(f"storage {brief(storage.key)} is announced as two kinds")
        return flat


def tensors_of(entries: dict[Any, Any], read: Read, size: int) -> dict[str, Tensor]:
    """The tensors of a flat dictionary, on the CPU; size: bytes of the file, which bounds what they may take."""
    views = {require_name(key): _view(key, value) for key, value in entries.items()}
    if sum(view.nbytes for view in views.values()) > limits.EXPANSION * size:
        raise Refused(f"its tensors would take over {limits.EXPANSION} times the file's {size} bytes")
    storages = Storages(read)
    return {key: _tensor(view, storages) for key, view in views.items()}


def _view(key: str, value: Any) -> View:
    """The entry as a tensor that lies within its storage."""
    if not isinstance(value, View):
        raise Refused(f"the entry {word(key)} is no tensor but {describe(value)}")
    if len(value.shape) != len(value.stride) or min((*value.shape, *value.stride, value.offset), default=0) < 0:
        raise Refused(f"the entry {word(key)} has shape {value.shape[:8]} with strides {value.stride[:8]}")
    last = value.offset + sum((n - 1) * step for n, step in zip(value.shape, value.stride, strict=True))
    if 0 not in value.shape and last >= value.storage.numel:
        raise Refused(f"the entry {word(key)} reaches beyond its storage of {value.storage.numel} elements")
    return value


def _tensor(value: View, read: Storages) -> Tensor:
    if 0 in value.shape:
        return torch.empty(value.shape, dtype=value.storage.dtype)
    assert sys.byteorder == "little"
    flat = read(value.storage)
    return flat.as_strided(value.shape, value.stride, value.offset).clone(memory_format=torch.contiguous_format)


# --- Lightning ----------------------------------------------------------------------------------------------

_INERT = ("omegaconf.", "lightning.", "models.", "networks.", "kernels.", "utils.", "torch.nn.modules.")
_INERT_NAMES = {
    "torch_utils.persistence _reconstruct_persistent_obj",
    "torch_utils.persistence_edm2 _reconstruct_persistent_obj",
    "typing Any",
    "collections defaultdict",
    "pathlib PosixPath",
    "argparse Namespace",
    *(f"builtins {name}" for name in ("dict", "list", "int", "float", "str", "bool", "set", "object")),
    "copyreg _reconstructor",
}


class Inert:
    """What stands for an object that nobody looks at."""


class LightningWords(Vocabulary):
    """A training checkpoint, Lightning's or another, whose settings are objects: these stand for nothing."""

    purpose = "a training checkpoint of tensors and settings"

    def knows(self, name: str) -> bool:
        return super().knows(name) or name in _INERT_NAMES or name.startswith(_INERT)

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        if function == Global("collections defaultdict"):
            return {}
        if isinstance(function, Global) and not super().knows(function.name):
            return Inert()
        return super().call(function, arguments)

    def make(self, kind: Any, arguments: Any) -> Any:
        return Inert()

    def build(self, made: Any, state: Any) -> None:
        if not isinstance(made, Inert):
            super().build(made, state)

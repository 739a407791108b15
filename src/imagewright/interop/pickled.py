"""Official network pickles (`.pkl` of EDM, EDM2, DDO, SiD): weights and constructor arguments, without the code inside.

Layout     a dictionary with the network under "ema". Its modules are `torch_utils.persistence` objects: each carries
           the source text of its class, its name, the constructor's arguments and its attributes; parameters are
           tensors whose storages are small torch.save files within. Source: NVlabs/edm, torch_utils/persistence.py.
Read       by `pickles`: persistent objects become records of name and attributes (the source text is dropped unread),
           module containers likewise; tensors, containers, numbers and names are themselves. All else is refused.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from torch import Tensor

from imagewright import limits
from imagewright.arrays import require_finite
from imagewright.files import open_regular
from imagewright.pickles import (
    Global,
    Read,
    Refused,
    Storage,
    View,
    Vocabulary,
    describe,
    expect,
    follow,
    open_legacy,
    refusing,
    require_name,
    tensors_of,
    word,
)

_PERSISTENT = "torch_utils.persistence _reconstruct_persistent_obj"
_STORAGE_FILE = "torch.storage _load_from_bytes"
_EASY_DICTS = ("dnnlib.util EasyDict", "dnnlib EasyDict")
_SET = ("builtins set", "__builtin__ set")
_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_SCALAR = tuple(f"{module} scalar" for module in _NUMPY)
_ARRAY = (
    *(f"{module} _reconstruct" for module in _NUMPY),
    *(f"numpy.{core}.numeric _frombuffer" for core in ("core", "_core")),
)
_CONTAINERS = tuple(f"torch.nn.modules.container {name}" for name in ("ModuleDict", "ModuleList", "Sequential"))
_MODULES = (*_CONTAINERS, "torch.nn.modules.linear Identity")
_KNOWN = {_PERSISTENT, _STORAGE_FILE, "numpy dtype", "numpy ndarray"}.union(
    _EASY_DICTS, _SET, _SCALAR, _ARRAY, _MODULES
)
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
_DEPTH, _NODES = 32, 100_000
"""Modules within each other, and of one network."""


@dataclass(eq=False)
class _Object:
    """What a persistent object or module is: the name of its class and its attributes."""

    name: str
    attributes: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False)
class _Numpy:
    """A number type, or an array, which no weights depend on."""

    code: str = ""


@dataclass(frozen=True)
class PickledNetwork:
    """A network of a pickle: the name of its class, its constructor's arguments, its parameters and buffers by name."""

    class_name: str
    arguments: Mapping[str, Any]
    state: dict[str, Tensor]


class NetworkWords(Vocabulary):
    """What a pickle of an official network needs."""

    purpose = "a network of persistent classes"

    def __init__(self) -> None:
        super().__init__()
        self.packed: dict[int, tuple[bytes, Storage, Read]] = {}
        self.by_key: dict[str, Read] = {}

    def knows(self, name: str) -> bool:
        return name in _KNOWN or super().knows(name)

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        match function:
            case Global(name) if name == _STORAGE_FILE:
                return self._unpacked(*(expect(a, bytes, "a storage") for a in arguments))
            case Global(name) if name == _PERSISTENT:
                return _persistent(*arguments)
            case Global(name) if name in _SET:
                return set(expect(arguments[0], list, "a set")) if arguments else set()
            case Global("numpy dtype"):
                return _Numpy(str(arguments[0]))
            case Global(name) if name in _SCALAR:
                return _number(*arguments)
            case Global(name) if name in _ARRAY:
                return _Numpy()
        return super().call(function, arguments)

    def make(self, kind: Any, arguments: Any) -> Any:
        if isinstance(kind, Global) and arguments == ():
            if kind.name in _EASY_DICTS:
                return {}
            if kind.name in _MODULES:
                return _Object(kind.name.split(" ")[1])
        return super().make(kind, arguments)

    def build(self, made: Any, state: Any) -> None:
        if isinstance(made, _Object):
            made.attributes.update(expect(state, dict, "BUILD"))
        elif not isinstance(made, _Numpy):
            super().build(made, state)

    def persistent(self, identity: Any) -> Storage:
        raise Refused("it has a storage outside itself")

    def _unpacked(self, raw: bytes) -> Storage:
        """The storage within a small torch.save file; its numbers are read when they are asked for."""
        if id(raw) not in self.packed:  # which keeps `raw`, so that no other gets its number
            inner = Vocabulary()
            inner.steps = self.steps
            storage, read = open_legacy(io.BytesIO(raw), inner)
            self.steps = inner.steps
            key = str(len(self.packed))
            renamed = Storage(expect(storage, Storage, "a storage").dtype, key, storage.numel)
            self.packed[id(raw)] = raw, renamed, read
            self.by_key[key] = lambda _: read(storage)
        return self.packed[id(raw)][1]

    def read(self, storage: Storage) -> bytes:
        """The bytes of a storage that `_unpacked` met."""
        return self.by_key[storage.key](storage)


def _persistent(meta: Any) -> _Object:
    meta = expect(meta, dict, "a persistent object")
    if meta.get("type") != "class":
        raise Refused(f"it has a persistent object that is no class but {describe(meta.get('type'))}")
    name = require_name(meta.get("class_name"))
    return _Object(name, dict(expect(meta.get("state") or {}, dict, "a persistent object")))


def _number(kind: Any, raw: Any) -> float | int:
    code = expect(kind, _Numpy, "a number").code
    if code not in _NUMBERS or not isinstance(raw, bytes) or len(raw) != int(code[1]):
        raise Refused(f"it holds a number of an unknown type {word(code)}")
    value: float | int = np.frombuffer(raw, dtype=f"<{code}" if code != "b1" else "?")[0].item()
    return value


def read_network(path: Path, key: str = "ema") -> PickledNetwork:
    """The network under a key of a pickle, on the CPU, in the file's precision.

    Raises UserError naming the file when it is missing, damaged, has no such network, or asks for what none needs.
    """
    with open_regular(path) as file, refusing(path, "network pickle"):
        network = _read(file, key)
    require_finite(path, network.state)
    return network


def _read(file: BinaryIO, key: str) -> PickledNetwork:
    size = file.seek(0, 2)
    file.seek(0)
    words = NetworkWords()
    content = expect(follow(file, words, raw=True), dict, "the name of a network")
    if not isinstance(content.get(key), _Object):
        networks = [word(name) for name, value in content.items() if isinstance(value, _Object)]
        raise Refused(f"it has no network {key!r}; there are {', '.join(networks[:10]) or 'none'}")
    network = content[key]
    if network.attributes.get("_init_args"):
        raise Refused("its network was made with arguments that have no names")
    arguments = expect(network.attributes.get("_init_kwargs"), dict, "the constructor's arguments")
    entries = dict[str, View]()
    _collect(network, "", entries, set(), 0)
    return PickledNetwork(network.name, _plain(arguments), tensors_of(entries, words.read, size))


def _collect(module: Any, prefix: str, into: dict[str, View], seen: set[int], depth: int) -> None:
    """Parameters and buffers of a module and those below, by their names in a state dict."""
    module = expect(module, _Object, "the name of a module")
    if id(module) in seen or len(seen) >= _NODES or depth > _DEPTH:
        raise Refused("its network holds a module twice, or more modules than a network has")
    seen.add(id(module))
    hidden = module.attributes.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, tensor in expect(module.attributes.get(group, {}), dict, group).items():
            if tensor is not None and name not in hidden:
                into[prefix + require_name(name)] = tensor
    for name, child in expect(module.attributes.get("_modules", {}), dict, "_modules").items():
        if child is not None:
            _collect(child, f"{prefix}{require_name(name)}.", into, seen, depth + 1)


def _plain(value: Any, depth: int = 0) -> Any:
    """Constructor arguments as JSON has them."""
    if isinstance(value, dict) and depth < 8 and len(value) <= limits.DESCRIBED:
        return {require_name(k): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and depth < 8 and len(value) <= limits.DESCRIBED:
        return [_plain(v, depth + 1) for v in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise Refused(f"its constructor's arguments hold {describe(value)}")

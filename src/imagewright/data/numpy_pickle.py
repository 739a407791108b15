"""Dictionaries of NumPy arrays from pickles, which are followed and never executed (`pickles`); and written as such.

Source   the layouts that NumPy's arrays have in pickles of protocols 2 to 5, those of Python 2 included.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from imagewright.pickles import Global, Refused, Vocabulary, describe, expect, follow, refusing

_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
_EMPTY = frozenset(f"{module} _reconstruct" for module in _MODULES)
_SCALAR = frozenset(f"{module} scalar" for module in _MODULES)
_FROM_BUFFER = frozenset({"numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer"})
_KNOWN = _EMPTY | _SCALAR | _FROM_BUFFER | {"numpy ndarray", "numpy dtype", "_codecs encode"}
_KINDS = "buif"
"""Booleans, unsigned and signed whole numbers, floating-point numbers."""


class _Type:
    """A number type that is being described."""

    def __init__(self, code: str) -> None:
        self.dtype = np.dtype(code)


class _Array:
    """An array that is being described; `value` once it is."""

    value: npt.NDArray[Any] | None = None


class NumpyWords(Vocabulary):
    """What a dictionary of plain arrays, lists, numbers and texts needs."""

    purpose = "a dictionary of arrays"

    def knows(self, name: str) -> bool:
        return name in _KNOWN

    def call(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        name = function.name if isinstance(function, Global) else ""
        if name in _EMPTY and arguments[:1] == (Global("numpy ndarray"),):
            return _Array()
        if name == "numpy dtype" and isinstance(arguments[0], str):
            if len(arguments[0]) > 4 or arguments[0][:1] not in _KINDS:
                raise Refused(f"it holds an array of {arguments[0][:20]!r}, which is no plain number type")
            return _Type(arguments[0])
        if name == "_codecs encode" and arguments[1:] in (("latin1",), ("latin-1",)) and isinstance(arguments[0], str):
            return arguments[0].encode("latin-1")
        if name in _SCALAR and len(arguments) == 2 and isinstance(arguments[0], _Type):
            return _numbers(arguments[0], (1,), False, arguments[1])[0].item()
        if name in _FROM_BUFFER and len(arguments) == 4 and isinstance(arguments[1], _Type):
            array = _Array()
            array.value = _numbers(arguments[1], arguments[2], arguments[3] == "F", arguments[0])
            return array
        raise Refused(f"it calls {describe(function)} with arguments that {self.purpose} does not have")

    def build(self, made: Any, state: Any) -> None:
        if isinstance(made, _Type):
            order = expect(state, tuple, "BUILD")[1]
            made.dtype = made.dtype.newbyteorder(order) if order in ("<", ">") else made.dtype
        elif isinstance(made, _Array):
            _, shape, kind, fortran, raw = expect(state, tuple, "BUILD")
            made.value = _numbers(expect(kind, _Type, "BUILD"), shape, fortran is True, raw)
        else:
            super().build(made, state)


def _numbers(kind: _Type, shape: Any, fortran: bool, raw: Any) -> npt.NDArray[Any]:
    if isinstance(raw, str):  # Python 2's strings
        raw = raw.encode("latin-1")
    raw = bytes(raw) if isinstance(raw, bytearray) else raw
    if not isinstance(raw, bytes) or not isinstance(shape, tuple) or len(shape) > 8:
        raise Refused("it holds an array whose shape or content is none")
    if not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) * kind.dtype.itemsize != len(raw):
        raise Refused(f"it holds an array of shape {shape} in {len(raw)} bytes")
    return np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if fortran else "C")


def read_arrays(path: Path, file: BinaryIO) -> dict[str, Any]:
    """What a pickled dictionary holds: arrays, lists, numbers and texts by name. path: for complaints.

    Raises UserError for anything else, and for a program that asks for more.
    """
    with refusing(path, "pickle of arrays"):
        words = NumpyWords()
        found = expect(follow(file, words, raw=True), dict, "the end")
        return {str(key): value.value if isinstance(value, _Array) else value for key, value in found.items()}


def write_arrays(file: BinaryIO, entries: Mapping[str, npt.NDArray[Any] | list[int]]) -> None:
    """Write arrays and lists of whole numbers from 0 as a pickled dictionary (protocol 3), which every NumPy reads.

    Arrays are uint8 or float64, of less than 4 GiB. The operations are written out: nothing here can pickle an object.
    """
    file.write(b"\x80\x03}")
    for name, value in entries.items():
        file.write(_text(name))
        if isinstance(value, list):
            file.write(b"](" + b"".join(b"J" + struct.pack("<i", number) for number in value) + b"e")
        else:
            _write_array(file, value)
        file.write(b"s")
    file.write(b".")


def _write_array(file: BinaryIO, array: npt.NDArray[Any]) -> None:
    code, order = {"uint8": ("u1", "|"), "float64": ("f8", "<")}[array.dtype.name]
    shape = b"(" + b"".join(b"J" + struct.pack("<i", length) for length in array.shape) + b"t"
    kind = b"cnumpy\ndtype\n" + _text(code) + b"K\x00K\x01\x87R(K\x03" + _text(order)
    kind += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    file.write(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01" + shape + kind)
    file.write(b"\x89B" + struct.pack("<I", array.nbytes))
    file.write(np.ascontiguousarray(array).data)
    file.write(b"tb")


def _text(words: str) -> bytes:
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()

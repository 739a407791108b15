"""What may stand in a file, said by types, and how a value is held against them.

A shape is a type as it is written in an annotation: int, float, str, bool, None, Any, Literal, unions, list[X],
tuple[X, ...], tuple[X, Y], dict[str, X], a TypedDict (keys that it does not name are let pass), a dataclass (for values
that are built already), Annotated[int or float, Within(least, most)]. Whole numbers have 64 bits; numbers are finite,
except where a dataclass has them, as these say themselves what they take.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NotRequired

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    type(None): "null",
    dict: "an object",
    list: "a list",
    tuple: "a list",
}


@dataclass(frozen=True)
class Within:
    """Bounds of a number, both allowed."""

    least: float = -math.inf
    most: float = math.inf


def misfit(value: Any, shape: Any, where: str = "", finite: bool = True) -> str | None:
    """What is wrong with a value, in words; None = it fits. where: its place, such as "data.resolution"."""
    origin, inner = typing.get_origin(shape), typing.get_args(shape)
    if shape is Any or isinstance(shape, typing.TypeVar):
        return None
    if origin is typing.Annotated:
        return misfit(value, inner[0], where, finite) or _outside(value, inner[1], where)
    if origin in (types.UnionType, typing.Union):
        return _of_several(value, inner, where, finite)
    if origin is Literal:
        fits = any(type(value) is type(allowed) and value == allowed for allowed in inner)
        return None if fits else _told(value, where, "one of " + ", ".join(map(str, inner)) if inner[1:] else inner[0])
    if typing.is_typeddict(shape):
        return _of_object(value, shape, where, finite)
    if origin in (list, tuple, Sequence) or shape in (list, tuple):
        return _of_list(value, inner, where, finite)
    if origin in (dict, Mapping) or shape is dict:
        if not isinstance(value, dict):
            return _told(value, where, _WORDS[dict])
        items = ((key, each, inner[1]) for key, each in value.items()) if inner else ()
        return _first(items, where, finite)
    return _of_plain(value, shape, where, finite)


def _of_plain(value: Any, shape: Any, where: str, finite: bool) -> str | None:
    if shape is None:
        shape = type(None)
    if shape in (int, float):
        kinds: Any = int if shape is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return _told(value, where, _WORDS[shape])
        if isinstance(value, int):
            return None if -(2**63) <= value < 2**63 else _told(value, where, "smaller")
        return None if math.isfinite(value) or not finite else _told(value, where, "finite")
    if shape in _WORDS:
        return None if isinstance(value, shape) else _told(value, where, _WORDS[shape])
    if isinstance(shape, type) and dataclasses.is_dataclass(shape):
        return None if isinstance(value, shape) else _told(value, where, f"a {shape.__name__}")
    return None  # a protocol, a callable: who takes it says what is wrong with it


def _of_several(value: Any, shapes: tuple[Any, ...], where: str, finite: bool) -> str | None:
    faults = [misfit(value, each, where, finite) for each in shapes]
    if None in faults:
        return None
    # The fault of the one that is of the value's kind says most: of an object what is in it.
    for fault, each in zip(faults, shapes, strict=True):
        if isinstance(value, dict) and (typing.is_typeddict(each) or typing.get_origin(each) is dict):
            return fault
        if isinstance(value, list) and typing.get_origin(each) in (list, tuple):
            return fault
    return _told(value, where, " or ".join(_word(each) for each in shapes))


def _of_object(value: Any, shape: Any, where: str, finite: bool) -> str | None:
    if not isinstance(value, dict):
        return _told(value, where, _WORDS[dict])
    fields = _fields(shape)
    for key, (_, needed) in fields.items():
        if needed and key not in value:
            return f"{where or 'it'} lacks the entry {key!r}"
    return _first(((k, v, fields[k][0]) for k, v in value.items() if k in fields), where, finite)


def _of_list(value: Any, inner: tuple[Any, ...], where: str, finite: bool) -> str | None:
    if not isinstance(value, (list, tuple)):
        return _told(value, where, _WORDS[list])
    if len(inner) > 1 and inner[1] is not Ellipsis:
        if len(value) != len(inner):
            return _told(value, where, f"a list of {len(inner)}")
        return _first(zip(range(len(value)), value, inner, strict=True), where, finite)
    return _first(((i, each, inner[0]) for i, each in enumerate(value)), where, finite) if inner else None


def _first(items: Iterable[tuple[Any, Any, Any]], where: str, finite: bool) -> str | None:
    for key, value, shape in items:
        if shape is not Any:
            fault = misfit(value, shape, f"{where}.{key}" if where else str(key), finite)
            if fault is not None:
                return fault
    return None


def _outside(value: Any, bounds: Any, where: str) -> str | None:
    if not isinstance(bounds, Within) or bounds.least <= value <= bounds.most:
        return None
    return _told(value, where, f"from {bounds.least:g} to {bounds.most:g}")


@cache
def _fields(shape: Any) -> dict[str, tuple[Any, bool]]:
    """Of a TypedDict: each key's shape, and whether it has to be there."""
    found = {}
    for key, hint in typing.get_type_hints(shape, include_extras=True).items():
        free = typing.get_origin(hint) is NotRequired
        found[key] = (typing.get_args(hint)[0] if free else hint, shape.__total__ and not free)
    return found


def _word(shape: Any) -> str:
    kind = typing.get_origin(shape) or shape
    if kind is Literal:
        return " or ".join(map(repr, typing.get_args(shape)))
    if typing.is_typeddict(shape):
        return _WORDS[dict]
    return _WORDS.get(type(None) if kind is None else kind, getattr(kind, "__name__", str(kind)))


def _told(value: Any, where: str, allowed: Any) -> str:
    return f"{where or 'it'} is {brief(value)}; it must be {allowed}"


def brief(value: Any) -> str:
    """A value in a few words, whatever it is: long texts are cut, of lists and objects only the size is said."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number of over 64 bits"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else f"{value[:57]}...")
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value) if isinstance(value, (int, float)) else f"a {type(value).__name__}"

"""Checks of numbers that many settings share, each raising one clear sentence."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import numpy.typing as npt

from imagewright.types import UserError


def require_positive(name: str, value: float) -> None:
    """Raise UserError "<name> is <value>; it must be positive and finite" unless 0 < value < inf."""
    if not 0 < value < math.inf:
        raise UserError(f"{name} is {value}; it must be positive and finite")


def require_non_negative(name: str, value: float) -> None:
    """Raise UserError "<name> is <value>; it must be >= 0 and finite" unless 0 <= value < inf."""
    if not 0 <= value < math.inf:
        raise UserError(f"{name} is {value}; it must be >= 0 and finite")


def require_number(name: str, value: float, least: float, most: float) -> None:
    """Raise UserError unless least <= value <= most and the value is finite."""
    if not (least <= value <= most and math.isfinite(value)):
        if least == math.ulp(0) and most == math.inf:
            raise UserError(f"{name} is {value}; it must be positive and finite")
        low, high = ("" if math.isinf(end) else f"{end:g}" for end in (least, most))
        bounds = f" from {low} to {high}" if low and high else f" >= {low}" if low else f" <= {high}" if high else ""
        raise UserError(f"{name} is {value}; it must be a finite number{bounds}")


def require_whole(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """The value as an int. Raises UserError unless it is a whole number (no bool, no text) from least to most."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))
    if not whole or not least <= int(value) <= most:
        bounds = f">= {least}" if most >= 10**9 else f"from {least} to {most}"
        raise UserError(f"{name} is {value!r}; it must be a whole number {bounds}")
    return int(value)


def whole_numbers(name: str, values: Any) -> npt.NDArray[np.int64]:
    """The values as int64, of any shape. Raises UserError unless all are whole numbers: 1.0 is none, nor is "1"."""
    array = np.asarray(values)
    if array.dtype == np.uint64 and (array > 2**63 - 1).any():
        raise UserError(f"{name} has {array.max()}; whole numbers go up to {2**63 - 1}")
    if array.dtype.kind not in "iu" and array.size:
        first = array.ravel()[0]
        raise UserError(f"{name} must be whole numbers, got {first!r}")
    return array.astype(np.int64)

"""Checks of numbers that many settings share, each raising one clear sentence."""

from __future__ import annotations

import math

from imagewright.types import UserError


def require_positive(name: str, value: float) -> None:
    """Raise UserError "<name> is <value>; it must be positive and finite" unless 0 < value < inf."""
    if not 0 < value < math.inf:
        raise UserError(f"{name} is {value}; it must be positive and finite")


def require_non_negative(name: str, value: float) -> None:
    """Raise UserError "<name> is <value>; it must be >= 0 and finite" unless 0 <= value < inf."""
    if not 0 <= value < math.inf:
        raise UserError(f"{name} is {value}; it must be >= 0 and finite")

"""Scores that a search compares: lower is better, and one that is no number is as bad as can be.

Without the second, NaN would win where it comes first: no score is below it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

from imagewright.types import UserError

Choice = TypeVar("Choice")


def cost(score: float) -> float:
    """The score; infinity where it is no number."""
    return math.inf if math.isnan(score) else float(score)


def lowest(scores: Iterable[tuple[Choice, float]]) -> Choice:
    """The choice of the lowest score; the first where two are equal. Raises UserError where no score is finite."""
    choice, score = min(scores, key=lambda pair: cost(pair[1]))
    if not math.isfinite(score):
        raise UserError("none of the candidates has a finite score: the model's images are no numbers")
    return choice

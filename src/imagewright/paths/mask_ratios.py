"""Which share of an image's tokens is masked at a point r of the way from all (r = 0) to none (r = 1).

Source   Chang et al. 2022 (MaskGIT, arXiv 2202.04200), section 3.3 and figure 8. All fall from 1 to 0. Concave ones
         (cosine, cubic, square) decide few tokens early, convex ones (sqrt, exp, log) most of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from imagewright.types import UserError

MaskRatio = Callable[[Tensor, int], Tensor]
"""(r in [0, 1], number of tokens) -> share in [0, 1], shape and dtype of r."""


def cosine(r: Tensor, length: int) -> Tensor:
    """cos(pi r / 2), the paper's choice."""
    return torch.cos(r * (math.pi / 2))


def linear(r: Tensor, length: int) -> Tensor:
    """1 - r: equally many tokens in every pass."""
    return 1 - r


def square(r: Tensor, length: int) -> Tensor:
    """1 - r^2."""
    return 1 - r**2


def cubic(r: Tensor, length: int) -> Tensor:
    """1 - r^3."""
    return 1 - r**3


def sqrt(r: Tensor, length: int) -> Tensor:
    """1 - sqrt(r)."""
    return 1 - r.sqrt()


def exp(r: Tensor, length: int) -> Tensor:
    """1 - length^(r - 1); 1 - 1 / length where r = 0."""
    return 1 - torch.as_tensor(float(length), dtype=r.dtype, device=r.device) ** (r - 1)


def log(r: Tensor, length: int) -> Tensor:
    """-log(r) / log(length), at most 1."""
    return (-r.clamp(min=1 / length).log() / math.log(max(length, 2))).clamp(0, 1)


MASK_RATIOS: dict[str, MaskRatio] = {
    "cosine": cosine,
    "cubic": cubic,
    "exp": exp,
    "linear": linear,
    "log": log,
    "sqrt": sqrt,
    "square": square,
}
"""Every schedule by its name in configurations."""

LEAST = 1e-6
"""Published bounds of the share are this and 1, so that at least one token is masked in training."""


def mask_ratio(name: str, r: Tensor, length: int) -> Tensor:
    """The share at r (any shape, in [0, 1]), float64, in [1e-6, 1]."""
    return MASK_RATIOS[name](r.double(), length).clamp(LEAST, 1.0)


def check_ratio(what: str, name: str) -> None:
    """Raise UserError unless there is such a schedule; `what` is the setting's name."""
    if name not in MASK_RATIOS:
        raise UserError(f"{what} is {name!r}; it must be one of {', '.join(MASK_RATIOS)}")

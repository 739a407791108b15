"""Masking as a noise process: a token is visible at time t with probability alpha_t, else it is unknown.

Time       0 is the data, 1 (nearly) all unknown; alpha falls. Everything is float64.
Schedules  of m, the share of masked tokens before squeezing: linear t; polynomial t^power; cosine sin(pi t / 2);
           geometric 1 - exp(-a^(1-t) b^t), a = 1e-5, b = 20.
Squeezed   alpha = (1 - 2 epsilon)(1 - m) + epsilon, so that neither alpha nor 1 - alpha is ever 0.
Source     Shi et al. 2024 (MD4, arXiv 2406.04329), sections 2 and 3; the grids section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.types import UserError

SLOWEST, FASTEST = 1e-5, 20.0
"""Rates of the geometric schedule at t = 0 and t = 1."""
SCHEDULES = ("cosine", "geometric", "linear", "polynomial")


@dataclass(frozen=True, kw_only=True)
class MaskingSchedule:
    """alpha_t and what follows from it. Raises UserError on a setting outside its range."""

    name: str = "linear"
    """cosine, geometric, linear or polynomial."""
    power: float = 1.0
    """Of the polynomial: the share of masked tokens is t ** power."""
    epsilon: float = 1e-4
    """Tokens that are masked at t = 0, and visible at t = 1, in expectation."""

    def __post_init__(self) -> None:
        if self.name not in SCHEDULES:
            raise UserError(f"schedule is {self.name!r}; it must be one of {', '.join(SCHEDULES)}")
        require_positive("power", self.power)
        if self.power != 1 and self.name != "polynomial":
            raise UserError(f"power is {self.power}; it has no effect on schedule {self.name!r}, only on polynomial")
        if not 0 <= self.epsilon < 0.5:
            raise UserError(f"epsilon is {self.epsilon}; it must lie in [0, 0.5)")

    def masked(self, t: Tensor) -> Tensor:
        """1 - alpha_t, shape of t, in [epsilon, 1 - epsilon]."""
        return (1 - 2 * self.epsilon) * self._plain(t.double()) + self.epsilon

    def alpha(self, t: Tensor) -> Tensor:
        """The probability of being visible."""
        return 1 - self.masked(t)

    def rate(self, t: Tensor) -> Tensor:
        """-alpha'_t / (1 - alpha_t): how fast an unknown token is revealed as time runs back; the loss's weight.

        1 / t for the linear schedule without epsilon, and then t > 0.
        """
        return (1 - 2 * self.epsilon) * self._slope(t.double()) / self.masked(t)

    def reveal(self, t: Tensor, s: Tensor) -> Tensor:
        """The probability (alpha_s - alpha_t) / (1 - alpha_t) that a token unknown at t is visible at s <= t."""
        t, s = t.double(), s.double()
        return (1 - 2 * self.epsilon) * (self._plain(t) - self._plain(s)) / self.masked(t)

    def _plain(self, t: Tensor) -> Tensor:
        """m, the share of masked tokens before squeezing; accurate next to t = 0."""
        match self.name:
            case "cosine":
                return torch.sin(0.5 * math.pi * t)
            case "geometric":
                return -torch.expm1(-(SLOWEST ** (1 - t)) * FASTEST**t)
            case _:
                return t**self.power

    def _slope(self, t: Tensor) -> Tensor:
        """dm / dt."""
        match self.name:
            case "cosine":
                return 0.5 * math.pi * torch.cos(0.5 * math.pi * t)
            case "geometric":
                level = SLOWEST ** (1 - t) * FASTEST**t
                return torch.exp(-level) * level * math.log(FASTEST / SLOWEST)
            case _:
                return self.power * t ** (self.power - 1)


TimeGrid = Callable[[Tensor], Tensor]


def uniform_grid(r: Tensor) -> Tensor:
    """t = 1 - r; fits the cosine schedule."""
    return 1 - r


def cosine_grid(r: Tensor) -> Tensor:
    """t = cos(pi r / 2): short steps first, while little is known; fits the linear schedule."""
    return torch.cos(0.5 * math.pi * r)


TIME_GRIDS: dict[str, TimeGrid] = {"cosine": cosine_grid, "uniform": uniform_grid}
"""Where sampling is after a share r of its steps."""


def time_grid(name: str, steps: int) -> Tensor:
    """Times of a sampler, from 1 down to 0: float64 [steps + 1]."""
    times = TIME_GRIDS[name](torch.arange(steps + 1, dtype=torch.float64) / steps)
    times[-1] = 0.0  # the cosine of a right angle is not quite 0
    return times

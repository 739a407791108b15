"""Laws of two times on the straight path, 0 <= s < t < 1, between which a flow map learns to go (AYF, 2506.14603)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.precision import wide
from imagewright.types import Noise, UserError


@dataclass(frozen=True, kw_only=True)
class Interval(ABC):
    """A law by one normal distribution: logit(u) ~ N(mean, std^2)."""

    mean: float
    std: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise UserError(f"{type(self).__name__}.mean must be finite, got {self.mean}")
        require_positive(f"{type(self).__name__}.std", self.std)

    @abstractmethod
    def sample(self, noise: Noise, like: Tensor) -> tuple[Tensor, Tensor]:
        """(t, s), each [N], float64 where the device has it; like: [N]."""

    def _logit_normal(self, noise: Noise, like: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * wide(noise.normal(like)))


@dataclass(frozen=True, kw_only=True)
class GapTimes(Interval):
    """Their distance t - s is logit-normal, and s uniform in what that leaves."""

    mean: float = -0.6
    std: float = 1.6

    def sample(self, noise: Noise, like: Tensor) -> tuple[Tensor, Tensor]:
        gap = self._logit_normal(noise, like)
        s = (1 - gap) * wide(noise.uniform(like))
        return s + gap, s


@dataclass(frozen=True, kw_only=True)
class SortedTimes(Interval):
    """Two logit-normal times, of which t is the larger."""

    mean: float = -0.8
    std: float = 1.0

    def sample(self, noise: Noise, like: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self._logit_normal(noise, like), self._logit_normal(noise, like)
        return torch.maximum(first, second), torch.minimum(first, second)


Intervals = GapTimes | SortedTimes

"""Diffusion in T discrete time steps, t = 0 .. T - 1, and what is left of it when only some are visited.

Source     Ho et al. 2020 (2006.11239), linear betas; Nichol and Dhariwal 2021 (2102.09672), cosine betas, each at most
           0.999; the latter's rules for a sub-sequence of times tau_1 < ... < tau_K:
               beta'_i = 1 - abar(tau_i) / abar(tau_{i-1}), the first divided by 1;  the network is told tau_i
           and "ddimK": every n-th step from 0 on, n the first stride that leaves exactly K.
Derived    x_t / sqrt(abar) = x0 + sigma eps with sigma = sqrt((1 - abar) / abar), a Denoiser's noise level.
           Kept as ln abar, so neither end loses digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from imagewright.types import UserError

Kind = Literal["cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class DiscreteSchedule:
    """The table of a discrete diffusion. Time grows with the noise, t = T - 1 is the noisiest."""

    kind: Kind = "cosine"
    T: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"schedule.kind is {self.kind!r}; it must be one of {', '.join(get_args(Kind))}")
        # The linear betas end at 20 / T, which must stay below 1.
        least = 21 if self.kind == "linear" else 2
        if not isinstance(self.T, int) or least > self.T:
            raise UserError(
                f"schedule.T is {self.T!r}; a {self.kind} schedule needs a whole number of at least {least}"
            )

    def betas(self) -> Tensor:
        """Variance of the noise added at each step, float64 [T], in (0, 1)."""
        if self.kind == "linear":
            return torch.linspace(0.1 / self.T, 20 / self.T, self.T, dtype=torch.float64)
        angle = (torch.arange(self.T + 1, dtype=torch.float64) / self.T + 0.008) / 1.008 * math.pi / 2
        signal = angle.cos() ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)

    def log_alpha_bars(self) -> Tensor:
        """ln abar(t), abar the share of the image in the variance of x_t: float64 [T], decreasing."""
        return torch.log1p(-self.betas()).cumsum(0)

    def alpha_bars(self) -> Tensor:
        """abar(t), float64 [T], decreasing."""
        return self.log_alpha_bars().exp()

    def sigmas(self, times: Sequence[int], low: float = 0.0, high: float = math.inf) -> Tensor:
        """Noise levels of time steps, cut to [low, high] (what a denoiser knows): float64 [K], in the given order."""
        kept = self.log_alpha_bars()[self._index(times)]
        return torch.expm1(-kept).sqrt().clamp(low, high)

    def sub_betas(self, times: Sequence[int]) -> Tensor:
        """beta' of the process that visits only these times, float64 [K]. They must be strictly increasing."""
        if list(times) != sorted(set(times)):
            raise UserError(f"times are {list(times)}; they must be strictly increasing")
        kept = self.log_alpha_bars()[self._index(times)]
        return -torch.expm1(torch.diff(kept, prepend=kept.new_zeros(1)))

    def known(self, low: float, high: float) -> range:
        """The time steps whose noise level lies in [low, high]. Raises UserError when there is none."""
        levels = self.sigmas(range(self.T))
        inside = torch.nonzero((levels >= low) & (levels <= high))[:, 0].tolist()
        if not inside:
            raise UserError(f"no time step of the {self.kind} schedule has a noise level in {low:g} to {high:g}")
        return range(inside[0], inside[-1] + 1)  # levels increase with time, so there are no holes

    def _index(self, times: Sequence[int]) -> Tensor:
        if not times or not all(0 <= t < self.T for t in times):
            raise UserError(f"times are {list(times)}; they must be one or more whole numbers in 0 to {self.T - 1}")
        return torch.tensor([int(t) for t in times])


def uniform_times(steps: int, total: int = 1000) -> tuple[int, ...]:
    """The "ddimK" sequence 0, n, 2n, ... below `total`; uniform_times(4) is (0, 250, 500, 750).

    Raises UserError when no stride n leaves exactly `steps`.
    """
    for stride in range(1, total + 1):
        if len(range(0, total, stride)) == steps:
            return tuple(range(0, total, stride))
    raise UserError(f"steps is {steps}; no even stride takes exactly so many of {total} time steps")

"""Jumps of a flow map down a list of noise levels, with noise put back between them (gamma-sampling).

Source   Kim et al. 2024 (arXiv 2310.02279), algorithm 3: from t_n jump below the next level t_{n+1}, to
         s = sqrt(1 - gamma^2) (t_{n+1} - sigma_min) + sigma_min, and add noise back up to t_{n+1}. gamma = 0 follows
         the trajectory; gamma = 1 is the multistep sampler of consistency models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.paths.grids import check_decreasing, check_stops
from imagewright.samplers.grid import check_steps, per_row
from imagewright.types import UNCONDITIONAL, Condition, FlowMap, ModelKind, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class Jumps:
    """Jump through the levels to the clean image.

    sigmas: where to stop on the way, decreasing; () = one jump. num_steps: how many jumps, in their place, whose stops
    are even in the time t = sigma / (sigma + shift) of the straight path. gamma: share of noise drawn anew at every
    stop, in [0, 1]. clip: keep the final image in [-1, 1].
    """

    model_kind: ClassVar[ModelKind] = "flow_map"

    sigmas: tuple[float, ...] = ()
    num_steps: int | None = None
    shift: float = 1.0
    gamma: float = 0.0
    clip: bool = True

    def __post_init__(self) -> None:
        check_decreasing("sampler.sigmas", self.sigmas)
        if self.num_steps is not None:
            check_steps(self.num_steps)
            if self.sigmas:
                raise UserError(
                    f"sampler.num_steps is {self.num_steps} and sampler.sigmas is {self.sigmas}; give one of them"
                )
        require_positive("sampler.shift", self.shift)
        if not 0 <= self.gamma <= 1:
            raise UserError(f"sampler.gamma is {self.gamma}; it must lie in [0, 1]")

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps or 1 + len(self.sigmas)

    def stops(self, sigma_max: float) -> tuple[float, ...]:
        """The levels on the way down from sigma_max."""
        if self.num_steps is None:
            return self.sigmas
        highest = sigma_max / (sigma_max + self.shift)
        times = [highest * left / self.num_steps for left in range(self.num_steps - 1, 0, -1)]
        return tuple(self.shift * t / (1 - t) for t in times)

    @torch.no_grad()
    def __call__(
        self,
        flow_map: FlowMap,
        latents: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """As `types.Sampler`; returns the dtype of the latents."""
        high, low = flow_map.sigma_max, flow_map.sigma_min
        sigmas = self.stops(high)
        if sigmas and self.gamma > 0 and noise is None:
            raise UserError(f"sampler.gamma is {self.gamma}; putting noise back needs a noise source")
        check_stops("sampler.sigmas", sigmas, low, high)
        x, sigma = latents * high, high
        for level in sigmas:
            below = low + math.sqrt(1 - self.gamma**2) * (level - low)
            x = self._jump(flow_map, x, sigma, below if self.gamma < 1 else 0.0, cond, on_step)
            if self.gamma > 0:
                assert noise is not None
                x = x + math.sqrt(level**2 - below**2) * noise.normal(x)
            sigma = level
        x = self._jump(flow_map, x, sigma, 0.0, cond, on_step)
        return x.clamp(-1, 1) if self.clip else x

    def _jump(
        self, flow_map: FlowMap, x: Tensor, sigma: float, to: float, cond: Condition, on_step: OnStep | None
    ) -> Tensor:
        landed = flow_map(x, per_row(x, sigma), per_row(x, to), cond)
        if on_step is not None:
            # The straight line of the jump, prolonged to the clean image.
            on_step(x, landed - to / (sigma - to) * (x - landed), sigma)
        return landed

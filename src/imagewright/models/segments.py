"""Multistep consistency models: flow maps that jump to the lower end of the segment that a noise level lies in.

Source   Heek et al. 2024 (arXiv 2403.06807), section 3. The paper's time t in [0, 1] is arctan(sigma), the cosine
         schedule, as a share of arctan(sigma_max), where it is cut off; the segments are [i / S, (i + 1) / S]. The
         network gives x_hat with EDM's wrapper and no boundary condition; the jump is DDIM's,
         x_hat + (sigma_to / sigma) (x - x_hat), which is the identity at the lower end whatever x_hat is.
"""

from __future__ import annotations

import math
from typing import Self

import torch
from torch import Tensor, nn

from imagewright.models.preconditioning import EDMPrecond, NoiseLabel, student_network
from imagewright.types import UNCONDITIONAL, Condition, UserError

TOLERANCE = 1e-4
"""Of a boundary, as a share of a segment: float32 noise levels are nearer, the next fine step is further away."""


def segment_boundaries(segments: int, sigma_max: float = 80.0) -> tuple[float, ...]:
    """Noise levels of the S + 1 boundaries, increasing from 0 to sigma_max: sigma_i = tan(i / S arctan(sigma_max)).

    Raises UserError unless segments >= 1 and 0 < sigma_max < inf.
    """
    if not isinstance(segments, int) or segments < 1:
        raise UserError(f"segments is {segments!r}; it must be a whole number of at least 1")
    if not 0 < sigma_max < math.inf:
        raise UserError(f"sigma_max is {sigma_max}; segments need one that is positive and finite")
    inner = [math.tan(i / segments * math.atan(sigma_max)) for i in range(1, segments)]
    return (0.0, *inner, float(sigma_max))


def segment_stops(segments: int, sigma_max: float = 80.0) -> tuple[float, ...]:
    """The inner boundaries, decreasing: `sigmas` of the sampler `Jumps` (gamma = 0) that draws in S evaluations."""
    return segment_boundaries(segments, sigma_max)[-2:0:-1]


class MultistepConsistencyModel(EDMPrecond):
    """x_hat(x, sigma), and the jump to the lower end of sigma's segment. One segment: a consistency model."""

    kind = "flow_map"
    settings = (*EDMPrecond.settings, "segments")

    def __init__(
        self,
        network: nn.Module,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        noise_label: NoiseLabel = "log",
        segments: int = 4,
    ) -> None:
        super().__init__(network, sigma_min, sigma_max, sigma_data, noise_label)
        self.boundaries = segment_boundaries(segments, self.sigma_max)
        self.segments = segments

    @property
    def stops(self) -> tuple[float, ...]:
        """The inner boundaries, decreasing: what `Jumps(sigmas=..., gamma=0)` has to be told."""
        return self.boundaries[-2:0:-1]

    def estimate(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        """x_hat, [N, C, H, W]: what DDIM needs to land on the trajectory's point at the lower end; sigma: [N], > 0."""
        return super().forward(x, sigma, cond)

    def forward(  # type: ignore[override]  # a flow map takes where to go before the condition
        self, x: Tensor, sigma: Tensor, sigma_to: Tensor, cond: Condition = UNCONDITIONAL
    ) -> Tensor:
        """As `types.FlowMap`; raises UserError (a ValueError) where sigma_to is not the segment's lower end."""
        wanted = (self._position(sigma) - TOLERANCE).ceil().clamp(1, self.segments) - 1
        wrong = (self._position(sigma_to) - wanted).abs() > TOLERANCE
        if wrong.device.type == "cpu" and wrong.any():
            start, end = (float(s[wrong.nonzero()[0, 0]]) for s in (sigma, sigma_to))
            raise UserError(
                f"sigma_to is {end:g} from {start:g}; this model only goes to the lower ends of its "
                f"{self.segments} segments (sampler jumps with sigmas {' '.join(f'{s:g}' for s in self.stops) or '()'})"
            )
        guess = self.estimate(x, sigma, cond)
        return guess + (sigma_to / sigma)[:, None, None, None].to(x.dtype) * (x - guess)

    @classmethod
    def from_denoiser(cls, denoiser: EDMPrecond, segments: int) -> Self:
        """A model that starts from a denoiser's weights, noise range, sigma_data and noise label."""
        network, d = student_network(denoiser), denoiser
        return cls(network, d.sigma_min, d.sigma_max, d.sigma_data, d.noise_label, segments).train()

    def _position(self, sigma: Tensor) -> Tensor:
        """Where a noise level lies, in segments from 0: S t."""
        wide = sigma.to(torch.promote_types(sigma.dtype, torch.float32))
        return self.segments / math.atan(self.sigma_max) * torch.atan(wide)

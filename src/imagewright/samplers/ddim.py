"""DDIM (Song et al. 2021, arXiv 2010.02502), equation 12, in a Denoiser's coordinates.

Order      1 (N calls for N steps). eta = 0 is Euler on the same levels; eta = 1 is DDPM's ancestral sampling.
Derived    with abar = 1 / (1 + sigma^2) and x = x_t / sqrt(abar), the paper's sigma_t becomes
           eta * sigma_next * sqrt(1 - sigma_next^2 / sigma^2).
Precision  state and grid in float64; the network in its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from imagewright.precision import wide
from imagewright.samplers.grid import OnGrid, per_row
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class DDIM(OnGrid):
    """Predict the image, put back part of the predicted noise and, for eta > 0, part fresh noise."""

    num_steps: int = 50
    grid: str = "cosine"
    eta: float = 0.0
    """Share of the ancestral noise, in [0, 1]."""
    overshoot: bool = False
    """Every step but the last goes as far as two, and noise is put back by one (Meng et al. 2022, 2210.03142, section
    3.3): for students that were trained for such steps. In place of eta."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise UserError(f"sampler.eta is {self.eta}; it must lie in [0, 1]")
        if self.eta > 0 and self.overshoot:
            raise UserError(f"sampler.eta is {self.eta}; it has no effect with sampler.overshoot, which says the noise")

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """As `types.Sampler`; returns float64. Raises UserError when eta > 0 and there is no noise source."""
        if (self.eta > 0 or self.overshoot) and noise is None:
            raise UserError(
                f"sampler.eta is {self.eta} and overshoot {self.overshoot}; a stochastic sampler needs a noise source"
            )
        sigmas: list[float] = self.sigmas(denoiser).tolist()
        x = wide(latents) * sigmas[0]
        for (sigma, sigma_next), beyond in zip(pairwise(sigmas), [*sigmas[2:], 0.0], strict=True):
            denoised = denoiser(x, per_row(x, sigma), cond)
            fresh = self.eta * sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
            if self.overshoot:
                fresh = math.sqrt(sigma_next**2 - beyond**2)
            x = denoised + math.sqrt(sigma_next**2 - fresh**2) / sigma * (x - denoised)
            if noise is not None and fresh > 0:
                x = x + fresh * noise.normal(x)
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x

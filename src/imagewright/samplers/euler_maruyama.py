"""Euler-Maruyama on the reverse SDE of the variance-exploding process (Song et al. 2021, arXiv 2011.13456, eq. 6).

Order      1 in distribution (N calls for N steps).
Time       the clock is sigma^2, so a step removes variance sigma^2 - sigma_next^2 and adds the same in fresh noise:
           x' = x + (sigma^2 - sigma_next^2) (D - x) / sigma^2 + sqrt(sigma^2 - sigma_next^2) z.
           The step to sigma = 0 adds none: it returns D (the usual last "denoising" step).
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
class EulerMaruyama(OnGrid):
    """The plain stochastic baseline; it takes hundreds of steps."""

    num_steps: int = 500

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
        """As `types.Sampler`; returns float64. Raises UserError when there is no noise source."""
        if noise is None:
            raise UserError("sampler EulerMaruyama is stochastic; it needs a noise source")
        sigmas: list[float] = self.sigmas(denoiser).tolist()
        x = wide(latents) * sigmas[0]
        for sigma, sigma_next in pairwise(sigmas):
            denoised = denoiser(x, per_row(x, sigma), cond)
            removed = sigma**2 - sigma_next**2
            x = x + removed / sigma**2 * (denoised - x)
            if sigma_next > 0:
                x = x + math.sqrt(removed) * noise.normal(x)
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x

"""DPM-Solver++ (2M), deterministic and stochastic (Lu et al. 2022, arXiv 2211.01095, algorithm 2 and appendix B).

Order      2 for eta = 0 (N calls for N steps; the first step and the one to sigma = 0 are of order 1).
Derived    a Denoiser's alpha is 1, so the half-log-SNR is lambda = -ln sigma, and over a step of length h the exact
           solution with a linear extrapolation of the data prediction D along lambda is
               x' = e^-h x + (1 - e^-h) (D + (D - D_before) / (2 r)),   r = h_before / h.
           The SDE's (eta = 1): x' = e^-2h x + (1 - e^-2h) (...) + sigma' sqrt(1 - e^-2h) z; other eta lie between.
Precision  state and grid in float64; the network in its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from imagewright.checks import require_non_negative
from imagewright.precision import wide
from imagewright.samplers.grid import OnGrid, per_row
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class DPMSolverPlusPlus(OnGrid):
    """Two-step solver of the flow (eta = 0) or of the reverse SDE (eta = 1) with one call per step."""

    grid: str = "log"
    eta: float = 0.0
    """Amount of fresh noise: 0 the ODE (2M), 1 the SDE (SDE-2M)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_non_negative("sampler.eta", self.eta)

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
        if self.eta > 0 and noise is None:
            raise UserError(f"sampler.eta is {self.eta}; a stochastic sampler needs a noise source")
        sigmas: list[float] = self.sigmas(denoiser).tolist()
        x = wide(latents) * sigmas[0]
        before: tuple[Tensor, float] | None = None  # the last data prediction, and the length of the step it began
        for sigma, sigma_next in pairwise(sigmas):
            denoised = denoiser(x, per_row(x, sigma), cond)
            if sigma_next == 0:
                x = denoised  # h is infinite: the exact step with a constant prediction
            else:
                h = math.log(sigma / sigma_next)
                target = denoised
                if before is not None:
                    target = denoised + h / (2 * before[1]) * (denoised - before[0])
                x = math.exp(-(1 + self.eta) * h) * x - math.expm1(-(1 + self.eta) * h) * target
                if noise is not None and self.eta > 0:
                    x = x + sigma_next * math.sqrt(-math.expm1(-2 * self.eta * h)) * noise.normal(x)
                before = denoised, h
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x

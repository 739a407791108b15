"""aDDIM, "adjusted" DDIM (Heek et al. 2024, arXiv 2403.06807, algorithm 3), in a Denoiser's coordinates.

Idea       DDIM with few steps loses variance: its x_hat is a mean. aDDIM stays deterministic and lengthens the noise
           that it puts back, so that the norm grows by the variance that x_hat lacks, x_var per number.
Derived    z = a x, so with r = sigma_next / sigma and d numbers an image:
           x_next = x_hat + sqrt(sigma_next^2 + d / |eps|^2 (1 - r)^2 x_var) eps,   eps = (x - x_hat) / sigma.
Order      1 (N calls for N steps). x_var = 0 is DDIM.
Precision  state and grid in float64; the network in its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from imagewright.checks import require_non_negative
from imagewright.precision import wide
from imagewright.samplers.grid import OnGrid, per_row
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, OnStep


@dataclass(frozen=True, kw_only=True)
class ADDIM(OnGrid):
    """Predict the image, and put the predicted noise back longer than DDIM does.

    The last step, to the clean image, is lengthened as well.
    """

    num_steps: int = 16
    grid: str = "cosine"
    variance: float = 0.1
    """x_var = variance / (2 + SNR), SNR = 1 / sigma^2: what an image's numbers vary by, given the noisy image; >= 0.
    The paper's value is for images in [-1, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_non_negative("sampler.variance", self.variance)

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
        """As `types.Sampler`; returns float64. No noise is drawn."""
        sigmas: list[float] = self.sigmas(denoiser).tolist()
        x = wide(latents) * sigmas[0]
        for sigma, sigma_next in pairwise(sigmas):
            at = per_row(x, sigma)
            denoised = denoiser(x, at, cond)
            x_var = self.variance / (2 + 1 / at**2)
            x = addim_step(x, denoised, at, per_row(x, sigma_next), x_var)
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x


def addim_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, x_var: Tensor) -> Tensor:
    """From x [N, ...] at sigma [N] to sigma_next [N] < sigma, x_var [N] being the variance to put back per number."""
    eps = (x - denoised) / _like(sigma, x)
    square = eps.flatten(1).square().mean(1).clamp(min=torch.finfo(eps.dtype).tiny)  # no noise at all stays none
    added = (1 - sigma_next / sigma) ** 2 * x_var / square
    return denoised + _like((sigma_next**2 + added).sqrt(), x) * eps


def _like(per_image: Tensor, x: Tensor) -> Tensor:
    return per_image.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

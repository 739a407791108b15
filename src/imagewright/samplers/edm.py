"""Euler and Heun along the probability-flow ODE, deterministic or with churn (Karras et al. 2022, algorithms 1 and 2).

Order      Heun 2 (2 N - 1 calls for N steps: the last step, to sigma = 0, is Euler's), Euler 1 (N calls).
Source     arXiv 2206.00364.
Precision  state and grid in float64; the network in its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from imagewright.precision import wide
from imagewright.samplers.grid import OnGrid, per_row
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class Heun(OnGrid):
    """The paper's sampler: second-order steps down the grid, then to 0; S_churn > 0 adds noise at every step.

    ImageNet-64's stochastic setting: num_steps 256, S_churn 40, S_min 0.05, S_max 50, S_noise 1.003.
    """

    second_order: ClassVar[bool] = True

    S_churn: float = 0.0
    """Total amount of noise added over the run; each step adds at most a factor sqrt(2)."""
    S_min: float = 0.0
    S_max: float = float("inf")
    """Noise is added only where the level lies in [S_min, S_max]."""
    S_noise: float = 1.0
    """Standard deviation of the added noise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_churn(self.S_churn, self.S_min, self.S_max, self.S_noise)

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return 2 * self.num_steps - 1 if self.second_order else self.num_steps

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
        """As `types.Sampler`; returns float64. Raises UserError when S_churn > 0 and there is no noise source."""
        if self.S_churn > 0 and noise is None:
            raise UserError(f"sampler.S_churn is {self.S_churn}; a stochastic sampler needs a noise source")
        sigmas: list[float] = self.sigmas(denoiser).tolist()
        x = wide(latents) * sigmas[0]
        for sigma, sigma_next in pairwise(sigmas):
            if noise is not None and self.S_churn > 0:
                inside = self.S_min <= sigma <= self.S_max
                gamma = min(self.S_churn / self.num_steps, math.sqrt(2) - 1) if inside else 0.0
                x, sigma = churned(denoiser, x, sigma, gamma, self.S_noise, noise)
            x, denoised = heun_step(denoiser, x, sigma, sigma_next, cond, second_order=self.second_order)
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x

    @torch.no_grad()
    def invert(
        self,
        denoiser: Denoiser,
        images: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """The latents of which the flow makes images [N, C, H, W], float64: the same levels upwards.

        An image is taken as the point at the lowest level. Two calls a step (one of first order), N - 1 steps.
        Raises UserError where the sampler draws at random.
        """
        if self.S_churn > 0:
            raise UserError(f"sampler.S_churn is {self.S_churn}; a stochastic sampler cannot be run backwards")
        sigmas: list[float] = self.sigmas(denoiser).tolist()[-2::-1]
        x = wide(images)
        for sigma, sigma_next in pairwise(sigmas):
            x, denoised = heun_step(denoiser, x, sigma, sigma_next, cond, second_order=self.second_order)
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x / sigmas[-1]


@dataclass(frozen=True, kw_only=True)
class Euler(Heun):
    """First-order steps on the same grid; without churn this is DDIM in EDM's coordinates."""

    second_order: ClassVar[bool] = False


def heun_step(
    denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float, cond: Condition, *, second_order: bool = True
) -> tuple[Tensor, Tensor]:
    """One step of the flow from sigma > 0 to sigma_next; to 0, or if not second_order, Euler's: (x, estimate of x0)."""
    denoised = denoiser(x, per_row(x, sigma), cond)
    slope = (x - denoised) / sigma
    euler = x + (sigma_next - sigma) * slope
    if not second_order or sigma_next == 0:
        return euler, denoised
    slope_next = (euler - denoiser(euler, per_row(x, sigma_next), cond)) / sigma_next
    return x + (sigma_next - sigma) * (slope + slope_next) / 2, denoised


def churned(
    denoiser: Denoiser, x: Tensor, sigma: float, gamma: float, S_noise: float, noise: Noise
) -> tuple[Tensor, float]:
    """Raise the noise level by the factor 1 + gamma, or to the nearest level the denoiser knows: (x, new sigma)."""
    raised = float(denoiser.round_sigma(torch.tensor(sigma + gamma * sigma, dtype=torch.float64)))
    # Drawn even for gamma = 0, so that a window does not change which numbers the later steps see.
    fresh = noise.normal(x)
    return x + math.sqrt(max(raised**2 - sigma**2, 0.0)) * S_noise * fresh, raised


def check_churn(S_churn: float, S_min: float, S_max: float, S_noise: float) -> None:
    """Raise UserError for negative amounts of noise and for an empty window."""
    if not (S_churn >= 0 and S_noise >= 0):
        raise UserError(f"sampler.S_churn is {S_churn} and S_noise is {S_noise}; neither may be negative")
    if not S_min <= S_max:
        raise UserError(f"sampler.S_min is {S_min} and S_max is {S_max}; they must satisfy S_min <= S_max")

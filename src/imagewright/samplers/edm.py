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

from imagewright.paths.schedules import karras_sigmas
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class Heun:
    """The paper's sampler: EDM's grid, then 0; second-order steps; S_churn > 0 adds noise at every step.

    sigma_min, sigma_max are cut to the denoiser's own range. ImageNet-64's stochastic setting: num_steps 256,
    S_churn 40, S_min 0.05, S_max 50, S_noise 1.003.
    """

    model_kind: ClassVar[str] = "denoiser"
    second_order: ClassVar[bool] = True

    num_steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    S_churn: float = 0.0
    """Total amount of noise added over the run; each step adds at most a factor sqrt(2)."""
    S_min: float = 0.0
    S_max: float = float("inf")
    """Noise is added only where the level lies in [S_min, S_max]."""
    S_noise: float = 1.0
    """Standard deviation of the added noise."""

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        check_churn(self.S_churn, self.S_min, self.S_max, self.S_noise)
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"sampler.sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}; "
                "they must satisfy 0 < sigma_min < sigma_max"
            )
        if not 0 < self.rho < math.inf:
            raise UserError(f"sampler.rho is {self.rho}; it must be positive and finite")

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return 2 * self.num_steps - 1 if self.second_order else self.num_steps

    def sigmas(self, denoiser: Denoiser) -> Tensor:
        """The noise levels of the steps, float64 [num_steps + 1], the last 0."""
        low, high = max(self.sigma_min, denoiser.sigma_min), min(self.sigma_max, denoiser.sigma_max)
        grid = denoiser.round_sigma(karras_sigmas(self.num_steps, low, high, self.rho))
        return torch.cat([grid.to(torch.float64).cpu(), torch.zeros(1, dtype=torch.float64)])

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
        x = latents.to(state_dtype(latents)) * sigmas[0]
        for sigma, sigma_next in pairwise(sigmas):
            if noise is not None and self.S_churn > 0:
                x, sigma = self._churn(denoiser, x, sigma, noise)
            x, denoised = self._step(denoiser, x, sigma, sigma_next, cond)
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x

    def _churn(self, denoiser: Denoiser, x: Tensor, sigma: float, noise: Noise) -> tuple[Tensor, float]:
        """Raise the noise level by a factor 1 + gamma, gamma = min(S_churn / N, sqrt(2) - 1) in the window, else 0."""
        inside = self.S_min <= sigma <= self.S_max
        gamma = min(self.S_churn / self.num_steps, math.sqrt(2) - 1) if inside else 0.0
        raised = float(denoiser.round_sigma(torch.tensor(sigma + gamma * sigma, dtype=torch.float64)))
        # Drawn at every step, so that the window does not change which numbers the later steps see.
        fresh = noise.normal(x)
        return x + math.sqrt(max(raised**2 - sigma**2, 0.0)) * self.S_noise * fresh, raised

    def _step(
        self, denoiser: Denoiser, x: Tensor, sigma: float, sigma_next: float, cond: Condition
    ) -> tuple[Tensor, Tensor]:
        denoised = denoiser(x, levels(x, sigma), cond)
        slope = (x - denoised) / sigma
        euler = x + (sigma_next - sigma) * slope
        if not self.second_order or sigma_next == 0:
            return euler, denoised
        slope_next = (euler - denoiser(euler, levels(x, sigma_next), cond)) / sigma_next
        return x + (sigma_next - sigma) * (slope + slope_next) / 2, denoised


@dataclass(frozen=True, kw_only=True)
class Euler(Heun):
    """First-order steps on the same grid; without churn this is DDIM in EDM's coordinates."""

    second_order: ClassVar[bool] = False


def levels(x: Tensor, sigma: float) -> Tensor:
    """One noise level for every image: [N], dtype and device of x."""
    return torch.full((len(x),), sigma, dtype=x.dtype, device=x.device)


def state_dtype(latents: Tensor) -> torch.dtype:
    """float64, except on devices that have none (Apple's)."""
    return torch.float32 if latents.device.type == "mps" else torch.float64


def check_steps(num_steps: int) -> None:
    """Raise UserError unless it is a whole number of at least 1."""
    if not isinstance(num_steps, int) or num_steps < 1:
        raise UserError(f"sampler.num_steps is {num_steps!r}; it must be at least 1, a whole number")


def check_churn(S_churn: float, S_min: float, S_max: float, S_noise: float) -> None:
    """Raise UserError for negative amounts of noise and for an empty window."""
    if not (S_churn >= 0 and S_noise >= 0):
        raise UserError(f"sampler.S_churn is {S_churn} and S_noise is {S_noise}; neither may be negative")
    if not S_min <= S_max:
        raise UserError(f"sampler.S_min is {S_min} and S_max is {S_max}; they must satisfy S_min <= S_max")

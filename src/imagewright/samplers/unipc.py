"""UniPC, a multistep predictor-corrector (Zhao et al. 2023, arXiv 2302.04867, algorithms 1 and 2, data prediction).

Order      `order` + 1 (N calls for N steps): the corrector uses the call that the next step needs anyway. The first
           steps have too little history for that, and the step to sigma = 0 is of order 1.
Derived    with alpha = 1 and lambda = -ln sigma, a step of length h from D_i is
               x' = e^-h x + (1 - e^-h) (D_i + sum_m rho_m (D_m - D_i) / r_m),   r_m = (lambda_m - lambda_i) / h
           over the history m; the corrector's sum also has the new point, r = 1. rho makes the step exact for data
           predictions that are polynomials in lambda. A single rho is 1/2 (the paper's B_2 variant).
Precision  state, grid and coefficients in float64; the network in its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from imagewright.precision import wide
from imagewright.samplers.grid import OnGrid, per_row
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, OnStep, UserError


@dataclass(frozen=True, kw_only=True)
class UniPC(OnGrid):
    """The predictor extrapolates `order` data predictions, the corrector adds the newest one."""

    grid: str = "log"
    order: int = 2
    """Of the predictor: how many data predictions it uses, 1 to 3."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise UserError(f"sampler.order is {self.order}; it must be 1, 2 or 3")

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
        """As `types.Sampler`; returns float64; deterministic."""
        sigmas: list[float] = self.sigmas(denoiser).tolist()
        x = wide(latents) * sigmas[0]
        history: list[tuple[float, Tensor]] = []  # (lambda, data prediction), newest last
        start = x  # corrected state at the beginning of the step that led to x
        for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
            denoised = denoiser(x, per_row(x, sigma), cond)
            now = -math.log(sigma)
            if i > 0:
                x = _advance(start, history[-self.order :], now, newest=denoised)
            history.append((now, denoised))
            start = x
            x = denoised if sigma_next == 0 else _advance(x, history[-self.order :], -math.log(sigma_next))
            if on_step is not None:
                on_step(x, denoised, sigma_next)
        return x


def _advance(
    x: Tensor, history: Sequence[tuple[float, Tensor]], lambda_next: float, newest: Tensor | None = None
) -> Tensor:
    """x from the level of the history's last entry to lambda_next; with `newest`, the prediction there, corrected."""
    lambda_now, denoised = history[-1]
    h = lambda_next - lambda_now
    ratios = [(at - lambda_now) / h for at, _ in history[:-1]]
    slopes = [(value - denoised) / r for r, (_, value) in zip(ratios, history[:-1], strict=True)]
    if newest is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, newest - denoised]
    x = math.exp(-h) * x - math.expm1(-h) * denoised
    for weight, slope in zip(_weights(tuple(ratios), h), slopes, strict=True):
        x = x - math.expm1(-h) * weight * slope
    return x


def _weights(ratios: tuple[float, ...], h: float) -> list[float]:
    """rho of the step: sum_m rho_m r_m^(k-1) = I_k / I_0 with I_k = int_0^h (s/h)^k e^(s-h) ds, for k = 1, 2, ..."""
    if len(ratios) <= 1:
        return [0.5] * len(ratios)
    total = -math.expm1(-h)
    moments, integral = [], total
    for k in range(1, len(ratios) + 1):
        integral = 1 - k * integral / h  # by parts
        moments.append(integral / total)
    matrix = np.array([[r ** (k - 1) for r in ratios] for k in range(1, len(ratios) + 1)])
    return [float(w) for w in np.linalg.solve(matrix, np.array(moments))]

"""Likelihood of images under a denoiser: the change of variables along its probability-flow ODE.

Source   Song et al. 2021 (arXiv 2011.13456), appendix D.2; Grathwohl et al. 2019 (FFJORD, 1810.01367) for the trace.
         In l = ln(sigma) the flow is dx/dl = x - D(x; e^l), so
             log p(x; sigma_min) = log N(x(sigma_max); 0, sigma_max^2) + integral of (d - tr dD/dx) dl,
         d being the number of values of an image. The integral is taken by the classical Runge-Kutta method of order 4.
Range    This is the density of what the flow makes of N(0, sigma_max^2), stopped at sigma_min. That of the data noised
         to sigma_min differs from it, for each image by about |mean of the data| / sigma_max.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from imagewright.types import UNCONDITIONAL, Condition, Denoiser, Noise, UserError

LEVEL_WIDTH = 2 / 255
"""Distance in [-1, 1] of neighbouring values of 8-bit images."""


def log_likelihood(
    denoiser: Denoiser,
    images: Tensor,
    cond: Condition = UNCONDITIONAL,
    *,
    noise: Noise | None = None,
    steps: int = 64,
    probes: int | None = 1,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> Tensor:
    """log p(images; sigma_min), natural, as a density over [-1, 1]; float64 [N].

    images: [N, C, H, W]; the state of the ODE is float64, the denoiser's inside is its own. steps: Runge-Kutta steps,
    even in ln sigma. probes: random signs per image in Hutchinson's estimate of the trace, which is unbiased and kept
    along the trajectory; None = the exact trace, for few dimensions. noise: draws the probes. sigma_min, sigma_max:
    the denoiser's by default. Cost: 4 * steps denoiser calls, each with `probes` (or C H W) backward passes.
    Raises UserError for numbers outside their ranges, and for probes without noise.
    """
    low = denoiser.sigma_min if sigma_min is None else sigma_min
    high = denoiser.sigma_max if sigma_max is None else sigma_max
    if not 0 < low < high < math.inf:
        raise UserError(
            f"sigma_min is {low} and sigma_max is {high}; they must satisfy 0 < sigma_min < sigma_max < inf"
        )
    if steps < 1 or (probes is not None and probes < 1):
        raise UserError(f"steps is {steps} and probes is {probes}; both must be at least 1 (probes: or none)")
    if probes is not None and noise is None:
        raise UserError(f"probes is {probes}; an estimate of the trace needs a noise source")
    x = images.detach().double()
    signs = [_signs(x, noise) for _ in range(probes or 0)] if noise is not None else []
    total = x.new_zeros(len(x))
    h = math.log(high / low) / steps
    for k in range(steps):
        start = math.log(low) + k * h
        slopes: list[tuple[Tensor, Tensor]] = []
        for share in (0.0, 0.5, 0.5, 1.0):
            at = x + share * h * slopes[-1][0] if slopes else x
            slopes.append(_slope(denoiser, at, start + share * h, cond, signs if probes else None))
        x = x + h * _simpson([dx for dx, _ in slopes])
        total = total + h * _simpson([divergence for _, divergence in slopes])
    prior = -0.5 * ((x / high).square() + math.log(2 * math.pi * high**2)).flatten(1).sum(1)
    return prior + total


def bits_per_dim(log_density: Tensor, dimension: int, level_width: float = LEVEL_WIDTH) -> Tensor:
    """Bits per value of discrete images from their log-density [N], natural, at `dequantised` points.

    dimension: values of an image. level_width: distance of neighbouring levels. An upper bound of the discrete
    likelihood's, in expectation (Theis et al. 2016, 1511.01844, section 3.1).
    """
    return -(log_density / dimension + math.log(level_width)) / math.log(2)


def dequantised(images: Tensor, noise: Noise, level_width: float = LEVEL_WIDTH) -> Tensor:
    """Images on discrete levels spread evenly over the bins around them; shape and dtype of images."""
    return images + level_width * (noise.uniform(images) - 0.5)


def _simpson(slopes: list[Tensor]) -> Tensor:
    first, second, third, fourth = slopes
    return (first + 2 * second + 2 * third + fourth) / 6


def _signs(x: Tensor, noise: Noise) -> Tensor:
    return torch.where(noise.uniform(x) < 0.5, -1.0, 1.0).to(x)


def _slope(
    denoiser: Denoiser, x: Tensor, log_sigma: float, cond: Condition, signs: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    """dx/dl, and its divergence [N]: an estimate from signs, or exact where there are none."""
    with torch.enable_grad():
        at = x.detach().requires_grad_(True)
        denoised = denoiser(at, torch.full((len(x),), math.exp(log_sigma), dtype=x.dtype, device=x.device), cond)
        trace = _exact_trace(denoised, at) if signs is None else _estimated_trace(denoised, at, signs)
    return x - denoised.detach(), x[0].numel() - trace


def _estimated_trace(denoised: Tensor, x: Tensor, signs: list[Tensor]) -> Tensor:
    parts = []
    for sign in signs:
        (row,) = torch.autograd.grad(denoised, x, sign, retain_graph=True)
        parts.append((row * sign).flatten(1).sum(1))
    return torch.stack(parts).mean(0)


def _exact_trace(denoised: Tensor, x: Tensor) -> Tensor:
    flat = denoised.flatten(1)
    trace = x.new_zeros(len(x))
    for k in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, k].sum(), x, retain_graph=True)
        trace = trace + row.flatten(1)[:, k]
    return trace

"""Schedules gamma(t), t in [0, 1], of x_t = sqrt(gamma) x0 + sqrt(1 - gamma) eps: those of analog bits.

    cosine   cos^2((t + 0.0002) / 1.00025 pi / 2)
    linear   1 - t, at least 1e-9

Source   Chen et al. 2022 (arXiv 2208.04202), appendix; its released program. In a Denoiser's coordinates the noise
         level is sqrt((1 - gamma) / gamma): the cosine's runs from 3.1e-4 to 12,700.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from imagewright.types import UserError

LEAST = 1e-9
"""Of gamma, where a schedule would end at 0."""


def cosine(t: Tensor) -> Tensor:
    """The paper's."""
    return torch.cos((t + 0.0002) / 1.00025 * (math.pi / 2)) ** 2


def linear(t: Tensor) -> Tensor:
    """1 - t, which needs a least value."""
    return (1 - t).clamp(LEAST, 1.0)


GAMMAS: Mapping[str, Callable[[Tensor], Tensor]] = {"cosine": cosine, "linear": linear}


def gamma(schedule: str, t: Tensor) -> Tensor:
    """gamma at times t in [0, 1], any shape and dtype. Raises UserError for a schedule that there is not."""
    if schedule not in GAMMAS:
        raise UserError(f"schedule is {schedule!r}; it must be one of {', '.join(GAMMAS)}")
    return GAMMAS[schedule](t)


def sigma_of(gamma: Tensor) -> Tensor:
    """The noise level of a Denoiser, relative to the image."""
    return ((1 - gamma) / gamma).sqrt()


def sigma_range(schedule: str) -> tuple[float, float]:
    """Noise levels at t = 0 and t = 1; the linear schedule's first is 0."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")
    low, high = sigma_of(gamma(schedule, ends)).tolist()
    return low, high

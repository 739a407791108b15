"""Denoisers around networks that were trained at numbered steps of a variance-preserving process.

Source   Ho et al. 2020 (arXiv 2006.11239) for the steps and the linear schedule, Nichol and Dhariwal 2021 (2102.09672)
         for the cosine one, Salimans and Ho 2022 (2202.00512) for v. With a_t the product of 1 - beta up to step t, its
         noise level is sigma_t = sqrt(1 / a_t - 1), and x_t = (x0 + sigma_t eps) / sqrt(1 + sigma_t^2).

           prediction   c_skip            c_out
           epsilon      1                 -sigma
           v            1 / (1 + s^2)     -sigma / sqrt(1 + s^2)
           sample       0                 1
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from imagewright.checks import require_positive
from imagewright.models.preconditioning import Preconditioned, Scalings
from imagewright.types import UserError

Schedule = Literal["linear", "scaled_linear", "cosine"]
Prediction = Literal["epsilon", "v", "sample"]


class TimestepPrecond(Preconditioned):
    """D(x; sigma) of a network that knows `steps` noise levels by their numbers; sigma is rounded to the nearest.

    schedule: "linear", betas even from beta_start to beta_end; "scaled_linear", their roots even; "cosine", which has
    no ends. Raises UserError for a value outside its range.
    """

    settings = ("schedule", "steps", "beta_start", "beta_end", "prediction")
    levels: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule = "linear",
        steps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        prediction: Prediction = "epsilon",
    ) -> None:
        super().__init__(network)
        for name, value, allowed in (("schedule", schedule, Schedule), ("prediction", prediction, Prediction)):
            if value not in get_args(allowed):
                raise UserError(f"{name} is {value!r}; it must be one of {', '.join(get_args(allowed))}")
        if not isinstance(steps, int) or not 2 <= steps <= 10_000:
            raise UserError(f"steps is {steps!r}; it must be an integer from 2 to 10000")
        for name, beta in (("beta_start", beta_start), ("beta_end", beta_end)):
            require_positive(name, beta)
            if beta >= 1:
                raise UserError(f"{name} is {beta}; it must be below 1")
        self.schedule, self.steps, self.prediction = schedule, steps, prediction
        self.beta_start, self.beta_end = float(beta_start), float(beta_end)
        levels = noise_levels(schedule, steps, self.beta_start, self.beta_end).float()
        self.register_buffer("levels", levels, persistent=False)
        self.sigma_min, self.sigma_max = float(levels[0]), float(levels[-1])

    def round_sigma(self, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma)
        return self.levels[self._step(sigma)].to(sigma)

    def _step(self, sigma: Tensor) -> Tensor:
        return (sigma.to(self.levels)[..., None] - self.levels).abs().argmin(-1)

    def scalings(self, sigma: Tensor) -> Scalings:
        total = sigma**2 + 1
        c_in, one = total.rsqrt(), torch.ones_like(sigma)
        match self.prediction:
            case "epsilon":
                c_skip, c_out = one, -sigma
            case "v":
                c_skip, c_out = 1 / total, -sigma * c_in
            case "sample":
                c_skip, c_out = torch.zeros_like(sigma), one
        return Scalings(c_skip=c_skip, c_out=c_out, c_in=c_in, c_noise=self._step(sigma).to(sigma.dtype))


def noise_levels(schedule: Schedule, steps: int, beta_start: float, beta_end: float) -> Tensor:
    """sigma of every step, rising, float64 [steps], on the CPU also of a model that is only planned."""
    i = torch.arange(steps, dtype=torch.float64, device="cpu")
    match schedule:
        case "linear":
            beta = beta_start + i * (beta_end - beta_start) / (steps - 1)
        case "scaled_linear":
            root = beta_start**0.5 + i * (beta_end**0.5 - beta_start**0.5) / (steps - 1)
            beta = root**2
        case "cosine":
            kept = (((torch.cat([i, i[-1:] + 1]) / steps + 0.008) / 1.008) * math.pi / 2).cos() ** 2
            beta = (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
    return (1 / (1 - beta).cumprod(0) - 1).sqrt()

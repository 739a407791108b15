"""The sampler of analog bits: DDIM or DDPM, each estimate clipped, the last returned (Chen et al. 2022, 2208.04202).

State      x_t = sqrt(g) x0 + sqrt(1 - g) eps, g = gamma(t), t = 1 - i / T at step i of T.
Step       x0 is the model's estimate, clipped to what data can be; eps is recomputed from it; then
           ddim   x = sqrt(g') x0 + sqrt(1 - g') eps
           ddpm   a = g / g';  x = (x - (1 - a) / sqrt(1 - g) eps) / sqrt(a) + sqrt(v) z,  v = 1 - a; of "ddpm-small"
                  v = (1 - a) (1 - g') / (1 - g)
Intervals  asymmetric: g' is that of t' = max(1 - (i + 1 + ahead) / T, 0), but the model is told t of the even times:
           td of the released program, in steps; a popular port counts it in units of T.
Returns    the last x0, not x.
Departs    A denoiser that knows fewer noise levels than the schedule has (EDM's stop at 80) is asked at the nearest
           that it knows, and gamma is that level's.
Precision  state and gamma in float64; the network in its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from imagewright.checks import require_non_negative
from imagewright.paths.gammas import gamma
from imagewright.precision import wide
from imagewright.samplers.grid import check_steps, per_row
from imagewright.types import UNCONDITIONAL, Condition, ModelKind, Noise, OnStep, UserError

Rule = Literal["ddim", "ddpm", "ddpm-small"]


@dataclass(frozen=True, kw_only=True)
class BitDiffusion:
    """Draws from a denoiser in `num_steps` evaluations, of bits or of images."""

    model_kind: ClassVar[ModelKind] = "denoiser"

    num_steps: int = 100
    """T."""
    rule: Rule = "ddpm"
    """ddim, without fresh noise; ddpm; ddpm-small, with the smaller of the two usual variances."""
    ahead: float = 0.0
    """By how many steps the state runs ahead of what the model is told, >= 0: 1 to 3 help where steps are few."""
    schedule: str = "cosine"
    """gamma: cosine, linear."""
    clip: bool = True
    """Clip each estimate to [-1, 1], or to the size of bits."""

    def __post_init__(self) -> None:
        check_steps(self.num_steps)
        if self.rule not in get_args(Rule):
            raise UserError(f"sampler.rule is {self.rule!r}; it must be one of {', '.join(get_args(Rule))}")
        require_non_negative("sampler.ahead", self.ahead)
        gamma(self.schedule, torch.zeros(1))

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps

    def gammas(self, denoiser: Any) -> list[tuple[float, float]]:
        """Of each step, what the model is told and where the state goes, within the denoiser's noise levels."""
        i = torch.arange(self.num_steps, dtype=torch.float64)
        now, after = 1 - i / self.num_steps, (1 - (i + 1 + self.ahead) / self.num_steps).clamp(min=0.0)
        least, most = (1 / (1 + level**2) for level in (denoiser.sigma_max, denoiser.sigma_min))
        told, gone = (gamma(self.schedule, t).clamp(least, most).tolist() for t in (now, after))
        return list(zip(told, gone, strict=True))

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Any,
        latents: Tensor,
        cond: Condition = UNCONDITIONAL,
        *,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """As `types.Sampler`; returns float64. Raises UserError where ddpm has no noise source."""
        if noise is None and self.rule != "ddim":
            raise UserError(f"sampler.rule is {self.rule!r}; a stochastic sampler needs a noise source")
        bound = getattr(denoiser, "bound", 1.0)
        x = x0 = wide(latents)
        for i, (now, after) in enumerate(self.gammas(denoiser)):
            sigma, scaled = math.sqrt((1 - now) / now), x / math.sqrt(now)
            x0 = denoiser(scaled, per_row(x, sigma), cond)
            x0 = x0.clamp(-bound, bound) if self.clip else x0
            if on_step is not None:
                on_step(scaled, x0, sigma)
            if i < self.num_steps - 1:
                x = self.moved(x, x0, now, after, noise)
        return x0

    def moved(self, x: Tensor, x0: Tensor, now: float, after: float, noise: Noise | None) -> Tensor:
        """The state [N, ...] at gamma `after`, from that at `now` and the estimate of x0."""
        eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)
        if self.rule == "ddim" or noise is None:
            return math.sqrt(after) * x0 + math.sqrt(1 - after) * eps
        ratio = min(now / after, 1.0)
        mean = (x - (1 - ratio) / math.sqrt(1 - now) * eps) / math.sqrt(ratio)
        variance = (1 - ratio) * ((1 - after) / (1 - now) if self.rule == "ddpm-small" else 1.0)
        return mean + math.sqrt(variance) * noise.normal(x)

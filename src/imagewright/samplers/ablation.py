"""The general sampler of Karras et al. 2022: any grid, schedule, scaling and one- or two-stage solver of table 1.

Order      Heun 2 (2 N - 1 calls for N steps: the last step, to t = 0, is Euler's), Euler 1 (N calls).
State      x_t = s(t) (x0 + sigma(t) eps), as DDIM, DDPM++ and NCSN++ samplers have it; `Heun` is the special case of
           EDM's grid, sigma = t and s = 1.
Source     arXiv 2206.00364, table 1 and equation 4; second-order family of appendix D.2; churn of algorithm 2.
Precision  state and clock in float64; the network in its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from imagewright.paths.schedules import (
    EDMGrid,
    Grid,
    IDDPMGrid,
    LinearSchedule,
    NoScaling,
    Scaling,
    Schedule,
    VEGrid,
    VESchedule,
    VPGrid,
    VPScaling,
    VPSchedule,
    time_steps,
)
from imagewright.precision import wide
from imagewright.samplers.edm import check_churn
from imagewright.samplers.grid import check_steps, per_row
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, ModelKind, Noise, OnStep, UserError

Solver = Literal["heun", "euler"]
GridName = Literal["edm", "vp", "ve", "iddpm"]
ScheduleName = Literal["linear", "vp", "ve"]
ScalingName = Literal["none", "vp"]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One combination of table 1: which noise levels, on which clock, at which scale, by which solver."""

    model_kind: ClassVar[ModelKind] = "denoiser"

    num_steps: int = 18
    solver: Solver = "heun"
    alpha: float = 1.0
    """Where in a step the second slope is taken, in (0, 1]: 1 Heun, 1/2 midpoint, 2/3 Ralston."""
    grid: GridName = "edm"
    schedule: ScheduleName = "linear"
    scaling: ScalingName = "none"
    sigma_min: float | None = None
    """Ends of the grid, cut to the denoiser's own range; None = those of the method that the grid comes from."""
    sigma_max: float | None = None
    rho: float = 7.0
    """Of grid "edm"."""
    epsilon_s: float = 1e-3
    """Last time of grid "vp", and where schedule "vp" meets sigma_min."""
    C_1: float = 0.001
    """C_1, C_2, M: table of grid "iddpm"."""
    C_2: float = 0.008
    M: int = 1000
    S_churn: float = 0.0
    """Total amount of noise added over the run; each step adds at most a factor sqrt(2)."""
    S_min: float = 0.0
    S_max: float = float("inf")
    """Noise is added only where the level lies in [S_min, S_max]."""
    S_noise: float = 1.0
    """Standard deviation of the added noise."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("solver", get_args(Solver)),
            ("grid", get_args(GridName)),
            ("schedule", get_args(ScheduleName)),
            ("scaling", get_args(ScalingName)),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"sampler.{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        check_steps(self.num_steps)
        check_churn(self.S_churn, self.S_min, self.S_max, self.S_noise)
        if not 0 < self.alpha <= 1:
            raise UserError(f"sampler.alpha is {self.alpha}; it must lie in (0, 1]")
        low, high = self._grid().default_range
        low, high = self.sigma_min or low, self.sigma_max or high
        if not (0 < low < high < math.inf and self.sigma_min != 0 and self.sigma_max != 0):
            raise UserError(
                f"sampler.sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}; "
                f"they must satisfy 0 < sigma_min < sigma_max < inf (grid {self.grid!r} has {low:g} and {high:g})"
            )

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return 2 * self.num_steps - 1 if self.solver == "heun" else self.num_steps

    def times(self, denoiser: Denoiser) -> tuple[Tensor, Schedule]:
        """Times of the steps, float64 [num_steps + 1], the last 0, and the schedule whose times they are."""
        grid = self._grid()
        low, high = grid.default_range
        low = max(low if self.sigma_min is None else self.sigma_min, denoiser.sigma_min)
        high = min(high if self.sigma_max is None else self.sigma_max, denoiser.sigma_max)
        schedule: Schedule = LinearSchedule()
        if self.schedule == "vp":
            schedule = VPSchedule.through(low, high, self.epsilon_s)
        elif self.schedule == "ve":
            schedule = VESchedule()
        return time_steps(grid, schedule, self.num_steps, low, high, denoiser.round_sigma), schedule

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
        times, schedule = self.times(denoiser)
        flow = _Flow(denoiser, cond, schedule, VPScaling() if self.scaling == "vp" else NoScaling())
        points = [flow.at(t) for t in times.tolist()]
        x = wide(latents) * (points[0].sigma * points[0].scale)
        for here, following in pairwise(points):
            if noise is not None and self.S_churn > 0:
                x, here = self._churn(flow, x, here, noise)
            x, denoised = self._step(flow, x, here, following)
            if on_step is not None:
                on_step(x / following.scale, denoised, following.sigma)
        return x

    def _grid(self) -> Grid:
        if self.grid == "vp":
            return VPGrid(epsilon_s=self.epsilon_s)
        if self.grid == "iddpm":
            return IDDPMGrid(C_1=self.C_1, C_2=self.C_2, M=self.M)
        return VEGrid() if self.grid == "ve" else EDMGrid(rho=self.rho)

    def _churn(self, flow: _Flow, x: Tensor, here: _Point, noise: Noise) -> tuple[Tensor, _Point]:
        """Raise the noise level as algorithm 2 does, and go back to the time at which the schedule has it."""
        inside = self.S_min <= here.sigma <= self.S_max
        gamma = min(self.S_churn / self.num_steps, math.sqrt(2) - 1) if inside else 0.0
        raised = flow.at_level(here.sigma + gamma * here.sigma)
        # Drawn at every step, so that the window does not change which numbers the later steps see.
        fresh = noise.normal(x)
        added = math.sqrt(max(raised.sigma**2 - here.sigma**2, 0.0)) * self.S_noise
        return raised.scale / here.scale * x + raised.scale * added * fresh, raised

    def _step(self, flow: _Flow, x: Tensor, here: _Point, following: _Point) -> tuple[Tensor, Tensor]:
        step = following.t - here.t
        slope, denoised = flow.slope(x, here)
        if self.solver == "euler" or following.t == 0:
            return x + step * slope, denoised
        between = following if self.alpha == 1 else flow.at(here.t + self.alpha * step)
        slope_between, _ = flow.slope(x + self.alpha * step * slope, between)
        weight = 1 / (2 * self.alpha)
        return x + step * ((1 - weight) * slope + weight * slope_between), denoised


class _Point(NamedTuple):
    """Schedule and scaling at one time."""

    t: float
    sigma: float
    sigma_prime: float
    scale: float
    scale_prime: float


@dataclass(frozen=True)
class _Flow:
    """The probability-flow ODE of a denoiser on a schedule and a scaling."""

    denoiser: Denoiser
    cond: Condition
    schedule: Schedule
    scaling: Scaling

    def at(self, t: float) -> _Point:
        """The point of time t; at t = 0 the derivatives may be infinite or nan, and are not used."""
        time = torch.tensor(t, dtype=torch.float64)
        return _Point(
            t,
            float(self.schedule.sigma(time)),
            float(self.schedule.sigma_prime(time)),
            float(self.scaling.scale(time, self.schedule)),
            float(self.scaling.scale_prime(time, self.schedule)),
        )

    def at_level(self, sigma: float) -> _Point:
        """The point at the noise level nearest to sigma that the denoiser knows."""
        level = self.denoiser.round_sigma(torch.tensor(sigma, dtype=torch.float64)).double()
        return self.at(float(self.schedule.time_of(level)))

    def slope(self, x: Tensor, p: _Point) -> tuple[Tensor, Tensor]:
        """dx/dt and the denoised image: equation 4, (sigma'/sigma + s'/s) x - (sigma' s/sigma) D(x/s; sigma)."""
        denoised = self.denoiser(x / p.scale, per_row(x, p.sigma), self.cond)
        rate = p.sigma_prime / p.sigma
        return (rate + p.scale_prime / p.scale) * x - rate * p.scale * denoised, denoised

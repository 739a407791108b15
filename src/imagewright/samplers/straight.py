"""Steps in the time of the straight path, x_t = (1 - t) x0 + t z: how rectified flows draw.

Rules      order 1: Euler (N calls for N steps). Order 2: a call at t + r (t' - t) between, and the velocities' mix
           (1 - 1 / 2r) v + 1 / 2r v'; r = 1 is Heun's rule, 1/2 the midpoint's (2 N - 1 calls: the last step, to 0, is
           Euler's). Euler's steps are DDIM's on the same levels; the second-order ones are not EDM's, whose slopes are
           of another time.
Grids      uniform; sigmoid, dense at both ends (Kim et al. 2024, arXiv 2410.07815), t_i = (S(k (1/2 - i/N)) - S(-k/2))
           / (S(k/2) - S(-k/2)); or the times themselves. Both may be shifted: sigma = t / (1 - t) is divided by
           `shift`, t <- t / (t + shift (1 - t)), so that below 1 more steps are where noise is strong (Esser et al.
           2024, 2403.03206, eq. 23, whose alpha is 1 / shift; LightningDiT, Yao et al. 2025, 2501.01423: 0.3).
Noise      keep_noise: Lee et al. 2024 (2405.20320), section 4.4: the next point is the estimate of the image mixed with
           the *first* noise, x_t' = (1 - t') x0 + t' z, whatever the velocity says of the noise. Equal to the plain
           rule where the path is straight.
Start      at t = 1 - 1e-5, x = t z, as in the official program of the latter. A denoiser that knows less noise is asked
           at its sigma_max about the point with the same bounded coordinate (`paths.conversions.velocity_of`).
Precision  state and times in float64; the network in its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.paths.conversions import velocity_of
from imagewright.paths.gaussian import Linear
from imagewright.precision import wide
from imagewright.samplers.grid import check_steps, per_row
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, ModelKind, Noise, OnStep, UserError

TimeGrid = Literal["uniform", "sigmoid"]
START = 1 - 1e-5
"""The first time, where sigma is still finite."""
INVERSION = 1e-3
"""The time at which an image is taken to be when it is turned into noise."""


@dataclass(frozen=True, kw_only=True)
class Straight:
    """Draw along the straight path of a flow, or of any denoiser."""

    model_kind: ClassVar[ModelKind] = "denoiser"

    num_steps: int = 5
    order: int = 2
    """1, Euler; 2, a second call within each step but the last."""
    r: float = 1.0
    """Where that call is, as a share of the step, in (0, 1]: 1 Heun, 0.5 midpoint (order 2)."""
    grid: TimeGrid = "uniform"
    sharpness: float = 20.0
    """k of the sigmoid grid; towards 0 it is the uniform one."""
    shift: float = 1.0
    """What divides the grid's noise levels."""
    times: tuple[float, ...] = ()
    """The times themselves, decreasing, in (0, 1); num_steps is then their number."""
    keep_noise: bool = False
    """Mix every estimate of the image with the first noise."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        if self.times:
            if not 0 < self.times[-1] <= self.times[0] <= 1 or list(self.times) != sorted(set(self.times))[::-1]:
                raise UserError(f"sampler.times is {self.times}; they must be strictly decreasing and lie in (0, 1]")
            object.__setattr__(self, "num_steps", len(self.times))
        check_steps(self.num_steps)
        if self.order not in (1, 2):
            raise UserError(f"sampler.order is {self.order}; allowed: 1, 2")
        if not 0 < self.r <= 1:
            raise UserError(f"sampler.r is {self.r}; it must lie in (0, 1]")
        if self.grid not in get_args(TimeGrid):
            raise UserError(f"sampler.grid is {self.grid!r}; it must be one of {', '.join(get_args(TimeGrid))}")
        require_positive("sampler.sharpness", self.sharpness)
        require_positive("sampler.shift", self.shift)
        if self.times and self.shift != 1:
            raise UserError(f"sampler.shift is {self.shift}; it has no effect on sampler.times")

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.num_steps if self.order == 1 else 2 * self.num_steps - 1

    def visited(self) -> list[float]:
        """The times of the steps and a final 0: [num_steps + 1], decreasing, the first at most 1 - 1e-5."""
        if self.times:
            times = [*self.times, 0.0]
        elif self.grid == "uniform":
            times = [1 - i / self.num_steps for i in range(self.num_steps)] + [0.0]
        else:
            times = sigmoid_times(self.num_steps, self.sharpness)
        times = [shifted(t, self.shift) for t in times]
        return [min(times[0], START), *times[1:]]

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
        """As `types.Sampler`; returns float64."""
        velocity, times = velocity_of(denoiser, Linear()), self.visited()
        kept = x = wide(latents) * times[0]
        for t, t_next in pairwise(times):
            v = velocity(x, per_row(x, t), cond)
            if self.order == 2 and t_next > 0:
                between = t + self.r * (t_next - t)
                again = velocity(self._moved(x, kept, v, t, between), per_row(x, between), cond)
                v = v + (again - v) / (2 * self.r)
            x, x0 = self._moved(x, kept, v, t, t_next), x - t * v
            if on_step is not None:
                on_step(x / (1 - t_next), x0, t_next / (1 - t_next))
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
        """The latents of which the flow makes images [N, C, H, W], float64: the same times upwards, as many calls.

        It begins at t = 1e-3, with that much of a noise that is drawn, or without one of none, and ends at t = 1.
        keep_noise has no part in it: the noise is what is looked for. Lee et al. 2024, section 4.5.
        """
        velocity, times = velocity_of(denoiser, Linear()), [INVERSION, *self.visited()[-2:0:-1], 1.0]
        x = (1 - INVERSION) * wide(images)
        x = x if noise is None else x + INVERSION * noise.normal(x)
        plain = replace(self, keep_noise=False)
        for t, t_next in pairwise(times):
            v = velocity(x, per_row(x, t), cond)
            if self.order == 2 and t_next < 1:
                between = t + self.r * (t_next - t)
                v = v + (velocity(plain._moved(x, x, v, t, between), per_row(x, between), cond) - v) / (2 * self.r)
            x, x0 = plain._moved(x, x, v, t, t_next), x - t * v
            if on_step is not None and t_next < 1:
                on_step(x / (1 - t_next), x0, t_next / (1 - t_next))
        return x

    def _moved(self, x: Tensor, kept: Tensor, v: Tensor, t: float, t_next: float) -> Tensor:
        """The point at t_next from x at t with the velocity v; kept: the first point."""
        if self.keep_noise:
            return (1 - t_next) * (x - t * v) + t_next * kept
        return x + (t_next - t) * v


@torch.no_grad()
def straightness(
    denoiser: Denoiser, latents: Tensor, cond: Condition = UNCONDITIONAL, *, num_steps: int = 32
) -> Tensor:
    """How far trajectories are from straight lines: the mean of |(z - x) - v(x_t, t)|^2 along each, per number, [N].

    z, x: its own ends; 0 where one step is exact. By Euler's steps of equal time, one call each. The official program
    of Lee et al. counts the first step as long as the others, which is 1e-5 longer.
    """
    velocity, times = velocity_of(denoiser, Linear()), Straight(num_steps=num_steps, order=1).visited()
    start = x = wide(latents) * times[0]
    along = []
    for t, t_next in pairwise(times):
        along.append(velocity(x, per_row(x, t), cond))
        x = x + (t_next - t) * along[-1]
    off = torch.stack(along) - (start - x) / times[0]
    return off.square().flatten(2).mean((0, 2))


def shifted(t: float, shift: float) -> float:
    """The time whose noise level is that of t divided by `shift`; 0 and 1 stay."""
    return t / (t + shift * (1 - t))


def sigmoid_times(n: int, sharpness: float) -> list[float]:
    """n + 1 times from 1 to 0, dense at both ends: t_i + t_(n - i) = 1."""
    low, high = (1 / (1 + math.exp(side * sharpness / 2)) for side in (1, -1))
    inner = (1 / (1 + math.exp(-sharpness * (0.5 - i / n))) for i in range(n + 1))
    return [(each - low) / (high - low) for each in inner]

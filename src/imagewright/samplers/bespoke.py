"""Bespoke solvers (Shaul et al. 2023, arXiv 2310.19075): Euler or midpoint steps in learnt time and scale coordinates.

Order      of the base solver: 1 (Euler, N calls for N steps) or 2 (midpoint, 2 N calls).
Ingredients  the straight path, time as in the paper: t = 0 noise, t = 1 image, dx/dt = u_t(x). With
           xbar(r) = s_r x(t_r) the flow is dxbar/dr = (s'/s) xbar + t' s u_t(xbar / s); a base step of size h = 1 / N
           in r, divided by s again, is `bespoke_step` (the paper's RK1- and RK2-Bespoke). Values and derivatives of
           t_r and s_r are independent numbers; t_0 = 0, t_1 = 1 and s_0 = 1 are fixed, s_1 is free.
           `tuning.bespoke` learns them.
Derived    u_t(x) is minus the library's velocity on `paths.Linear` at time 1 - t. Above sigma_max it follows
           `velocity_of`; below sigma_min it stays, as a function of x, what it is there: so it is defined to t = 1.
Departs    where the denoiser has a table of levels it is not asked at entries alone: learnt times lie between them.
Precision  state and coefficients in float64; the network in its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from imagewright.paths.conversions import PathNetwork, velocity_of
from imagewright.paths.gaussian import Linear, per_image
from imagewright.precision import wide, widest
from imagewright.samplers.grid import check_steps
from imagewright.types import UNCONDITIONAL, Condition, Denoiser, ModelKind, Noise, OnStep, UserError


class Change(NamedTuple):
    """A change of time and scale at the m evaluations of a solver, and its values at the end r = 1."""

    times: Tensor
    """t_r, [m + 1], increasing from 0 to 1."""
    times_prime: Tensor
    """dt/dr, [m], > 0."""
    scales: Tensor
    """s_r, [m + 1], > 0, the first is 1."""
    scales_prime: Tensor
    """ds/dr, [m]."""


@dataclass(frozen=True, kw_only=True)
class Bespoke:
    """A learnt solver. Empty tuples are the identity's: t = r, t' = 1, s = 1, s' = 0, the base solver itself.

    The tuples hold one number for each of the m = order * num_steps evaluations, `times` and `scales` one more, for
    the end. They are good for the model they were learnt on, its guidance and condition included.
    """

    model_kind: ClassVar[ModelKind] = "denoiser"

    num_steps: int = 5
    """With any tuple given it is what their lengths say."""
    order: int = 2
    """Of the base solver: 1 is Euler, 2 midpoint."""
    times: tuple[float, ...] = ()
    """t_r: 0 is noise, 1 the image."""
    times_prime: tuple[float, ...] = ()
    scales: tuple[float, ...] = ()
    scales_prime: tuple[float, ...] = ()
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    """Noise levels beyond which the denoiser is not asked; cut to its own range."""

    def __post_init__(self) -> None:
        for name in Change._fields:
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))
        if self.order not in (1, 2):
            raise UserError(f"sampler.order is {self.order!r}; it must be 1 (Euler) or 2 (midpoint)")
        counts = {len(getattr(self, name)) - extra for name, extra in _EXTRA.items() if getattr(self, name)}
        if len(counts) > 1 or any(count < self.order or count % self.order for count in counts):
            lengths = ", ".join(f"{name} {len(getattr(self, name))}" for name in _EXTRA)
            raise UserError(
                f"sampler {lengths} are the lengths given; each must be order * num_steps, times and scales one more"
            )
        if counts:
            object.__setattr__(self, "num_steps", counts.pop() // self.order)
        check_steps(self.num_steps)
        self._check_values()
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(
                f"sampler.sigma_min is {self.sigma_min} and sigma_max is {self.sigma_max}; "
                "they must satisfy 0 < sigma_min < sigma_max < inf"
            )

    @classmethod
    def identity(cls, num_steps: int, order: int = 2) -> Bespoke:
        """The base solver with its numbers written out: uniform steps on the straight path."""
        return cls.of(identity_change(order * num_steps), order)

    @classmethod
    def of(cls, change: Change, order: int, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Bespoke:
        """The solver of given numbers."""
        t, t_prime, s, s_prime = (tuple(values.tolist()) for values in change)
        return cls(
            order=order,
            times=t,
            times_prime=t_prime,
            scales=s,
            scales_prime=s_prime,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
        )

    @property
    def nfe(self) -> int:
        """Network evaluations per image."""
        return self.order * self.num_steps

    @property
    def parameters(self) -> int:
        """Free numbers: 4 N - 1 for order 1, 8 N - 1 for order 2."""
        return 4 * self.nfe - 1

    def change(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Change:
        """The solver's numbers as tensors."""
        given = (torch.tensor(getattr(self, name), dtype=dtype, device=device) for name in Change._fields)
        plain = identity_change(self.nfe, device, dtype)
        return Change(*(own if len(own) else default for own, default in zip(given, plain, strict=True)))

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
        """As `types.Sampler`; returns float64. on_step sees the library's x = x_t / t and sigma = (1 - t) / t."""
        velocity = straight_velocity(denoiser, self.sigma_min, self.sigma_max)
        change = self.change(latents.device, widest(latents.device))
        x = wide(latents)
        for i in range(self.num_steps):
            x, estimate = bespoke_step(velocity, x, change, self.order, i, cond)
            if on_step is not None:
                t = float(change.times[self.order * (i + 1)])
                on_step(x / t, estimate, (1 - t) / t)
        return x

    def _check_values(self) -> None:
        change = self.change()
        rules = {
            "times": "increase strictly from 0 to 1",
            "times_prime": "be positive and finite",
            "scales": "be positive and finite and start with 1",
            "scales_prime": "be finite",
        }
        holds = (
            bool((change.times.diff() > 0).all()) and change.times[0] == 0 and change.times[-1] == 1,
            _all_positive(change.times_prime),
            _all_positive(change.scales) and change.scales[0] == 1,
            bool(change.scales_prime.isfinite().all()),
        )
        for (name, rule), good in zip(rules.items(), holds, strict=True):
            if not good:
                raise UserError(f"sampler.{name} is {_short(getattr(self, name))}; it must {rule}")


_EXTRA = {"times": 1, "times_prime": 0, "scales": 1, "scales_prime": 0}
"""Values of each tuple beyond one an evaluation."""


def identity_change(evaluations: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Change:
    """t = r and s = 1, at `evaluations` points and the end."""
    ones = torch.ones(evaluations + 1, dtype=dtype, device=device)
    times = torch.arange(evaluations + 1, dtype=dtype, device=device) / evaluations
    return Change(times, ones[1:], ones, torch.zeros_like(ones[1:]))


def bespoke_step(
    velocity: PathNetwork, x: Tensor, change: Change, order: int, i: int | Tensor, cond: Condition = UNCONDITIONAL
) -> tuple[Tensor, Tensor]:
    """Step i, from node i to node i + 1: (state there, estimate of x0 at the last evaluation), [N, ...].

    velocity: u_t(x), t = 0 noise. x: states in the path's own scale [N, ...]. i: one step for all rows, or int64 [N].
    Differentiable in x and in the change. Order 1, in the paper's letters:
        x_{i+1} = ((s_i + h s'_i) / s_{i+1}) x_i + h t'_i (s_i / s_{i+1}) u(t_i, x_i)
    Order 2, with m = i + 1/2:
        z = (s_i + h s'_i / 2) x_i + (h / 2) s_i t'_i u(t_i, x_i)
        x_{i+1} = (s_i / s_{i+1}) x_i + (h / s_{i+1}) ((s'_m / s_m) z + t'_m s_m u(t_m, z / s_m))
    """

    def at(values: Tensor, evaluation: int | Tensor) -> Tensor:
        return per_image(values[evaluation], x)

    def slope(point: Tensor, evaluation: int | Tensor) -> Tensor:
        return velocity(point, change.times[evaluation].expand(len(x)), cond)

    h = order / len(change.times_prime)
    here, following = order * i, order * (i + 1)
    s, s_prime, t_prime = at(change.scales, here), at(change.scales_prime, here), at(change.times_prime, here)
    s_next = at(change.scales, following)
    u = slope(x, here)
    if order == 1:
        after = (s + h * s_prime) / s_next * x + h * t_prime * (s / s_next) * u
        return after, x + (1 - at(change.times, here)) * u
    half = here + 1
    z = (s + h / 2 * s_prime) * x + h / 2 * s * t_prime * u
    s_half = at(change.scales, half)
    middle = z / s_half
    u = slope(middle, half)
    drift = at(change.scales_prime, half) / s_half * z + at(change.times_prime, half) * s_half * u
    return s / s_next * x + h / s_next * drift, middle + (1 - at(change.times, half)) * u


def straight_velocity(denoiser: Denoiser, sigma_min: float, sigma_max: float) -> PathNetwork:
    """u_t(x) = dx/dt of a denoiser on the straight path x_t = t x0 + (1 - t) eps, as (x [N, ...], t [N], cond) -> u.

    t in [0, 1]: 0 is noise, 1 the image. The denoiser is asked within [sigma_min, sigma_max] and its own range alone.
    """
    low, high = max(sigma_min, denoiser.sigma_min), min(sigma_max, denoiser.sigma_max)
    backward = velocity_of(_UpTo(denoiser, low, high), Linear())
    latest = 1 / (1 + low)

    def velocity(x: Tensor, t: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return -backward(x, 1 - t.clamp(max=latest), cond)

    return velocity


class _UpTo:
    """A denoiser with narrower ends, for `velocity_of`."""

    def __init__(self, denoiser: Denoiser, sigma_min: float, sigma_max: float) -> None:
        self.denoiser, self.sigma_min, self.sigma_max = denoiser, sigma_min, sigma_max

    def __call__(self, x: Tensor, sigma: Tensor, cond: Condition = UNCONDITIONAL) -> Tensor:
        return self.denoiser(x, sigma, cond)

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return self.denoiser.round_sigma(sigma)


def _all_positive(values: Tensor) -> bool:
    return bool((values > 0).all() and values.isfinite().all())


def _short(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:.4g}' for value in values)})"

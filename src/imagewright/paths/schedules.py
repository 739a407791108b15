"""Time grids, noise schedules and scalings of Karras et al. 2022 (EDM), table 1: an ablation's choices.

Three independent choices, each a frozen dataclass:

    grid       which noise levels are visited            VPGrid, VEGrid, IDDPMGrid, EDMGrid
    schedule   sigma(t), the clock between grid points   VPSchedule, VESchedule, LinearSchedule
    scaling    s(t), x_t = s(t) (x0 + sigma(t) eps)      VPScaling, NoScaling

`sigma` is relative to the image, as in a Denoiser (`nsr` of `gaussian`). All arithmetic is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.types import UserError


def karras_sigmas(n: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """n noise levels from sigma_max to sigma_min, even in sigma^(1/rho). EDM, eq. 5, without its final zero.

    n: >= 1 (one level is sigma_max). 0 < sigma_min <= sigma_max; rho > 0.  Returns float64 [n].
    Raises UserError outside these ranges.
    """
    require_positive("rho", rho)
    _require_range(n, sigma_min, sigma_max)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return torch.pow(high + _fractions(n) * (low - high), rho)


@lru_cache
def karras_grid(
    n: int, sigma_min: float, sigma_max: float, rho: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """`karras_sigmas` on a device, sent there once: sending makes the host wait. Not to be changed in place."""
    with torch.inference_mode(False):
        return karras_sigmas(n, sigma_min, sigma_max, rho).to(device, dtype)


# --- grids --------------------------------------------------------------------------------------------------


class Grid(ABC):
    """Which noise levels a sampler visits."""

    @property
    @abstractmethod
    def default_range(self) -> tuple[float, float]:
        """(sigma_min, sigma_max) of the method that the grid comes from."""

    @abstractmethod
    def sigmas(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        """n noise levels, decreasing, float64 [n], no final zero. Raises UserError for an empty range."""


@dataclass(frozen=True, kw_only=True)
class EDMGrid(Grid):
    """Even in sigma^(1/rho). EDM, table 1, "EDM"."""

    rho: float = 7.0

    def __post_init__(self) -> None:
        require_positive("rho", self.rho)

    @property
    def default_range(self) -> tuple[float, float]:
        return 0.002, 80.0

    def sigmas(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        return karras_sigmas(n, sigma_min, sigma_max, self.rho)


@dataclass(frozen=True, kw_only=True)
class VPGrid(Grid):
    """Even in the time of the VP process that meets the range, from 1 to epsilon_s. EDM, table 1, "VP".

    epsilon_s: last time, in (0, 1).
    """

    epsilon_s: float = 1e-3

    def __post_init__(self) -> None:
        _require_epsilon_s(self.epsilon_s)

    @property
    def default_range(self) -> tuple[float, float]:
        ends = VPSchedule().sigma(torch.tensor([self.epsilon_s, 1.0], dtype=torch.float64))
        return float(ends[0]), float(ends[1])

    def sigmas(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        _require_range(n, sigma_min, sigma_max)
        t = 1 + _fractions(n) * (self.epsilon_s - 1)
        return VPSchedule.through(sigma_min, sigma_max, self.epsilon_s).sigma(t)


@dataclass(frozen=True, kw_only=True)
class VEGrid(Grid):
    """Geometric in sigma. EDM, table 1, "VE"."""

    @property
    def default_range(self) -> tuple[float, float]:
        return 0.02, 100.0

    def sigmas(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        _require_range(n, sigma_min, sigma_max)
        return sigma_max * (sigma_min / sigma_max) ** _fractions(n)


@dataclass(frozen=True, kw_only=True)
class IDDPMGrid(Grid):
    """Even picks, by rounded index, from the table that iDDPM trains on. EDM, table 1, "iDDPM", and C.3.4.

    C_1: floor of the ratio of neighbouring alpha-bars, in (0, 1). C_2: offset of the cosine, >= 0.
    M: table size, >= 1. Asked for more levels than the range holds, it repeats some.
    """

    C_1: float = 0.001
    C_2: float = 0.008
    M: int = 1000

    def __post_init__(self) -> None:
        if not (0 < self.C_1 < 1 and self.C_2 >= 0 and self.M >= 1):
            raise UserError(
                "the iDDPM table needs 0 < C_1 < 1, C_2 >= 0 and M >= 1, "
                f"got C_1 = {self.C_1}, C_2 = {self.C_2}, M = {self.M}"
            )

    @property
    def default_range(self) -> tuple[float, float]:
        return 0.002, 81.0

    def table(self) -> Tensor:
        """u_0 > u_1 > ... > u_M = 0, float64 [M + 1].

        u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar(j-1) / abar(j), C_1), abar(j) = sin^2(pi/2 j / (M (C_2 + 1))).
        """
        # The ratios are float32, as in the published sampler: near clean images, where each is close to 1,
        # that moves the levels by up to 1e-3 of their value, and so decides which ones a given sigma_min
        # leaves out.
        j = torch.arange(self.M + 1, dtype=torch.float32)
        alpha_bar = torch.sin(0.5 * math.pi * j / self.M / (self.C_2 + 1)) ** 2
        log_ratio = (alpha_bar[:-1] / alpha_bar[1:]).clamp(min=self.C_1).double().log()
        log_level = torch.cat([-log_ratio.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
        return torch.sqrt(torch.expm1(log_level))

    def sigmas(self, n: int, sigma_min: float, sigma_max: float) -> Tensor:
        _require_range(n, sigma_min, sigma_max)
        table = self.table()
        inside = table[(table >= sigma_min) & (table <= sigma_max)]
        if len(inside) == 0:
            raise UserError(f"the iDDPM table has no level between {sigma_min:g} and {sigma_max:g}")
        return inside[((len(inside) - 1) * _fractions(n)).round().long()]


# --- schedules ----------------------------------------------------------------------------------------------


class Schedule(ABC):
    """The clock: noise level as an increasing function of time, any shape."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at time t >= 0."""

    @abstractmethod
    def sigma_prime(self, t: Tensor) -> Tensor:
        """d sigma / dt, t > 0."""

    @abstractmethod
    def time_of(self, sigma: Tensor) -> Tensor:
        """The time of a noise level >= 0; inverse of `sigma`."""


@dataclass(frozen=True, kw_only=True)
class VPSchedule(Schedule):
    """sigma(t) = sqrt(exp(beta_d t^2 / 2 + beta_min t) - 1). EDM, table 1, "VP"."""

    beta_d: float = 19.9
    beta_min: float = 0.1

    @classmethod
    def through(cls, sigma_min: float, sigma_max: float, epsilon_s: float = 1e-3) -> VPSchedule:
        """The schedule with sigma(epsilon_s) = sigma_min and sigma(1) = sigma_max. EDM, appendix C.1."""
        _require_epsilon_s(epsilon_s)
        low, high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
        beta_d = 2 * (low / epsilon_s - high) / (epsilon_s - 1)
        return cls(beta_d=beta_d, beta_min=high - 0.5 * beta_d)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.expm1((0.5 * self.beta_d * t + self.beta_min) * t))

    def sigma_prime(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return 0.5 * (self.beta_min + self.beta_d * t) * (sigma + 1 / sigma)

    def time_of(self, sigma: Tensor) -> Tensor:
        integral = torch.log1p(sigma**2)
        return 2 * integral / (torch.sqrt(self.beta_min**2 + 2 * self.beta_d * integral) + self.beta_min)


@dataclass(frozen=True, kw_only=True)
class VESchedule(Schedule):
    """sigma(t) = sqrt(t). EDM, table 1, "VE"."""

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return 0.5 / torch.sqrt(t)

    def time_of(self, sigma: Tensor) -> Tensor:
        return sigma**2


@dataclass(frozen=True, kw_only=True)
class LinearSchedule(Schedule):
    """sigma(t) = t. EDM, table 1, "iDDPM" and "EDM"."""

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, sigma: Tensor) -> Tensor:
        return sigma


# --- scalings -----------------------------------------------------------------------------------------------


class Scaling(ABC):
    """s(t): the image's scale in x_t = s(t) (x0 + sigma(t) eps), on the clock of a schedule."""

    @abstractmethod
    def scale(self, t: Tensor, schedule: Schedule) -> Tensor:
        """s(t) > 0, shape of t."""

    @abstractmethod
    def scale_prime(self, t: Tensor, schedule: Schedule) -> Tensor:
        """ds/dt, shape of t."""


@dataclass(frozen=True, kw_only=True)
class NoScaling(Scaling):
    """s = 1."""

    def scale(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.ones_like(t)

    def scale_prime(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.zeros_like(t)


@dataclass(frozen=True, kw_only=True)
class VPScaling(Scaling):
    """s = 1 / sqrt(1 + sigma^2): unit variance for data of unit variance. EDM, table 1, "VP"."""

    def scale(self, t: Tensor, schedule: Schedule) -> Tensor:
        return torch.rsqrt(1 + schedule.sigma(t) ** 2)

    def scale_prime(self, t: Tensor, schedule: Schedule) -> Tensor:
        return -schedule.sigma(t) * schedule.sigma_prime(t) * self.scale(t, schedule) ** 3


# --- all together -------------------------------------------------------------------------------------------


def time_steps(
    grid: Grid,
    schedule: Schedule,
    num_steps: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    round_sigma: Callable[[Tensor], Tensor] = lambda sigma: sigma,
) -> Tensor:
    """The schedule's times of the grid's noise levels, and a final zero: float64 [num_steps + 1], decreasing.

    sigma_min, sigma_max: ends of the grid, already limited to what the denoiser knows; None: the grid's
    default. round_sigma: a denoiser's own, applied to the levels before they become times.
    Raises UserError for fewer than one step or an empty range.
    """
    low, high = grid.default_range
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    t = schedule.time_of(round_sigma(grid.sigmas(num_steps, low, high)).double())
    return torch.cat([t, t.new_zeros(1)])


def _fractions(n: int) -> Tensor:
    """0 to 1 in n even steps, float64 [n]; [0] for n = 1."""
    return torch.arange(n, dtype=torch.float64) / max(n - 1, 1)


def _require_range(n: int, sigma_min: float, sigma_max: float) -> None:
    if n < 1:
        raise UserError(f"the number of steps must be at least 1, got {n}")
    if not (math.isfinite(sigma_max) and 0 < sigma_min <= sigma_max):
        raise UserError(f"noise levels must satisfy 0 < sigma_min <= sigma_max < inf, got {sigma_min} and {sigma_max}")


def _require_epsilon_s(epsilon_s: float) -> None:
    if not 0 < epsilon_s < 1:
        raise UserError(f"epsilon_s must lie in (0, 1), got {epsilon_s}")

"""Gaussian processes x_t = alpha(t) x0 + sigma(t) eps, eps standard normal: diffusions and straight flows.

Time convention (for the whole library): t = 0 is clean, t grows with the noise, `t_max` is the noisiest time.
Two standard deviations: `sigma(t)` is the process's own; `nsr(t)` = sigma / alpha is that of x_t / alpha,
which is the `sigma` of every Denoiser and means the same on every path. At `t_max` of Linear, TrigFlow and
Cosine alpha is exactly zero and nsr infinite. Everything is elementwise, differentiable, and in the dtype of
its argument.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from imagewright.checks import require_positive
from imagewright.types import UserError


class GaussianPath(ABC):
    """A process, as functions of time t (any shape)."""

    @property
    @abstractmethod
    def t_max(self) -> float:
        """The noisiest time."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the image in x_t, >= 0."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise in x_t, >= 0."""

    @abstractmethod
    def alpha_prime(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_prime(self, t: Tensor) -> Tensor:
        """d sigma / dt; infinite at t = 0 if sigma starts as a square root (VariancePreserving, Cosine)."""

    def nsr(self, t: Tensor) -> Tensor:
        """Noise-to-signal ratio sigma / alpha: the library's sigma. Infinite where alpha is zero."""
        return self.sigma(t) / self.alpha(t)

    @abstractmethod
    def time_of(self, nsr: Tensor) -> Tensor:
        """The time at which `nsr(t)` is the given noise level, 0 <= nsr <= inf: the inverse of `nsr`."""

    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The noisy image x_t [N, ...] of x0 and eps [N, ...] at times t [N]."""
        return per_image(self.alpha(t), x0) * x0 + per_image(self.sigma(t), x0) * eps


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """One number per image, [N], made ready to multiply `like` [N, ...]: [N, 1, ..., 1]; a scalar stays one.

    Returns like's dtype, or float32 if that is less: times may be float64 without the images becoming it.
    """
    value = value.to(torch.promote_types(like.dtype, torch.float32))
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim)) if value.ndim else value


@dataclass(frozen=True, kw_only=True)
class Linear(GaussianPath):
    """The straight path: alpha = 1 - t, sigma = t, t in [0, 1]. Liu et al. 2023; Lipman et al. 2023.

    Papers of this family often count time from noise to image; theirs is 1 - t.
    """

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, nsr: Tensor) -> Tensor:
        return torch.where(nsr.isinf(), 1.0, nsr / (1 + nsr))


@dataclass(frozen=True, kw_only=True)
class VarianceExploding(GaussianPath):
    """Noise is added and nothing is scaled: alpha = 1, and time is the noise level, t = sigma, in data units.

    Karras et al. 2022 (EDM), table 1. Song et al. 2021 run the same process on a clock t = sigma^2.
    sigma_max: the noisiest time, > 0.
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        require_positive("VarianceExploding.sigma_max", self.sigma_max)

    @property
    def t_max(self) -> float:
        return self.sigma_max

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def time_of(self, nsr: Tensor) -> Tensor:
        return nsr


@dataclass(frozen=True, kw_only=True)
class TrigFlow(GaussianPath):
    """alpha = cos(t), sigma = sigma_data sin(t), t in [0, pi/2]. Lu and Song 2025 (sCM), section 3.1.

    The paper's noise is z ~ N(0, sigma_data^2); ours is eps = z / sigma_data, as everywhere. So x_t has the
    standard deviation of the data at every time, and t is the angle arctan(nsr / sigma_data).
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        require_positive("TrigFlow.sigma_data", self.sigma_data)

    @property
    def t_max(self) -> float:
        return math.pi / 2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 - t)  # not cos(t): that is not zero at the float nearest to pi / 2

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(t)

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.sin(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(math.pi / 2 - t)

    def time_of(self, nsr: Tensor) -> Tensor:
        return torch.atan(nsr / self.sigma_data)


@dataclass(frozen=True, kw_only=True)
class VariancePreserving(GaussianPath):
    """alpha^2 + sigma^2 = 1 with beta(t) = beta_min + beta_d t, t in [0, 1]. Song et al. 2021; EDM, C.1.

    alpha = exp(-B / 2), B(t) = beta_d t^2 / 2 + beta_min t, so nsr = sqrt(exp(B) - 1), about 152 at t = 1.
    The formulas go on beyond t = 1, and pure noise is at t = inf.  beta_d, beta_min: > 0.
    """

    beta_d: float = 19.9
    beta_min: float = 0.1

    def __post_init__(self) -> None:
        require_positive("VariancePreserving.beta_d", self.beta_d)
        require_positive("VariancePreserving.beta_min", self.beta_min)

    @property
    def t_max(self) -> float:
        return 1.0

    def _integral(self, t: Tensor) -> Tensor:
        return (0.5 * self.beta_d * t + self.beta_min) * t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t))

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + self.beta_d * t) * self.alpha(t)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return 0.5 * (self.beta_min + self.beta_d * t) * self.alpha(t) ** 2 / self.sigma(t)

    def nsr(self, t: Tensor) -> Tensor:
        return torch.sqrt(torch.expm1(self._integral(t)))

    def time_of(self, nsr: Tensor) -> Tensor:
        integral = torch.log1p(nsr**2)
        root = torch.sqrt(self.beta_min**2 + 2 * self.beta_d * integral)
        # The positive root in the form that does not subtract; at infinity that form is inf / inf.
        return torch.where(nsr.isinf(), torch.inf, 2 * integral / (root + self.beta_min))


@dataclass(frozen=True, kw_only=True)
class Cosine(GaussianPath):
    """alpha = cos(theta(t)) / cos(theta(0)), theta = (pi/2) (t + C_2) / (1 + C_2), alpha^2 + sigma^2 = 1.

    Nichol and Dhariwal 2021 (iDDPM), eq. 17, in continuous time and unclipped: alpha is zero at t = 1. Their
    table of 1000 levels limits each beta to 0.999; EDM's limits each ratio of alpha-bars from below by C_1
    (and does not divide by cos(theta(0))): that table is `schedules.IDDPMGrid`. With C_2 = 0 this is
    alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    C_2: offset that keeps the first step's noise finite, in [0, 1).
    """

    C_2: float = 0.008

    def __post_init__(self) -> None:
        if not 0 <= self.C_2 < 1:
            raise UserError(f"Cosine.C_2 must lie in [0, 1), got {self.C_2}")

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def _speed(self) -> float:
        """d theta / dt."""
        return math.pi / 2 / (1 + self.C_2)

    @property
    def _start(self) -> float:
        """theta(0)."""
        return self._speed * self.C_2

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin(self._speed * (1 - t)) / math.cos(self._start)  # cos(theta), exactly zero at t = 1

    def sigma(self, t: Tensor) -> Tensor:
        # cos^2(theta_0) - cos^2(theta) as a product, which keeps its digits near t = 0.
        passed = self._speed * t
        return torch.sqrt(torch.sin(passed) * torch.sin(passed + 2 * self._start)) / math.cos(self._start)

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -self._speed * torch.sin(self._start + self._speed * t) / math.cos(self._start)

    def sigma_prime(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_prime(t) / self.sigma(t)

    def time_of(self, nsr: Tensor) -> Tensor:
        c, s = math.cos(self._start), math.sin(self._start)
        cos = c * torch.rsqrt(1 + nsr**2)
        excess = (c * torch.sin(torch.atan(nsr))) ** 2  # sin^2(theta) - sin^2(theta_0)
        sin = torch.sqrt(s**2 + excess)
        # theta - theta_0, by its sine and its cosine: accurate at both ends.
        sin_passed = sin if s == 0 else excess / (sin * c + cos * s)
        return torch.where(nsr.isinf(), 1.0, torch.atan2(sin_passed, cos * c + sin * s) / self._speed)
